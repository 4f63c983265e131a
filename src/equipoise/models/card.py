"""What a model's card says whoever writes it: its front matter, what it is, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from equipoise import __version__

CARD = "README.md"
"""Where the Hub looks for it."""
TAGS = ("equipoise", "hybrid-attention", "linear-attention", "sliding-window-attention")
UNMEASURED = (
    "Not audited: nothing is known of which branch does the work, nor of what the conversion cost. "
    "`equipoise audit` measures both, and `equipoise card` writes them here."
)


def public_name(name: str) -> str:
    """A name fit for others: of a local path its last part only."""
    return Path(name).name if Path(name).is_absolute() else name


def donor_of(described: dict[str, Any]) -> tuple[str | None, bool]:
    """(name, whether it is on the Hub) of the donor that an ``equipoise`` entry names."""
    donor = described.get("donor") or {}
    name = donor.get("name")
    if name is None:
        return None, False
    return public_name(str(name)), donor.get("fingerprint") is None and not Path(str(name)).is_absolute()


def metadata(
    described: dict[str, Any], *, licence: str | None = None, datasets: list[str] | None = None
) -> ModelCardData:
    """The front matter; what is not known is left out.

    Args:
        described: the ``equipoise`` entry of a model's configuration.
        licence: the Hub's identifier of the donor's licence.
        datasets: Hub names of what it was trained on.
    """
    donor, on_hub = donor_of(described)
    known: dict[str, Any] = {
        "license": licence,
        "datasets": datasets or None,
        "base_model": donor if on_hub else None,
        "base_model_relation": "finetune" if on_hub else None,
    }
    return ModelCardData(
        library_name="equipoise",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        **{key: value for key, value in known.items() if value is not None},
    )


def window_in_words(hybrid: dict[str, Any]) -> str:
    """Tokens of the window, or from which to which where layers or heads have their own: "64", "8 to 71"."""
    layers = [hybrid, *(hybrid.get("per_layer") or {}).values()]
    windows = [layer.get("head_windows") or [layer.get("window", hybrid["window"])] for layer in layers]
    sizes = {size for of in windows for size in of} - {None}
    least, most = min(sizes), max(sizes)
    return str(most) if least == most else f"{least} to {most}"


def has_single_heads(hybrid: dict[str, Any]) -> bool:
    """Whether only some layers or heads have a linear branch."""
    parts = [hybrid, *(hybrid.get("per_layer") or {}).values()]
    return any(part.get("linear_heads") is not None or part.get("feature_map", "") is None for part in parts)


def introduction(described: dict[str, Any]) -> str:
    """What the model is, in two sentences."""
    donor, on_hub = donor_of(described)
    hybrid = described["hybrid"]
    parts = [f"a sliding window of {window_in_words(hybrid)} tokens"] if hybrid["window"] is not None else []
    if hybrid["feature_map"] is not None:
        some = " in some heads" if has_single_heads(hybrid) else ""
        parts.append(f"linear attention with a state of fixed size{some}")
    of = "a softmax transformer" if donor is None else f"[{donor}](https://huggingface.co/{donor})"
    of = f"`{donor}`" if donor is not None and not on_hub else of
    return (
        f"{of}, converted by equipoise: converted layers attend with {' and '.join(parts)} instead of full "
        "softmax attention, so that time and memory per token do not grow with the text."
    )


def loading(described: dict[str, Any], place: str) -> str:
    """How to load the model, and what for; in Markdown."""
    donor, on_hub = donor_of(described)
    note = ""
    if described.get("checkpoint") == "delta":
        kind = "from the Hub" if on_hub else "from a local directory, which has to lie beside this one"
        note = f"This is a delta: what the conversion added. The weights of `{donor}` come {kind}.\n\n"
    return f"""{note}Needs the Python package `equipoise` (made with version {__version__}); without it, \
transformers does not know the model type. No code is downloaded or run from this repository.

```python
import equipoise  # makes transformers know the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))

with equipoise.branches(model, "window"):  # one branch alone: "window", "linear", "none"
    model(**inputs)
```"""


def unmeasured_card(described: dict[str, Any], place: str) -> ModelCard:
    """A card of what the configuration alone says."""
    body = f"""# {place.rpartition("/")[2]}

{introduction(described)}

## Loading

{loading(described, place)}

## What was measured

{UNMEASURED}
"""
    return card(metadata(described), body)


def card(data: ModelCardData, body: str) -> ModelCard:
    """A card of front matter and Markdown."""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
