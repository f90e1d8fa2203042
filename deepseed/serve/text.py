"""From the body of a request to what the engine gets: token ids of each prompt and how to continue them. Runs outside the event loop.

A prompt that is surely too long is refused by its characters, before the tokenizer works through megabytes of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.constrained import constrained, grammar_of
from deepseed.serve.errors import ServeError
from deepseed.serve.protocol import Asked, ChatRequest, CompletionRequest, Message, read
from deepseed.serve.served import Served
from deepseed.serve.tokens import Tokens

DEFAULT_COMPLETION = 16  # tokens, as OpenAI has it; a chat goes on to the end of the context


@dataclass(frozen=True)
class Prepared:
    asked: Asked
    prompts: list[list[int]]
    params: list[SamplingParams]  # one a prompt
    echoes: list[str]  # what each answer begins with
    grammar: str | None  # that outputs must follow, not compiled yet

    @property
    def outputs(self) -> int:
        return len(self.prompts) * self.asked.outputs


class Texts:
    """A model's tokenizer, template and limits."""

    def __init__(self, engine: Served, name: str) -> None:
        if engine.tokenizer is None:
            raise InferenceError("a server needs the model's tokenizer, and the folder has none\n  fix: tokenizer.save_pretrained(folder)")
        self.tokenizer, self.name, self.ends = engine.tokenizer, name, engine.ends
        self.vocabulary, self.longest = engine.vocabulary, engine.longest
        self.tokens = Tokens(self.tokenizer)
        widest = max(map(len, self.tokenizer.get_vocab()), default=1)
        self.most_characters = self.longest * max(widest, 16)

    def prepare(self, kind: type[Asked], body: bytes) -> Prepared:
        asked = read(kind, body)
        if asked.model != self.name:
            raise ServeError(404, f"the model {asked.model[:200]!r} does not exist; this server has {self.name!r}", param="model", code="model_not_found")
        echoes: list[str]
        if isinstance(asked, CompletionRequest):
            prompts = self._prompts(asked.prompt)
            echoes = [self.tokenizer.decode(p, skip_special_tokens=True) if asked.echo else "" for p in prompts] if not isinstance(asked.prompt, str) else [asked.prompt if asked.echo else ""]
            most = asked.max_tokens or (1 if asked.prompt_alone else DEFAULT_COMPLETION)  # a step gives a token, which then is left out
            each = [self._room(p, asked.max_tokens, most) for p in prompts]
        else:
            assert isinstance(asked, ChatRequest)
            prompts, echoes = [self._chat(asked)], [""]
            said = asked.max_completion_tokens or asked.max_tokens
            each = [self._room(prompts[0], said, said or self.longest)]
        grammar = grammar_of(asked)
        try:
            params = [asked.sampling(most, self.vocabulary) for most in each]
        except InferenceError as error:
            raise ServeError(400, str(error)) from None
        return Prepared(asked, prompts, params, echoes, grammar)

    def formed(self, prepared: Prepared) -> list[SamplingParams]:
        """Its parameters with the grammar compiled, which may take seconds."""
        assert prepared.grammar is not None
        param = "structured_outputs" if prepared.asked.structured_outputs is not None else "response_format"
        return constrained(prepared.params, prepared.grammar, self.tokenizer, self.ends, self.vocabulary, param)

    def _room(self, prompt: Sequence[int], said: int | None, most: int) -> int:
        left = self.longest - len(prompt)
        if left < 1 or (said is not None and said > left):
            wanted = f" and {said} for the output" if said is not None else ""
            raise ServeError(400, f"the model's context is {self.longest} tokens; asked for are {len(prompt)} in the prompt{wanted}", param="prompt", code="context_length_exceeded")
        return min(most, left)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self._encode(prompt, True)]
        if isinstance(prompt[0], int):
            return [self._ids(prompt)]
        return [self._encode(p, True) if isinstance(p, str) else self._ids(p) for p in prompt]

    def _ids(self, ids: list[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise ServeError(400, f"prompt: token {str(token)[:32]} is outside the vocabulary of {self.vocabulary}", param="prompt")
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        if len(text) > self.most_characters:
            raise ServeError(400, f"the model's context is {self.longest} tokens; a prompt of {len(text)} characters has more", param="prompt", code="context_length_exceeded")
        ids = [int(t) for t in self.tokenizer(text, add_special_tokens=special)["input_ids"]]
        if not ids:
            begin = self.tokenizer.bos_token_id
            if begin is None:
                raise ServeError(400, "the prompt has no tokens, and the model no token that begins a text", param="prompt")
            ids = [int(begin)]
        return ids

    def _chat(self, asked: ChatRequest) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ServeError(400, f"{self.name} has no chat template: it continues texts, it does not answer; use /v1/completions", param="messages")
        size = sum(len(m.content) if isinstance(m.content, str) else sum(len(p.text) for p in m.content or ()) for m in asked.messages)
        if size > self.most_characters:
            raise ServeError(400, f"the model's context is {self.longest} tokens; messages of {size} characters have more", param="messages", code="context_length_exceeded")
        tools = [t.model_dump(exclude_unset=True) for t in asked.tools or ()] if asked.tool_choice != "none" else []
        messages = [_message(m) for m in asked.messages]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
            ignored = bool(tools) and text == self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's: what it refuses, and what it trips over, lies in the messages
            raise ServeError(400, f"the model's chat template refuses these messages: {type(error).__name__}: {error}"[:500], param="messages") from None
        if ignored:
            raise ServeError(400, "tools: the model's chat template has no place for them, so the model would not hear of them; leave them out", param="tools", code="unsupported_parameter")
        return self._encode(text, False)


def _message(said: Message) -> dict[str, Any]:
    """As templates have it: texts joined, arguments of calls as objects."""
    out: dict[str, Any] = {"role": "system" if said.role == "developer" else said.role, "content": said.content if isinstance(said.content, str) else "".join(p.text for p in said.content or ())}
    for field in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(said, field)) is not None:
            out[field] = value
    if said.tool_calls:
        out["tool_calls"] = [{"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments)}} for c in said.tool_calls]
    return out


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
