"""What clients may ask: OpenAI's fields as far as they have a meaning here; the others are refused by name.

A field that would silently do nothing is worse than an error. Fields that ask for nothing (`user`,
`metadata`, …) are taken and ignored; fields with a meaning that is not offered only at their neutral value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
)

from equipoise.serve.sampling import Sampling

Token = Annotated[StrictInt, Field(ge=0)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Number = Annotated[float, Field(strict=True)]
"""A JSON number; a string of digits is none."""


NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": (
        "none",
        "auto",
    ),
    "functions": ([],),
    "function_call": (
        "none",
        "auto",
    ),
    "parallel_tool_calls": (
        True,
        False,
    ),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that may only say what is the case anyway, and what that is."""


def neutral(value: object, info: Any) -> None:
    """Refuse a field of `NEUTRAL` that asks for something; ``info`` is pydantic's ValidationInfo."""
    if value is not None and value not in NEUTRAL[str(info.field_name)]:
        raise ValueError(f"is not offered by this server (leave it out, got {value!r})")


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    """One more chunk at the end, with the tokens used."""
    include_obfuscation: StrictBool = False
    """Taken and ignored."""


class GenerationRequest(BaseModel):
    """Fields of both endpoints."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: StrictStr
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    """Not OpenAI's, but common: draw from so many tokens."""
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    _base = field_validator("frequency_penalty", "presence_penalty", "logit_bias")(neutral)

    @property
    def stops(self) -> list[str]:
        """The stop strings, however they were given."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives to report with each token; None for no report."""
        raise NotImplementedError

    def sampling(self) -> Sampling:
        """How tokens are chosen; OpenAI's defaults."""
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=self.top_k or 0, seed=self.seed, logprobs=self.logprob_count,
        )  # fmt: skip


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None

    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    _own = field_validator("best_of", "echo", "suffix")(neutral)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, as texts or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message; only text is read."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1)]
    name: StrictStr | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates expect it; `developer` is OpenAI's newer word for `system`."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """OpenAI's newer name for max_tokens."""
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    _own = field_validator(
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "parallel_tool_calls",
        "response_format",
        "modalities",
        "audio",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    )(neutral)

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


NESTED = {name for kind in (Message, TextPart, StreamOptions) for name in kind.model_fields}
"""Names of fields inside of others."""
