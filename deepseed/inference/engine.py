"""``Engine``: many requests, one compiled step.

    engine = Engine("path/to/model")                          # or a model of transformers
    for done in engine.generate(["The capital of France is", "1 + 1 ="], SamplingParams(max_tokens=32)):
        print(done.text)

A request goes in by ``add``; each ``step`` computes one packed step of whoever is there and returns what is new; ``cancel`` ends one. ``generate`` is the
loop over ``step``; ``deepseed.inference.stream`` runs it in a thread. A request of ``n`` outputs computes its prompt once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deepseed.inference import native
from deepseed.inference.blocks import BlockPool
from deepseed.inference.capture import Layer, capture, look
from deepseed.inference.detokenize import TextOf
from deepseed.inference.errors import InferenceError
from deepseed.inference.executable import Executable
from deepseed.inference.model import loaded, room
from deepseed.inference.sampling import Drawn, Row, SamplingParams, fresh_seed, sample
from deepseed.inference.scheduler import Running, Scheduler
from deepseed.ir.amounts import parse_bytes
from deepseed.plan import parse_plan

if TYPE_CHECKING:
    from deepseed.inference.split import SplitExecutable

Prompt = str | Sequence[int]


@dataclass
class Output:
    """One continuation, growing. ``finish_reason``: "stop", "length", "cancelled", or None while it runs."""

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


@dataclass(eq=False)
class _Branch:
    """One output while it runs."""

    request: _Request
    output: Output
    sequence: Running
    seed: int
    text: TextOf | None


@dataclass(eq=False)
class _Request:
    completion: Completion
    params: SamplingParams
    ends: frozenset[int]
    branches: list[_Branch] = field(default_factory=list)


class Engine:
    """``model``: a causal language model of transformers, or the folder of one. ``cache``: bytes for keys and values ("2GiB"). A step computes at most
    ``budget`` tokens of ``sequences`` sequences, of one prompt at most ``chunk``. ``prefix``: equal beginnings of prompts are computed once. ``weights``: a checkpoint of a training,
    under any plan, whose values the model takes. ``codegen``: "python" runs the captured graph as it is, "auto" in C++ where there is a compiler."""

    def __init__(
        self, model: nn.Module | str | os.PathLike[str], plan: str = "tp1", dtype: str | torch.dtype | None = None, *, tokenizer: Any = None,
        cache: int | str | None = None, block: int = 16, budget: int = 512, sequences: int = 64, chunk: int | None = None, prefix: bool = True,
        max_length: int | None = None, device: str | torch.device | None = None, codegen: str = "auto", weights: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        if block < 1:
            raise InferenceError(f"block={block}\n  fix: at least 1 token a block, such as 16")
        ranks = _ranks(plan)
        found = loaded(model, dtype, tokenizer, device, split=ranks > 1, weights=weights)
        self.model, self.tokenizer = found.model, found.tokenizer
        self.config: Any = found.model.config
        layers = look(found.model)
        if max_length is not None and max_length > found.longest:
            raise InferenceError(f"max_length={max_length}, but the model has {found.longest} positions\n  fix: at most {found.longest}, or a config with more where its positions are computed")
        self.max_length: int = max_length or found.longest
        a_block = block * bytes_of_token(layers, found.dtype)
        blocks = room(parse_bytes(str(cache)) if cache is not None else None, a_block, -(-self.max_length // block) * sequences)
        if blocks < 1:
            raise InferenceError(f"cache={cache} has room for no block of {block} tokens, {a_block} bytes\n  fix: cache={a_block * 64} or more")
        self.plan = parse_plan(plan)
        self.executable: Executable | SplitExecutable
        if ranks == 1 and (codegen == "python" or found.device.type != "cpu" or native.load() is None):
            self.executable = Executable(capture(found.model), found.state, blocks, block, found.dtype, found.device, own=found.own)
        else:
            from deepseed.inference.split import SplitExecutable

            self.executable = SplitExecutable(found.model, plan, blocks, block, weights=found.weights, checkpoint=found.checkpoint, codegen=codegen)
        self.scheduler = Scheduler(BlockPool(blocks, block), budget, sequences, chunk, prefix)
        self.ends = _ends(found.model)
        self._requests: dict[str, _Request] = {}
        self._of: dict[Running, _Branch] = {}
        self._count = 0
        self._lock = RLock()
        self.steps = 0
        self.computed_tokens = 0

    # requests ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, **asked: Any) -> list[Completion]:
        """Complete all prompts (texts or lists of token ids), in their order. ``asked`` are fields of SamplingParams."""
        many: list[Prompt] = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else list(prompts)  # type: ignore[list-item,arg-type]
        each = [params or SamplingParams(**asked)] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if asked and params is not None:
            raise InferenceError(f"params and also {', '.join(asked)}\n  fix: one of the two")
        if len(each) != len(many):
            raise InferenceError(f"{len(many)} prompts, but {len(each)} params\n  fix: one for all, or one each")
        with self.executable.together():
            if not self.executable.leads:
                self.executable.follow()
                return self.executable.everyone([])
            done = self._complete(many, each)
            self.executable.release()
            return self.executable.everyone(done)

    def _complete(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Completion]:
        names: list[str] = []
        done: list[Completion] = []
        try:
            for prompt, one in zip(prompts, params, strict=True):
                names.append(self.add(prompt, one))
                done.append(self._requests[names[-1]].completion)
            while not all(c.finished for c in done):
                self.step()
        finally:
            for name in names:
                self.cancel(name)
        return done

    def add(self, prompt: Prompt, params: SamplingParams | None = None, request: str | None = None) -> str:
        """A new request, by its name. Raises InferenceError where it can never be served."""
        params = params or SamplingParams()
        with self._lock:
            self._count += 1
            name = request or f"request-{self._count}"
            if name in self._requests:
                raise InferenceError(f"a request is called {name!r} already\n  fix: another name, or none")
            text, ids = self._tokens(prompt)
            if params.stops and self.tokenizer is None:
                raise InferenceError("stop strings need a tokenizer, and the model has none\n  fix: Engine(..., tokenizer=), or stop_token_ids")
            if len(ids) >= self.max_length:
                raise InferenceError(f"a prompt of {len(ids)} tokens leaves no room in {self.max_length}\n  fix: a shorter prompt, or Engine(max_length=) where the model's positions allow it")
            most = min(len(ids) + params.max_tokens, self.max_length)
            sequence = self.scheduler.add(ids, most, params.n - 1)
            ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.ends)
            made = _Request(Completion(name, text, ids, [Output(i) for i in range(params.n)]), params, ends)
            seed = fresh_seed() if params.seed is None else params.seed
            self._requests[name] = made
            self._branch(made, 0, sequence, seed)
            return name

    def cancel(self, request: str) -> None:
        """The request leaves, its blocks come back; what it has so far stays in its Completion. Nothing happens where it has ended."""
        with self._lock:
            found = self._requests.pop(request, None)
            if found is None:
                return
            for branch in found.branches:
                self.scheduler.finish(branch.sequence)
                self._of.pop(branch.sequence, None)
            for output in found.completion.outputs:
                output.finish_reason = output.finish_reason or "cancelled"

    def step(self) -> list[Update]:
        """Compute one step; what is new, in the order of the step."""
        with self._lock:
            step = self.scheduler.schedule()
        if not step.pieces:
            return []
        logits = self.executable.run(step)
        with self._lock:
            self.steps += 1
            self.computed_tokens += step.tokens
            self.scheduler.computed(step)
            branches, rows = list[_Branch](), list[int]()
            for row, piece in enumerate(p for p in step.pieces if p.wanted):
                for branch in self._continuing(piece.sequence):
                    branches.append(branch)
                    rows.append(row)
            if not branches:
                return []
            if rows != list(range(logits.shape[0])):
                logits = logits[rows]
            drawn = sample(logits, [self._row(b) for b in branches])
            return [self._take(b, d) for b, d in zip(branches, drawn, strict=True)]

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    # helpers ----------------------------------------------------------------------------------------------------------

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InferenceError("a prompt is a text, and the model has no tokenizer\n  fix: token ids, or Engine(..., tokenizer=)")
            return prompt, [int(t) for t in self.tokenizer(prompt)["input_ids"]]
        ids = [int(t) for t in prompt]
        size = int(getattr(self.config.get_text_config(), "vocab_size", 0)) or None
        wrong = [t for t in ids if t < 0 or (size and t >= size)]
        if wrong:
            raise InferenceError(f"token {wrong[0]} is outside the vocabulary of {size}")
        return None, ids

    def _branch(self, request: _Request, index: int, sequence: Running, seed: int) -> _Branch:
        text = TextOf(self.tokenizer, request.completion.prompt_token_ids, request.params.stops) if self.tokenizer is not None else None
        made = _Branch(request, request.completion.outputs[index], sequence, (seed + index * 0xD1B54A32D192ED03) & ((1 << 64) - 1), text)
        request.branches.append(made)
        self._of[sequence] = made
        return made

    def _continuing(self, sequence: Running) -> list[_Branch]:
        """The branches that take a token from the sequence's logits: its own, and those that begin here."""
        own = self._of.get(sequence)
        if own is None:
            return []  # cancelled while the step ran
        if own.output.index == 0 and not own.output.token_ids:
            own.request.completion.cached_tokens = sequence.reused
        out = [own]
        while sequence.forks:
            out.append(self._branch(own.request, len(own.request.branches), self.scheduler.fork(sequence), own.seed))
        return out

    def _row(self, branch: _Branch) -> Row:
        output, params = branch.output.token_ids, branch.request.params
        early = len(output) < params.min_tokens
        return Row(params, branch.seed, branch.request.completion.prompt_token_ids, output, tuple(branch.request.ends) if early else ())

    def _take(self, branch: _Branch, drawn: Drawn) -> Update:
        request, output, token = branch.request, branch.output, drawn.token
        ended = token in request.ends
        piece = ""
        output.token_ids.append(token)
        if request.params.logprobs is not None:
            output.logprobs.append(drawn)
        if branch.text is not None and not ended:
            piece = branch.text.add(token)
            ended = branch.text.stopped and len(output.token_ids) >= request.params.min_tokens
        if ended:
            output.finish_reason = "stop"
            self.scheduler.finish(branch.sequence)
        elif not self.scheduler.append(branch.sequence, token):
            output.finish_reason = "length"
        if output.finish_reason is not None:
            if branch.text is not None:
                piece += branch.text.end()
            del self._of[branch.sequence]
            if request.completion.finished:
                del self._requests[request.completion.request]
        if branch.text is not None:
            output.text = branch.text.text
        return Update(request.completion.request, output.index, (token,), piece, output.finish_reason, (drawn,) if request.params.logprobs is not None else ())


def bytes_of_token(layers: Sequence[Layer], dtype: torch.dtype) -> int:
    """Of keys and values, in all layers."""
    return sum(la.heads * (la.width + la.value_width) for la in layers) * dtype.itemsize


def _ends(model: nn.Module) -> frozenset[int]:
    """Tokens after which the model has said all, from its generation config or its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(int(t) for t in (found if isinstance(found, list | tuple) else [found]))
    return frozenset()


def _ranks(plan: str) -> int:
    """Raises InferenceError where the plan has an axis that inference does not have."""
    mesh = parse_plan(plan).mesh(None)
    other = {axis: n for axis, n in mesh.sizes.items() if axis != "tp"}
    if other:
        raise InferenceError(f"plan {plan!r} splits over {', '.join(f'{a}{n}' for a, n in other.items())}; inference splits over tp alone\n  fix: a plan such as tp2")
    return mesh.ranks
