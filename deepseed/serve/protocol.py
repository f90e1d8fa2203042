"""What a request may say, and what it asks of the engine.

Types are strict and an unknown field is an error: one that is ignored silently would change the answer without a word. Fields that have no effect
here and none on the text elsewhere are accepted (``user`` and its like). Beside OpenAI's there are vLLM's ``top_k``, ``min_p``, ``repetition_penalty``,
``min_tokens``, ``ignore_eos``, ``stop_token_ids`` and ``structured_outputs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseed.inference.sampling import SamplingParams
from deepseed.serve.errors import ServeError

COLDEST = 0.01  # a temperature between 0 and this divides logits out of the range of floats
MOST_OUTPUTS, MOST_LOGPROBS, MOST_STOPS = 128, 20, 64


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Strict):
    """One of the four."""

    json_: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Asked(Strict):
    """What both kinds of request may say."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_OUTPUTS)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def outputs(self) -> int:
        return self.n or 1

    def check(self) -> None:
        """ServeError where fields do not go together."""

    @property
    def top(self) -> int | None:
        """Of how many most likely tokens the log-probabilities are wanted; None: of none."""
        raise NotImplementedError

    @property
    def prompt_top(self) -> int | None:
        """The same of the prompt's tokens."""
        return None

    @property
    def prompt_alone(self) -> bool:
        """No output is wanted, but what is said of the prompt."""
        return self.max_tokens == 0

    @property
    def usage_at_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, most: int, vocabulary: int) -> SamplingParams:
        """As the engine has it. ``most``: tokens of an output."""
        return SamplingParams(
            max_tokens=most, temperature=_temperature(self.temperature), top_k=max(self.top_k or 0, 0), top_p=_or(self.top_p, 1.0), min_p=self.min_p or 0.0,
            repetition_penalty=_or(self.repetition_penalty, 1.0), presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed, n=self.outputs, stop=self.stop or (), stop_token_ids=_tokens(self.stop_token_ids or (), vocabulary, "stop_token_ids"), ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0, logprobs=self.top, prompt_logprobs=self.prompt_top, logit_bias=_bias(self.logit_bias or {}, vocabulary),
        )  # fmt: skip


class CompletionRequest(Asked):
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_OUTPUTS)] | None = None
    suffix: str | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompt_top(self) -> int | None:
        return self.logprobs if self.echo else None

    def check(self) -> None:
        if self.prompt_alone and not self.echo:
            raise ServeError(400, "max_tokens: it should be greater than or equal to 1, or 0 with echo: true", param="max_tokens", code="invalid_value")
        if self.suffix:
            raise ServeError(400, "suffix: this server continues prompts, it does not fill between two texts; leave it out", param="suffix")
        if self.best_of is not None and self.best_of != self.outputs:
            raise ServeError(400, f"best_of={self.best_of} and n={self.outputs}: outputs are not ranked here; leave best_of out", param="best_of")


class Part(Strict):
    type: Literal["text"]
    text: str


class Called(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None  # these come back from an answer of OpenAI's
    audio: None = None
    function_call: None = None


class Function(Strict):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ServeError(400, f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens}: one of the two", param="max_completion_tokens")


R = TypeVar("R", bound=Asked)


def read(kind: type[R], body: bytes) -> R:
    """The request in ``body``; ServeError 400 names the first field that is wrong."""
    try:
        made = kind.model_validate_json(body)
    except ValidationError as error:
        raise _told(kind, error) from None
    if made.stream_options is not None and not made.stream:
        raise ServeError(400, "stream_options needs stream: true", param="stream_options")
    made.check()
    return made


def _told(kind: type[BaseModel], error: ValidationError) -> ServeError:
    """The first field that is wrong. Where it may have several forms each has its objection."""
    all_of = error.errors(include_url=False, include_input=False)
    found = all_of[0]
    errors = [e for e in all_of if e["loc"][:1] == found["loc"][:1]]
    words = [str(w) for w in found["loc"]]
    param = words[0] if words else None
    if found["type"] == "json_invalid":
        return ServeError(400, f"the body is no JSON: {found['msg'].removeprefix('Invalid JSON: ')}")
    if found["type"] == "extra_forbidden":
        near = get_close_matches(words[-1], list(kind.model_fields), n=1) if len(words) == 1 else []
        return ServeError(400, f"{'.'.join(words)[:200]} is unknown here{f'; did you mean {near[0]}?' if near else ''}", param=param and param[:200], code="unknown_parameter")
    if found["type"] == "missing":
        return ServeError(400, f"{'.'.join(words)} is missing", param=param, code="missing_required_parameter")
    place = ".".join(words[:1] if len(errors) > 1 else words) or "the body"
    return ServeError(400, f"{place}: {'; or '.join(dict.fromkeys(e['msg'] for e in errors[:8]))}", param=param, code="invalid_value")


def _or(said: float | None, default: float) -> float:
    return default if said is None else said


def _temperature(said: float | None) -> float:
    return 1.0 if said is None else 0.0 if said == 0 else max(said, COLDEST)


def _tokens(ids: Sequence[int], vocabulary: int, param: str) -> tuple[int, ...]:
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ServeError(400, f"{param}: token {str(token)[:32]} is outside the vocabulary of {vocabulary}", param=param)
    return tuple(ids)


def _bias(said: dict[str, float], vocabulary: int) -> dict[int, float]:
    out = dict[int, float]()
    for word, bias in said.items():
        if not (word.isascii() and word.isdecimal() and len(word) < 12):
            raise ServeError(400, f"logit_bias: {word[:32]!r} is no token id", param="logit_bias")
        out[_tokens((int(word),), vocabulary, "logit_bias")[0]] = bias if math.isfinite(bias) else 0.0
    return out
