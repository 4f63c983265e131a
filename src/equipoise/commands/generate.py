"""`equipoise generate`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError
from equipoise.commands.options import (
    AnyModel,
    DrawSeed,
    MaxNewTokens,
    OptionalBranch,
    PromptFile,
    Quiet,
    Reading,
    Temperature,
    TextAsJson,
    TopP,
)
from equipoise.commands.output import progress, quieten, say, say_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from equipoise.models.reading import PromptState


def generate_command(
    model: AnyModel,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text to go on from.")] = None,
    prompt_file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 128,
    branch: OptionalBranch = None,
    reading: Reading = "renormalised",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: DrawSeed = 0,
    quiet: Quiet = False,
    as_json: TextAsJson = False,
) -> None:
    """Stream a model's continuation of a prompt to stdout, in any branch state.

    Says on stderr how many bytes the decode state took. `softmax` is the donor.

    \b
    equipoise generate out/ssd "Once upon a time" --branch linear
    """
    text = read_prompt(prompt, prompt_file)
    if not top_p > 0:
        raise UsageError(f"--top-p: expected a share above 0 and up to 1, got {top_p}.")
    quieten()
    from equipoise.models.branches import branches, mode_of
    from equipoise.models.load import load_model, load_tokenizer

    if branch is not None:
        mode_of(branch, reading)  # a misspelt state is known before any weight is read
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    converted = hasattr(loaded, "make_cache")
    if branch is not None and not converted:
        raise UsageError(
            f"{model}: --branch switches the branches of a converted model, and this "
            f"{loaded.config.model_type} is not converted. Leave --branch out, or convert it first."
        )
    tokens, sampling = encode(tokenizer, text, loaded), sampling_of(temperature, top_p)
    try:
        with branches(loaded, branch or "both", reading=reading) if converted else nullcontext():
            done = stream(
                loaded, tokenizer, tokens, limit=max_new_tokens, seed=seed, sampling=sampling,
                shown=not as_json,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise VerbError("interrupted.", INTERRUPTED) from None
    if as_json:
        new: Any = done.sequences[0, tokens.shape[1] :]
        say_json({
            "prompt": text, "text": tokenizer.decode(new, skip_special_tokens=True),
            "branch": (branch or "both") if converted else None,
            "prompt_tokens": int(tokens.shape[1]), "new_tokens": len(new),
            "state_bytes": cache_bytes(done.past_key_values),
        })  # fmt: skip
    elif not quiet:
        read = int(done.sequences.shape[1])
        say(progress(), f"decode state: {cache_bytes(done.past_key_values):,} bytes after {read:,} tokens")


def sampling_of(temperature: float, top_p: float) -> dict[str, Any]:
    """transformers' settings for drawing tokens, none of them left to the model's own defaults."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt, wherever it stands.

    Raises:
        UsageError: none, or two of them.
    """
    if (prompt is None) == (file is None):
        raise UsageError("expected one prompt: either as an argument or with --prompt-file.")
    return prompt if prompt is not None else read_text(str(file), "--prompt-file")


def read_text(file: str, option: str) -> str:
    """The text of a file, or of stdin for ``-``.

    Raises:
        UsageError: not there, or not text; names the option.
    """
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {file}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {file}: expected UTF-8 text, got other bytes.") from None


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, model: PreTrainedModel, *, continues: bool = False
) -> Tensor:
    """The prompt's tokens, [1, T]; without a start token where it ``continues`` another.

    Raises:
        UsageError: no token, or one past the model's vocabulary.
    """
    tokens: Any = tokenizer(
        text, return_tensors="pt", add_special_tokens=not continues, verbose=False
    ).input_ids.long()
    if tokens.numel() == 0:
        raise UsageError("expected a prompt of at least one token, got none.")
    config: Any = model.config.get_text_config(decoder=True)
    if int(tokens.max()) >= config.vocab_size:
        raise UsageError(
            f"expected token ids below the model's vocabulary size {config.vocab_size}, got "
            f"{int(tokens.max())}: the tokenizer is not this model's."
        )
    return tokens.to(model.device)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    *,
    limit: int,
    seed: int,
    sampling: dict[str, Any],
    state: PromptState | None = None,
    shown: bool = True,
) -> Any:
    """Generate to stdout, after a saved state if any; gives back what transformers does, cache included."""
    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore
    writer = streamer if shown else None
    generator: Any = model
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return generator.generate(
        **(inputs if state is None else state.inputs(tokens)), streamer=writer, pad_token_id=pad,
        max_new_tokens=limit, return_dict_in_generate=True, **sampling,
    )  # fmt: skip


def cache_bytes(cache: Any) -> int:
    """Bytes a decode cache holds, a hybrid's or transformers' own."""
    if hasattr(cache, "state_bytes"):
        return int(cache.state_bytes())
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
