"""Which classes are the mixers of each hybrid that ships with transformers, and what removing one means.

A table, never a pattern: `KimiLinearAttention` is the softmax layer of its model, `MiniMaxLightningAttention`
a linear one. Read off transformers 5.23. A *mixer* is the part of a layer that moves information between
tokens; the module listed is the whole mixer, projections and gates included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from equipoise.models.families import ConversionError

Role = Literal["attention", "linear"]
Returns = Literal["tensor", "tuple"]
Arrangement = Literal["parallel", "alternating", "single", "feeding"]

ROLES: tuple[Role, ...] = get_args(Role)
HOLDINGS: dict[Arrangement, frozenset[tuple[int, int]]] = {
    "parallel": frozenset({(1, 1)}),
    "alternating": frozenset({(1, 0), (0, 1)}),
    "single": frozenset({(1, 0), (0, 1), (0, 0)}),
    "feeding": frozenset({(0, 1), (1, 1)}),
}
"""How many (attention, linear) mixers a layer of each arrangement may hold."""

_MEANINGS: dict[Arrangement, str] = {
    "parallel": (
        "Every layer runs both mixers side by side on the same input and adds their outputs: zeroing one "
        "leaves the other as it is, at its own weight."
    ),
    "alternating": (
        "A layer holds one mixer, of either kind: zeroing it takes the whole mixer out, the residual stream "
        "passes by, and the layer keeps its feed-forward part alone."
    ),
    "single": (
        "A layer is one block: a mixer of either kind, or a feed-forward part. Zeroing a mixer takes the "
        "whole layer out: the residual stream passes it by."
    ),
    "feeding": (
        "The attention block (attention and a feed-forward part of its own) adds to the input of its "
        "layer's linear mixer only, never to the residual stream. Zeroing attention silences that "
        "feed-forward part too, biases apart; zeroing the linear mixers cuts attention off with them, so "
        "that attention alone equals none by construction."
    ),
}
_SOFTMAX = "softmax attention"
_MAMBA1, _MAMBA2, _DELTA = "Mamba mixer", "Mamba-2 mixer", "gated delta net"


@dataclass(frozen=True, slots=True)
class MixerClass:
    """A class of mixers.

    Attributes:
        name: of the class, exactly.
        kind: what it is, in words.
        returns: what `forward` returns: the output [B, T, hidden] itself, or a tuple that starts with it.
    """

    name: str
    kind: str
    returns: Returns


@dataclass(frozen=True, slots=True)
class NativeType:
    """A model type that is a hybrid by design.

    Attributes:
        linear, attention: the classes of its mixers.
        arrangement: `parallel`: every layer holds one of each; `alternating`: one of either; `single`: one of
            either or none; `feeding`: a linear one, and in some layers attention that feeds it.
        remark: what else to know when reading its ablations.
    """

    linear: MixerClass
    attention: MixerClass
    arrangement: Arrangement
    remark: str = ""

    @property
    def meaning(self) -> str:
        """What zeroing a mixer means in this type."""
        return " ".join(part for part in (_MEANINGS[self.arrangement], self.remark) if part)

    def of(self, role: Role) -> MixerClass:
        """The class of a role."""
        return self.linear if role == "linear" else self.attention


def _type(
    linear: str,
    kind: str,
    attention: str,
    arrangement: Arrangement = "alternating",
    *,
    linear_returns: Returns = "tensor",
    attention_kind: str = _SOFTMAX,
    remark: str = "",
) -> NativeType:
    """Attention mixers return (output, weights) in every type listed."""
    return NativeType(
        MixerClass(linear, kind, linear_returns),
        MixerClass(attention, attention_kind, "tuple"),
        arrangement,
        remark,
    )


_SHORT = (
    "The linear mixers are gated convolutions over a few tokens (`conv_L_cache`), without a state that "
    "covers everything: attention alone looks further back."
)
_LATENT = "softmax attention over a latent (MLA)"
_NORMED = (
    "The residual is taken after the layer's norm: what passes by a zeroed mixer is the normalised input, "
    "times `full_attn_alpha_factor` or `linear_attn_alpha_factor`."
)
_POST_NORM = (
    "Attention layers normalise the mixer's output: zero stays zero there, a mean is normalised again."
)
_LOCAL = (
    "Attention is local (`attention_window_size` tokens): within a window both kinds of mixer see the same "
    "tokens, beyond it only the linear one does."
)

NATIVE_TYPES: dict[str, NativeType] = {
    "bailing_hybrid": _type(
        "BailingHybridDeltaAttention",
        "gated delta attention",
        "BailingHybridAttention",
        attention_kind=_LATENT,
    ),
    "bamba": _type("BambaMixer", _MAMBA2, "BambaAttention"),
    "falcon_h1": _type("FalconH1Mixer", _MAMBA2, "FalconH1Attention", "parallel"),
    "granitemoehybrid": _type("GraniteMoeHybridMambaLayer", _MAMBA2, "GraniteMoeHybridAttention"),
    "jamba": _type("JambaMambaMixer", _MAMBA1, "JambaAttention"),
    "kimi_linear": _type(
        "KimiLinearDeltaAttention", "Kimi delta attention", "KimiLinearAttention", attention_kind=_LATENT
    ),
    "lfm2": _type("Lfm2ShortConv", "gated short convolution", "Lfm2Attention", remark=_SHORT),
    "lfm2_moe": _type("Lfm2MoeShortConv", "gated short convolution", "Lfm2MoeAttention", remark=_SHORT),
    "minimax": _type(
        "MiniMaxLightningAttention", "lightning attention", "MiniMaxAttention", linear_returns="tuple",
        remark=_NORMED,
    ),
    "nemotron_h": _type("NemotronHMamba2Mixer", _MAMBA2, "NemotronHAttention", "single"),
    "olmo_hybrid": _type("OlmoHybridGatedDeltaNet", _DELTA, "OlmoHybridAttention", remark=_POST_NORM),
    "qwen3_5_moe_text": _type("Qwen3_5MoeGatedDeltaNet", _DELTA, "Qwen3_5MoeAttention"),
    "qwen3_5_text": _type("Qwen3_5GatedDeltaNet", _DELTA, "Qwen3_5Attention"),
    "qwen3_next": _type("Qwen3NextGatedDeltaNet", _DELTA, "Qwen3NextAttention"),
    "recurrent_gemma": _type(
        "RecurrentGemmaRecurrentBlock", "RG-LRU block", "RecurrentGemmaAttention", linear_returns="tuple",
        attention_kind="local softmax attention", remark=_LOCAL,
    ),
    "zamba": _type("ZambaMambaMixer", _MAMBA1, "ZambaAttention", "feeding"),
    "zamba2": _type("Zamba2MambaMixer", _MAMBA2, "Zamba2Attention", "feeding"),
}  # fmt: skip
"""By model type of the text part: qwen3_5 checkpoints, which bring an image encoder, are `qwen3_5_text`."""

_SOFTMAX_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def text_type(config: Any) -> str:
    """The model type of a configuration's text part."""
    return str(config.get_text_config(decoder=True).model_type)


def native_type(config: Any) -> NativeType | None:
    """The table's entry for a configuration; None where there is none, or the model is a conversion of ours.

    Raises:
        ConversionError: a hybrid, but of a type that is not in the table.
    """
    if getattr(config, "equipoise", None):
        return None
    text = config.get_text_config(decoder=True)
    found = NATIVE_TYPES.get(str(text.model_type))
    layers: list[str] = getattr(text, "layer_types", None) or []
    kinds = set(layers) - _SOFTMAX_KINDS
    if found is None and kinds:
        raise ConversionError(
            f"expected a hybrid whose mixers are known here ({supported()}), got {text.model_type!r}, with "
            f"layers of type {', '.join(sorted(kinds))}. Add its classes to NATIVE_TYPES in "
            "equipoise.audit.native_types, as docs/native-hybrids.md describes."
        )
    return found


def supported() -> str:
    """All types in the table, in one line."""
    return ", ".join(NATIVE_TYPES)
