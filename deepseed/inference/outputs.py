"""What a request has become so far, and what a step added."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepseed.inference.sampling import Drawn


@dataclass
class Output:
    """One continuation, growing. ``finish_reason``: "stop", "length", "cancelled", "error" (its form cannot be followed on), or None while it runs."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Drawn] = field(default_factory=list)


@dataclass
class Completion:
    """A request with its outputs. ``text``, ``token_ids`` and ``finish_reason`` are the first output's."""

    request: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Output]
    cached_tokens: int = 0
    scheduled: float | None = None  # by ``time.monotonic``: when its first step began
    prompt_logprobs: list[Drawn] = field(default_factory=list)  # where asked for; the first token has none

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)


@dataclass(frozen=True)
class Update:
    """What a step gave one output of one request."""

    request: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    logprobs: tuple[Drawn, ...] = ()
    error: str = ""  # why the request ended before its time
    refused: bool = False  # by a fault of the request's own


@dataclass
class Counts:
    """What an engine has done so far."""

    steps: int = 0
    computed_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
