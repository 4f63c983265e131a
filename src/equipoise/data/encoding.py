"""Documents to tokens: one token list per document, and which of its tokens are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from equipoise.data.layouts import DataError, DocumentLayout, layout_of

Messages = list[dict[str, str]]

_BATCH_SIZE = 256
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Alpaca's own prompts, which the published conversions of base models were fine-tuned with.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """The tokens of one document."""

    input_ids: list[int]
    """L token ids."""
    trained: list[bool]
    """L flags: whether the loss counts the token (all tokens of text; a conversation's responses)."""


def encode_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    responses_only: bool = True,
    end_with_eos: bool = True,
) -> Iterator[EncodedDocument]:
    """Tokenise documents one by one, in order, each with the tokenizer's own start token if any.

    Args:
        documents: a table in one of `LAYOUTS`.
        tokenizer: must have an EOS token where `end_with_eos`.
        responses_only: train only on assistant turns and completions; text is trained throughout.
        end_with_eos: append EOS to each document that does not end with it. After a conversation
            it is a mere separator and not trained on, since the template ends turns itself.

    Yields:
        One value per document, in order; a document without any token gives an empty one.

    Raises:
        DataError: an unknown layout, conversations without a chat template, or a conversation
            that the template refuses.
    """
    batches = cast("Iterable[Mapping[str, list[Any]]]", documents.iter(batch_size=_BATCH_SIZE))
    yield from encode_batches(
        batches, layout_of(documents.column_names), tokenizer, responses_only=responses_only,
        end_with_eos=end_with_eos,
    )  # fmt: skip


def encode_batches(
    batches: Iterable[Mapping[str, list[Any]]],
    layout: DocumentLayout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    responses_only: bool = True,
    end_with_eos: bool = True,
) -> Iterator[EncodedDocument]:
    """As `encode_documents`, of batches of columns; a document's tokens do not depend on its batch."""
    encode = _encoder(layout, tokenizer, responses_only)
    eos = cast("int | None", tokenizer.eos_token_id) if end_with_eos else None
    separator_trained = layout != "messages" and not _renders_chat(layout, tokenizer)
    for batch in batches:
        for document in encode(batch):
            ids, trained = document.input_ids, document.trained
            if eos is not None and ids and ids[-1] != eos:
                ids, trained = [*ids, eos], [*trained, separator_trained]
            yield EncodedDocument(input_ids=ids, trained=trained)


_BatchEncoder = Callable[[Mapping[str, list[Any]]], Iterator[EncodedDocument]]


def _encoder(
    layout: DocumentLayout, tokenizer: PreTrainedTokenizerBase, responses_only: bool
) -> _BatchEncoder:
    """Choose how to encode a batch of columns; every row then takes the same path."""
    if layout == "text":
        return lambda batch: _encode_text(batch["text"], tokenizer)
    if layout == "messages" and not tokenizer.chat_template:
        raise DataError(
            f"expected a tokenizer with a chat template for documents with 'messages', got "
            f"{tokenizer.name_or_path or type(tokenizer).__name__!r} without one; use the "
            "instruction-tuned model's tokenizer, set tokenizer.chat_template, or give "
            "'prompt' and 'completion' columns"
        )
    chat = bool(tokenizer.chat_template)

    def encode(batch: Mapping[str, list[Any]]) -> Iterator[EncodedDocument]:
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            row: dict[str, Any] = dict(zip(columns, values, strict=True))
            if chat:
                yield _encode_chat(_as_messages(row, layout), tokenizer, responses_only)
            else:
                prompt, completion = _as_completion(row, layout)
                yield _encode_completion(prompt, completion, tokenizer, responses_only)

    return encode


def _renders_chat(layout: DocumentLayout, tokenizer: PreTrainedTokenizerBase) -> bool:
    return layout != "text" and bool(tokenizer.chat_template)


# --- text and completions -------------------------------------------------------------------


def _encode_text(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[EncodedDocument]:
    for ids in _tokenise(texts, tokenizer, special_tokens=True):
        yield EncodedDocument(input_ids=ids, trained=[True] * len(ids))


def _encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, responses_only: bool
) -> EncodedDocument:
    before, ids = _tokenise([prompt, prompt + completion], tokenizer, special_tokens=True)
    start = _common_prefix(before, ids) if responses_only else 0
    return EncodedDocument(input_ids=ids, trained=[i >= start for i in range(len(ids))])


