"""Which donors convert, and why the others do not.

A family is listed once its conversion is tested: decode equal to the full forward, padding, reload, parity.
"""

from __future__ import annotations

SUPPORTED: tuple[str, ...] = (
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)

_OWN_ATTENTION = "computes attention inside its own modules and ignores transformers' attention interface"
_LATENT = (
    "uses multi-head latent attention (MLA): keys and values are one compressed latent, not k and v per head"
)
_HYBRID = "is a hybrid already: some of its layers are recurrent"

REFUSED: dict[str, str] = {
    "falcon": f"{_OWN_ATTENTION} (ALiBi and multi-query variants)",
    "bloom": f"{_OWN_ATTENTION} (ALiBi biases are added to its scores)",
    "mpt": f"{_OWN_ATTENTION} (ALiBi biases are added to its scores)",
    "gptj": _OWN_ATTENTION,
    "ctrl": _OWN_ATTENTION,
    "gpt_bigcode": f"{_OWN_ATTENTION} (multi-query attention over one shared key/value head)",
    "diffllama": "subtracts two attention maps per layer (differential attention): one hybrid is not it",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "minicpm3": _LATENT,
    "jetmoe": "routes attention heads through experts, so a layer has no fixed heads to give feature maps to",
    "gemma3": "is the vision-language model; convert its text model (gemma3_text)",
    **dict.fromkeys(
        (
            "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba",
            "mamba2",
            "minimax", "nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
        ),
        _HYBRID,
    ),
}  # fmt: skip


class ConversionError(ValueError):
    """A model that cannot be converted, or not so; the message names it, the reason and the way out."""


class ParityError(ConversionError):
    """The converted model is not the donor where it should be: the self-test failed, not the request."""


def check_family(model_type: str) -> None:
    """Raise unless donors of this type convert.

    Raises:
        ConversionError: names the type and the reason.
    """
    if model_type in SUPPORTED:
        return
    if model_type.startswith("equipoise_"):
        raise ConversionError(
            f"this model ({model_type}) is converted already; call revert(model) first to convert it "
            "otherwise."
        )
    reason = REFUSED.get(model_type)
    if reason is not None:
        raise ConversionError(f"cannot convert {model_type!r}: it {reason}.")
    raise ConversionError(
        f"cannot convert {model_type!r}: its family is not among those tested here ({', '.join(SUPPORTED)})."
    )
