"""OpenAI's objects: an answer as a whole, or as the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from deepseed.inference.outputs import Output
from deepseed.inference.sampling import Drawn
from deepseed.serve.tokens import Place, Tokens


class Answer:
    """The common part. ``choices`` are made by the two kinds below."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, tokens: Tokens, logprobs: bool) -> None:
        self.tokens, self.logprobs = tokens, logprobs
        self.head: dict[str, Any] = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.whole_object, "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_object, "choices": list(choices), **more}

    def choice(self, index: int, output: Output, echo: str, prompt: Sequence[Drawn]) -> dict[str, Any]:
        """``prompt``: its tokens, where their log-probabilities are wanted."""
        raise NotImplementedError

    def first(self, index: int, echo: str, prompt: Sequence[Drawn]) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token."""
        raise NotImplementedError

    def piece(self, index: int, text: str, drawn: Sequence[Drawn], finish_reason: str | None) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokens: Tokens, logprobs: bool) -> None:
        super().__init__(model, tokens, logprobs)
        self._places: dict[int, Place] = {}  # of each choice

    def choice(self, index: int, output: Output, echo: str, prompt: Sequence[Drawn]) -> dict[str, Any]:
        self._places[index] = Place(self.tokens, 0 if prompt else len(echo), echo)
        return self.piece(index, echo + output.text, [*prompt, *output.logprobs], output.finish_reason)

    def first(self, index: int, echo: str, prompt: Sequence[Drawn]) -> dict[str, Any] | None:
        self._places[index] = Place(self.tokens, 0 if prompt else len(echo), echo)
        return self.piece(index, echo, prompt, None) if echo else None

    def piece(self, index: int, text: str, drawn: Sequence[Drawn], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, drawn) if self.logprobs else None, "finish_reason": finish_reason}

    def _logprobs(self, index: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        place = self._places.setdefault(index, Place(self.tokens))
        tokens, offsets = [self.tokens.text(d.token) for d in drawn], [place.add(d.token) for d in drawn]
        return {"tokens": tokens, "token_logprobs": [_finite(d.logprob) for d in drawn], "top_logprobs": [self._top(d) for d in drawn], "text_offset": offsets}

    def _top(self, drawn: Drawn) -> dict[str, float | None] | None:
        """Of tokens that read alike the likeliest."""
        if drawn.logprob is None:
            return None
        out = dict[str, float | None]()
        for token, logprob in ((drawn.token, drawn.logprob), *drawn.top):
            out.setdefault(self.tokens.text(token), _finite(logprob))
        return out


class ChatAnswer(Answer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, output: Output, echo: str, prompt: Sequence[Drawn]) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(output.logprobs), "finish_reason": output.finish_reason}

    def first(self, index: int, echo: str, prompt: Sequence[Drawn]) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, drawn: Sequence[Drawn], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text} if text or not finish_reason else {}, "logprobs": self._logprobs(drawn), "finish_reason": finish_reason}

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [{**self._one(d.token, d.logprob), "top_logprobs": [self._one(t, p) for t, p in d.top]} for d in drawn], "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.tokens.text(token), "logprob": _finite(logprob), "bytes": list(self.tokens.raw(token))}


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; this is what vLLM says in its place."""
    return None if logprob is None else max(-9999.0, logprob)


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, "prompt_tokens_details": {"cached_tokens": cached}}