def _tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool
) -> list[list[int]]:
    """Tokenise texts, without the EOS that some tokenizers append: a prompt must stay open."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special_tokens,
        return_attention_mask=False,
        verbose=False,  # documents longer than the model's maximum are cut into rows later
    )
    rows = cast("list[list[int]]", encoded["input_ids"])
    eos = cast("int | None", tokenizer.eos_token_id)
    if not special_tokens or eos is None:
        return rows
    return [row[:-1] if row and row[-1] == eos else row for row in rows]


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix. A token that straddles a boundary falls after it."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _as_completion(row: Mapping[str, Any], layout: DocumentLayout) -> tuple[str, str]:
    if layout == "completion":
        return row["prompt"], row["completion"]
    form = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
    prompt = form.format(instruction=row["instruction"], input=row.get("input"))
    return prompt, row["output"]


# --- conversations --------------------------------------------------------------------------


def _as_messages(row: Mapping[str, Any], layout: DocumentLayout) -> Messages:
    if layout == "messages":
        return row["messages"]
    if layout == "completion":
        prompt, completion = row["prompt"], row["completion"]
    else:
        prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        completion = row["output"]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _encode_chat(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, responses_only: bool
) -> EncodedDocument:
    try:
        if responses_only and tokenizer.is_fast and _marks_generation(tokenizer):
            encoded = cast(
                "Mapping[str, list[int]]",
                tokenizer.apply_chat_template(
                    messages,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    tokenizer_kwargs={"verbose": False},
                ),
            )
            mask = [bool(flag) for flag in encoded["assistant_masks"]]
            return EncodedDocument(input_ids=list(encoded["input_ids"]), trained=mask)
        text = _render(messages, tokenizer)
        spans = _response_spans(messages, text, tokenizer) if responses_only else [(0, len(text))]
    except TemplateError as error:
        raise DataError(
            f"expected a conversation that the tokenizer's chat template accepts, got roles "
            f"{[message['role'] for message in messages]} ({error}); correct or remove it"
        ) from error
    return _encode_spans(text, spans, tokenizer)


def _marks_generation(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _GENERATION_MARK.search(tokenizer.get_chat_template()) is not None


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    return cast(
        "str",
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt),
    )


def _response_spans(
    messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Find the character spans of the assistant's turns in the rendered conversation.

    A turn starts where the conversation before it, with the generation prompt, ends: exactly what
    the model will be given at inference.
    """
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, prompt=True) if index else ""
        until = _render(messages[: index + 1], tokenizer)
        end = len(until) if text.startswith(until) else _turn_end(text, before, until, message)
        if not text.startswith(before) or end < len(before):
            raise DataError(
                f"expected a chat template whose generation prompt leads to the assistant's turn, "
                f"got one that renders message {index} otherwise; mark the turns with "
                "{% generation %} in the template, or set responses_only=False"
            )
        spans.append((len(before), end))
    return spans


def _turn_end(text: str, before: str, until: str, message: Mapping[str, str]) -> int:
    """Find a turn's end where the template renders it otherwise once more turns follow it.

    Qwen3's does so: the last turn alone carries a thinking block. Returns -1 if it is not found.
    """
    content = message["content"].strip()
    cut = until.rfind(content)
    closing = content + until[cut + len(content) :]
    start = text.find(closing, len(before)) if cut >= 0 else -1
    return start + len(closing) if start >= 0 else -1


def _encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> EncodedDocument:
    # Cut texts are tokenised to count tokens up to each cut: offsets exist for fast tokenizers only.
    cuts = [text[:position] for span in spans for position in span if position < len(text)]
    ids, *prefixes = _tokenise([text, *cuts], tokenizer, special_tokens=False)
    counts = iter([_common_prefix(prefix, ids) for prefix in prefixes])
    trained = [False] * len(ids)
    for span in spans:
        start, end = (next(counts) if position < len(text) else len(ids) for position in span)
        trained[start:end] = [True] * (end - start)
    return EncodedDocument(input_ids=ids, trained=trained)
