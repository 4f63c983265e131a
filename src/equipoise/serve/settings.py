"""What the server holds to."""

from __future__ import annotations

from pydantic import ByteSize, Field

from equipoise.settings import Settings


class ServeSettings(Settings):
    """Limits of the server; sequences are prompts being read or continued, `n` of them a request."""

    context_length: int = Field(ge=2)
    """Tokens of prompt and completion together, at most, a saved state's included."""
    max_tokens: int = Field(default=4096, ge=1)
    """Tokens a completion may have, at most."""
    max_sequences: int = Field(default=64, ge=1)
    """Sequences at once, at most; fewer where --state-memory does not hold them."""
    state_memory: ByteSize = Field(default=ByteSize(2 << 30), gt=0)
    """Bytes that the states of all sequences may take together."""
    queue_size: int = Field(default=256, ge=0)
    """Requests that may wait for a place; one more is answered 429."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds from acceptance to the last token; then the request fails with 504."""
    shutdown_timeout: float = Field(default=30.0, ge=0)
    """Seconds that accepted requests have to finish after a signal; then they fail with 503."""
    prefill_chunk: int = Field(default=512, ge=1)
    """Prompt tokens read between two steps of decoding."""
    max_body: ByteSize = Field(default=ByteSize(8 << 20), gt=0)
    """Bytes a request may have."""
