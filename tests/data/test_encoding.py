"""Tokens of one document at a time: which belong to responses, and what stands at the ends."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from equipoise.data.encoding import EncodedDocument, encode_documents
from equipoise.data.sources import DataError

CHAT = [
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "the lazy dog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "a quick window"},
]
EVERY_TEMPLATE = pytest.mark.parametrize(
    "chat_tokenizer", ["marked", "plain", "thinking", "strict"], indirect=True
)


def encode(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[EncodedDocument]:
    return list(encode_documents(Dataset.from_list(rows), tokenizer, **options))


def trained_text(document: EncodedDocument, tokenizer: PreTrainedTokenizerFast) -> str:
    kept = [i for i, flag in zip(document.input_ids, document.trained, strict=True) if flag]
    return str(tokenizer.decode(kept))


class TestText:
    def test_every_token_is_trained_and_eos_ends_the_document(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (document,) = encode([{"text": "the fox"}], tokenizer)
        assert document.input_ids == [*tokenizer("the fox")["input_ids"], tokenizer.eos_token_id]
        assert all(document.trained)

    def test_eos_is_never_doubled_and_bos_stays(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
        )
        (document,) = encode([{"text": "fox"}], tokenizer)
        (opened,) = encode([{"text": "fox"}], tokenizer, end_with_eos=False)
        assert document.input_ids == tokenizer("fox")["input_ids"]
        assert opened.input_ids == document.input_ids[:-1]

    def test_one_value_per_document_in_order(self, tokenizer: PreTrainedTokenizerFast) -> None:
        texts = [f"fox {i}" for i in range(600)]  # more than one batch
        documents = encode([{"text": text} for text in texts], tokenizer, end_with_eos=False)
        assert [tokenizer.decode(d.input_ids) for d in documents] == texts

    def test_long_documents_do_not_warn(
        self, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer.model_max_length = 4
        (document,) = encode([{"text": "the quick brown fox " * 50}], tokenizer)
        assert len(document.input_ids) > 50
        assert not caplog.records


class TestCompletions:
    def test_only_the_completion_is_trained(self, tokenizer: PreTrainedTokenizerFast) -> None:
        (document,) = encode([{"prompt": "the quick", "completion": " brown fox"}], tokenizer)
        assert tokenizer.decode(document.input_ids) == "the quick brown fox<eos>"
        assert trained_text(document, tokenizer) == " brown fox<eos>"

    def test_a_token_across_the_boundary_counts_as_completion(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (document,) = encode([{"prompt": "the qu", "completion": "ick"}], tokenizer)
        assert document.input_ids == [*tokenizer("the quick")["input_ids"], tokenizer.eos_token_id]
        assert trained_text(document, tokenizer).endswith("ick<eos>")
        assert not trained_text(document, tokenizer).startswith("the")

    def test_every_token_is_trained_on_request(self, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = [{"prompt": "the quick", "completion": " brown fox"}]
        (document,) = encode(rows, tokenizer, responses_only=False)
        assert all(document.trained)

    @pytest.mark.parametrize("given", ["a lazy dog", "", None])
    def test_alpaca_prompt(self, tokenizer: PreTrainedTokenizerFast, given: str | None) -> None:
        (document,) = encode([{"instruction": "jump", "input": given, "output": "over"}], tokenizer)
        text = str(tokenizer.decode(document.input_ids))
        assert text.startswith("Below is an instruction that describes a task")
        assert ("### Input:\na lazy dog\n" in text) == bool(given)
        assert text.endswith("### Response:\nover<eos>")
        assert trained_text(document, tokenizer) == "over<eos>"

    def test_chat_template_is_used_where_there_is_one(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        rows = [{"instruction": "jump", "input": "dog", "output": "over"}]
        (document,) = encode(rows, chat_tokenizer)
        text = chat_tokenizer.decode(document.input_ids)
        assert text == "<|user|>jump\n\ndog<|end|><|assistant|>over<|end|><eos>"
        assert trained_text(document, chat_tokenizer) == "over<|end|>"


class TestConversations:
    @EVERY_TEMPLATE
    def test_assistant_turns_are_trained(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        (document,) = encode([{"messages": CHAT}], chat_tokenizer)
        trained = trained_text(document, chat_tokenizer).replace("<think></think>", "")
        assert trained == "the lazy dog<|end|>a quick window<|end|>"

    @EVERY_TEMPLATE
    def test_tokens_are_the_templates_own(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        expected = chat_tokenizer.apply_chat_template(CHAT, return_dict=False)
        for responses_only in (True, False):
            (document,) = encode(
                [{"messages": CHAT}], chat_tokenizer, responses_only=responses_only, end_with_eos=False
            )
            assert document.input_ids == expected
        assert all(document.trained)

    def test_separating_eos_is_not_a_response(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        (document,) = encode([{"messages": CHAT}], chat_tokenizer)
        assert document.input_ids[-1] == chat_tokenizer.eos_token_id
        assert not document.trained[-1]

    def test_eos_that_ends_a_turn_is_a_response(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        chat_tokenizer.eos_token = "<|end|>"
        (document,) = encode([{"messages": CHAT}], chat_tokenizer)
        assert document.input_ids == chat_tokenizer.apply_chat_template(CHAT, return_dict=False)
        assert document.trained[-1]

    def test_opening_assistant_turn(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        (document,) = encode([{"messages": CHAT[1:]}], chat_tokenizer)
        assert trained_text(document, chat_tokenizer).count("<|end|>") == 2

    def test_conversation_without_response_trains_nothing(
        self, chat_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (document,) = encode([{"messages": CHAT[:1]}], chat_tokenizer)
        assert not any(document.trained)

    def test_tokenizer_without_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match=r"chat template.*set tokenizer\.chat_template"):
            encode([{"messages": CHAT}], tokenizer)

    @pytest.mark.parametrize("chat_tokenizer", ["strict"], indirect=True)
    def test_refusal_by_the_template_is_passed_on(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match=r"\['assistant'.*user first"):
            encode([{"messages": CHAT[1:]}], chat_tokenizer)

    def test_template_whose_prompt_leads_elsewhere(self, chat_tokenizer: PreTrainedTokenizerFast) -> None:
        assert isinstance(chat_tokenizer.chat_template, str)
        chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
            "%}<|assistant|>{%", "%}<|system|>{%"
        )
        with pytest.raises(DataError, match="generation prompt leads to"):
            encode([{"messages": CHAT}], chat_tokenizer)


def test_unknown_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"got \['body'\]"):
        encode([{"body": "a"}], tokenizer)
