"""Passwords and tokens in text, so that they reach no file and no message. Needs nothing of the package."""

from __future__ import annotations

import os
import re

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
"""Of the environment, whose values are secrets."""
HIDDEN = "***"
_SHORTEST = 8
"""Characters of a value that is looked for: a shorter one would be found in words."""
_FORMS = (
    re.compile(r"(?<=//)[^/\s@]+(?=@)"),  # //user:password@host
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{8,}"),
    # addresses that object stores sign
    re.compile(r"(?i)(?<=[?&])(?:token|access_token|api_key|sig|x-amz-[a-z-]+|x-goog-[a-z-]+)=[^&\s]+"),
)


def without_secrets(text: str) -> str:
    """The text with every password and token that can be told replaced by `HIDDEN`."""
    for name in VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return text


def has_secret(text: str) -> bool:
    """Whether `without_secrets` would change the text."""
    return without_secrets(text) != text
