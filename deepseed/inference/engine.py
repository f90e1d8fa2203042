"""``Engine``: many requests, one compiled step.

    engine = Engine("path/to/model")                          # or a model of transformers
    for done in engine.generate(["The capital of France is", "1 + 1 ="], SamplingParams(max_tokens=32)):
        print(done.text)

A request goes in by ``add``; each ``step`` computes one packed step of whoever is there and returns what is new; ``cancel`` ends one. ``generate`` is the
loop over ``step``; ``deepseed.inference.stream`` runs it in a thread. A request of ``n`` outputs computes its prompt once. Neither ``add`` nor ``cancel``
waits for a step under way: it sees them when it is done.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import Lock
from time import monotonic
from typing import Any

import torch
from torch import nn

from deepseed.inference import gpu
from deepseed.inference.blocks import BlockPool
from deepseed.inference.capture import Layer, look
from deepseed.inference.detokenize import TextOf
from deepseed.inference.errors import InferenceError
from deepseed.inference.executable import Executable
from deepseed.inference.lookup import Lookup
from deepseed.inference.model import loaded, room
from deepseed.inference.outputs import Completion, Counts, Output, Update
from deepseed.inference.prompts import Prompt, ids_of, several
from deepseed.inference.quantize import Report
from deepseed.inference.sampling import Drawn, Follower, Row, SamplingParams, asked_for, fresh_seed, sample, scored
from deepseed.inference.scheduler import Piece, Running, Scheduler
from deepseed.ir.amounts import parse_bytes
from deepseed.plan import parse_plan

CODEGENS = ("auto", "cpp", "python", "triton")


@dataclass(eq=False)
class _Branch:
    """One output while it runs."""

    request: _Request
    output: Output
    sequence: Running
    seed: int
    text: TextOf | None
    lookup: Lookup = field(default_factory=Lookup)
    follower: Follower | None = None


@dataclass(eq=False)
class _Request:
    completion: Completion
    params: SamplingParams
    ends: frozenset[int]
    followers: list[Follower]
    branches: list[_Branch] = field(default_factory=list)
    ended: bool = False


class Engine:
    """``model``: a causal language model of transformers, or the folder of one. ``cache``: bytes for keys and values ("2GiB"). A step computes at most
    ``budget`` tokens of ``sequences`` sequences, of one prompt at most ``chunk``. ``prefix``: equal beginnings of prompts are computed once. ``weights``: a checkpoint of a training,
    under any plan, whose values a copy of the model takes. ``codegen``: "cpp" runs the program as C++, "python" as readable Python, "triton" as Triton kernels,
    attention and its pages too; "auto" is the first on a CPU with a compiler, else the second.
    ``speculative="lookup"``: up to ``draft`` tokens that followed the same words before are tried beside the next one; no output changes by it.
    ``quantize``: "int8" or "fp8", the matrices of products in eight bits; ``quantized`` says what that lost."""

    def __init__(
        self, model: nn.Module | str | os.PathLike[str], plan: str = "tp1", dtype: str | torch.dtype | None = None, *, tokenizer: Any = None,
        cache: int | str | None = None, block: int = 16, budget: int = 512, sequences: int = 64, chunk: int | None = None, prefix: bool = True,
        max_length: int | None = None, device: str | torch.device | None = None, codegen: str = "auto", weights: str | os.PathLike[str] | None = None,
        speculative: str | None = None, draft: int = 8, quantize: str | None = None,
    ) -> None:  # fmt: skip
        if speculative not in (None, "lookup") or draft < 1:
            raise InferenceError(f"speculative={speculative!r}, draft={draft}\n  fix: speculative='lookup' and a draft of at least 1 token, or speculative=None")
        for name, value in (("block", block), ("budget", budget), ("sequences", sequences), ("chunk", chunk), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InferenceError(f"{name}={value}\n  fix: at least 1{', or None' if name in ('chunk', 'max_length') else ''}")
        if codegen not in CODEGENS:
            raise InferenceError(f"codegen={codegen!r} is none of a step's\n  fix: one of {', '.join(CODEGENS)}")
        ranks, memory = _ranks(plan), None if cache is None else _bytes(cache)
        if codegen == "triton" and quantize is not None:
            raise InferenceError(f"quantize={quantize!r} with codegen='triton': weights in eight bits have no emitted kernel\n  fix: codegen='auto', or no quantize")
        found = loaded(model, dtype, tokenizer, device, split=ranks > 1, weights=weights)
        if codegen == "triton" and found.dtype not in gpu.DTYPES:
            raise InferenceError(f"a model in {found.dtype} with codegen='triton': no emitted kernel of attention\n  fix: dtype='float32' or 'bfloat16', or another codegen")
        self.model, self.tokenizer = found.model, found.tokenizer
        config: Any = found.model.config
        self.config: Any = config
        looked = look(found.model)
        if max_length is not None and max_length > found.longest:
            raise InferenceError(f"max_length={max_length}, but the model has {found.longest} positions\n  fix: at most {found.longest}, or a config with more where its positions are computed")
        self.max_length: int = max_length or found.longest
        a_block = block * bytes_of_token(looked.layers, found.dtype)
        blocks = room(memory, a_block, -(-self.max_length // block) * sequences)
        if blocks < 1:
            raise InferenceError(f"cache={cache} has room for no block of {block} tokens, {a_block} bytes\n  fix: cache={a_block * 64} or more")
        self.plan = parse_plan(plan)
        self.executable = Executable(found.model, looked, plan, blocks, block, weights=found.weights, checkpoint=found.checkpoint, codegen=codegen, quantize=quantize, own=found.own)
        self.quantized: Report | None = self.executable.quantized
        self.scheduler = Scheduler(BlockPool(blocks, block), budget, sequences, chunk, prefix)
        self.ends = _ends(found.model)
        self.vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0))
        self.drafts = draft if speculative else 0  # tokens of a draft
        self.counts = Counts()
        self._requests: dict[str, _Request] = {}
        self._of: dict[Running, _Branch] = {}
        self._names = count(1)
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = Lock()  # held by a step from its beginning to its end
        self.notify: Callable[[], None] = lambda: None  # called when there may be something to compute

    # requests ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, **asked: Any) -> list[Completion]:
        """Complete all prompts (texts or token ids, see deepseed.inference.prompts), in their order. ``asked`` are fields of SamplingParams."""
        many = several(prompts)
        each = [params or asked_for(asked)] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
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
                done.append(self.request(prompt, one))
                names.append(done[-1].request)
            while not all(c.finished for c in done):
                self.step()
        finally:
            for name in names:
                self.cancel(name)
        return done

    def add(self, prompt: Prompt, params: SamplingParams | None = None, request: str | None = None) -> str:
        """A new request, by its name. Raises InferenceError where it can never be served."""
        return self.request(prompt, params, request).request

    def request(self, prompt: Prompt, params: SamplingParams | None = None, request: str | None = None) -> Completion:
        """``add``, with what grows as the steps go on."""
        params = params or SamplingParams()
        text, ids = self._tokens(prompt)
        if params.stops and self.tokenizer is None:
            raise InferenceError("stop strings need a tokenizer, and the model has none\n  fix: Engine(..., tokenizer=), or stop_token_ids")
        outside = [t for t in (*params.stop_token_ids, *(params.logit_bias or {})) if not 0 <= t < (self.vocabulary or t + 1)]
        if outside:
            raise InferenceError(f"token {outside[0]} of stop_token_ids or logit_bias is outside the vocabulary of {self.vocabulary}\n  fix: ids from 0 to {self.vocabulary - 1}")
        if len(ids) >= self.max_length:
            raise InferenceError(f"a prompt of {len(ids)} tokens leaves no room in {self.max_length}\n  fix: a shorter prompt, or Engine(max_length=) where the model's positions allow it")
        most = min(len(ids) + params.max_tokens, self.max_length)
        self.scheduler.check(ids, most)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.ends)
        followers = [params.form.follow(self.tokenizer, self.ends, self.vocabulary) for _ in range(params.n)] if params.form is not None else []
        made = _Request(Completion(request or f"request-{next(self._names)}", text, ids, [Output(i) for i in range(params.n)]), params, ends, followers)
        if params.prompt_logprobs is not None:
            made.completion.prompt_logprobs.append(Drawn(ids[0]))
        name = made.completion.request
        if self._requests.setdefault(name, made) is not made:
            raise InferenceError(f"a request is called {name!r} already\n  fix: another name, or none")
        self._do(lambda: self._begin(made, most))
        return made.completion

    def cancel(self, request: str) -> None:
        """The request leaves, its blocks come back; what it has so far stays in its Completion. Nothing happens where it has ended."""
        found = self._requests.pop(request, None)
        if found is not None:
            self._do(lambda: self._end(found))

    def step(self) -> list[Update]:
        """Compute one step; what is new, in the order of the step."""
        with self._lock:
            self._read()
            out = self._step()
        self._read_if_free()
        return out

    @property
    def idle(self) -> bool:
        return not self._inbox and self.scheduler.idle

    def usage(self) -> Mapping[str, float]:
        """Sequences that run and wait, the share of the cache that is held, preemptions so far."""
        return self.scheduler.usage()

    @property
    def longest(self) -> int:
        """Tokens of prompt and output together, at most."""
        return min(self.max_length, self.scheduler.pool.count * self.scheduler.pool.size)

    @property
    def sequences(self) -> int:
        """Of one step, at most."""
        return self.scheduler.sequences

    @property
    def room(self) -> str:
        return f"{self.scheduler.pool.count} blocks of {self.scheduler.pool.size} tokens"

    def beat(self) -> None:
        """To be called now and then while nothing is asked for: other ranks wait for a step, and not for ever."""
        self.executable.beat()

    @property
    def steps(self) -> int:
        return self.counts.steps

    @property
    def computed_tokens(self) -> int:
        return self.counts.computed_tokens

    # helpers ----------------------------------------------------------------------------------------------------------

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InferenceError("a prompt is a text, and the model has no tokenizer\n  fix: token ids, or Engine(..., tokenizer=)")
            return prompt, [int(t) for t in self.tokenizer(prompt)["input_ids"]]
        return None, ids_of(prompt, self.vocabulary)

    def _step(self) -> list[Update]:
        step = self.scheduler.schedule(self._draft if self.drafts else None)
        if not step.pieces:
            return []
        now = monotonic()
        for piece in step.pieces:
            if (completion := self._of[piece.sequence].request.completion).scheduled is None:
                completion.scheduled = now
        logits = self.executable.run(step)
        self.counts.steps += 1
        self.counts.computed_tokens += step.tokens
        self.scheduler.computed(step)
        self._read()
        turns, wanted, rows, at, lost = list[tuple[_Branch, Piece]](), list[Row](), list[int](), 0, list[Update]()
        for piece in step.pieces:
            own = self._of.get(piece.sequence)
            at += piece.wanted
            if own is None:
                continue  # cancelled while the step ran
            if piece.wanted > piece.draws:
                self._score(own.request, logits[at - piece.wanted : at], piece)
            for branch in self._continuing(own) if piece.draws else ():
                try:
                    wanted += [self._row(branch, piece.draft[:n]) for n in range(piece.draws)]
                except InferenceError as error:
                    lost.append(self._lose(branch, str(error)))
                    continue
                turns.append((branch, piece))
                rows.extend(range(at - piece.draws, at))
        if not turns:
            return lost
        if rows != list(range(logits.shape[0])):
            logits = logits[rows]
        drawn = iter(sample(logits, wanted))
        return lost + [self._take(b, p, [next(drawn) for _ in range(p.draws)]) for b, p in turns]

    def _do(self, what: Callable[[], None]) -> None:
        """Now, or where a step is under way, by that step."""
        self._inbox.append(what)
        self.notify()
        self._read_if_free()

    def _read_if_free(self) -> None:
        if self._inbox and self._lock.acquire(blocking=False):
            try:
                self._read()
            finally:
                self._lock.release()

    def _read(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _begin(self, request: _Request, most: int) -> None:
        params, completion = request.params, request.completion
        if not request.ended:
            sequence = self.scheduler.add(completion.prompt_token_ids, most, params.n - 1, params.prompt_logprobs is not None)
            self._branch(request, 0, sequence, fresh_seed() if params.seed is None else params.seed)

    def _end(self, request: _Request) -> None:
        request.ended = True
        for branch in request.branches:
            self.scheduler.finish(branch.sequence)
            self._of.pop(branch.sequence, None)
        for output in request.completion.outputs:
            output.finish_reason = output.finish_reason or "cancelled"

    def _branch(self, request: _Request, index: int, sequence: Running, seed: int) -> _Branch:
        text = TextOf(self.tokenizer, request.completion.prompt_token_ids, request.params.stops) if self.tokenizer is not None else None
        made = _Branch(request, request.completion.outputs[index], sequence, (seed + index * 0xD1B54A32D192ED03) & ((1 << 64) - 1), text)
        if request.followers:
            made.follower = request.followers[index]
        request.branches.append(made)
        self._of[sequence] = made
        return made

    def _continuing(self, own: _Branch) -> list[_Branch]:
        """The branches that take a token from a sequence's logits: its own, and those that begin here."""
        if own.output.index == 0 and not own.output.token_ids:
            own.request.completion.cached_tokens = own.sequence.reused
        out = [own]
        while own.sequence.forks:
            out.append(self._branch(own.request, len(own.request.branches), self.scheduler.fork(own.sequence), own.seed))
        return out

    def _draft(self, sequence: Running, most: int) -> Sequence[int]:
        return self._of[sequence].lookup.draft(sequence.tokens, min(most, self.drafts))

    def _score(self, request: _Request, logits: torch.Tensor, piece: Piece) -> None:
        """Log-probabilities of the prompt's tokens that follow those of the piece."""
        prompt, found = request.completion.prompt_token_ids, request.completion.prompt_logprobs
        first = piece.begin + piece.count - piece.wanted + 1
        said = prompt[first : first + piece.wanted]
        found += scored(logits[: len(said)], said, [request.params.prompt_logprobs] * len(said))

    def _row(self, branch: _Branch, draft: Sequence[int]) -> Row:
        """How the token after the output, and after ``draft``, is wanted."""
        params, output = branch.request.params, [*branch.output.token_ids, *draft] if draft else branch.output.token_ids
        early = len(output) < params.min_tokens
        allowed = branch.follower.allowed(output) if branch.follower is not None else None
        return Row(params, branch.seed, branch.request.completion.prompt_token_ids, output, tuple(branch.request.ends) if early else (), allowed)

    def _take(self, branch: _Branch, piece: Piece, drawn: Sequence[Drawn]) -> Update:
        """Tokens as far as the draft before them was right, and no further than the end."""
        request, output = branch.request, branch.output
        right = next((n for n, said in enumerate(piece.draft) if said != drawn[n].token), len(piece.draft))
        taken, text = list[Drawn](), ""
        for each in drawn[: right + 1]:
            taken.append(each)
            text += self._add(branch, each.token)
            if output.finish_reason is not None:
                break
        if piece.draft:
            self.scheduler.accept(branch.sequence, right)
            self.counts.drafts += 1
            self.counts.drafted_tokens += len(piece.draft)
            self.counts.accepted_tokens += len(taken) - 1
        if output.finish_reason is not None:
            text += branch.text.end() if branch.text is not None else ""
            del self._of[branch.sequence]
            if request.completion.finished and self._requests.get(request.completion.request) is request:
                self._requests.pop(request.completion.request, None)
        if branch.text is not None:
            output.text = branch.text.text
        logprobs = tuple(taken) if request.params.logprobs is not None else ()
        output.logprobs += logprobs
        return Update(request.completion.request, output.index, tuple(d.token for d in taken), text, output.finish_reason, logprobs)

    def _lose(self, branch: _Branch, why: str) -> Update:
        """Its form cannot say what comes next."""
        request, output = branch.request, branch.output
        output.finish_reason = "error"
        self.scheduler.finish(branch.sequence)
        del self._of[branch.sequence]
        if request.completion.finished and self._requests.get(request.completion.request) is request:
            self._requests.pop(request.completion.request, None)
        return Update(request.completion.request, output.index, (), "", "error", error=why, refused=True)

    def _add(self, branch: _Branch, token: int) -> str:
        """One more token of the output; the text that it adds."""
        request, output, piece = branch.request, branch.output, ""
        ended = token in request.ends
        output.token_ids.append(token)
        if branch.text is not None and not ended:
            piece = branch.text.add(token, len(output.token_ids) >= request.params.min_tokens)
            ended = branch.text.stopped
        if ended:
            output.finish_reason = "stop"
            self.scheduler.finish(branch.sequence)
        elif not self.scheduler.append(branch.sequence, token):
            output.finish_reason = "length"
        return piece


def bytes_of_token(layers: Sequence[Layer], dtype: torch.dtype) -> int:
    """Of keys and values, in all layers."""
    return sum(la.heads * (la.width + la.value_width) for la in layers) * dtype.itemsize


def _bytes(cache: int | str) -> int:
    try:
        return parse_bytes(str(cache))
    except ValueError as error:
        raise InferenceError(f"cache={cache!r}: {error}\n  fix: cache='2GiB', or None for as much as the sequences can use") from error


def _ends(model: nn.Module) -> frozenset[int]:
    """Tokens after which the model has said all, from its generation config or its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(int(t) for t in (found if isinstance(found, list | tuple) else [found]))
    return frozenset()


def _ranks(plan: str) -> int:
    """Raises InferenceError where the plan has an axis that inference does not have."""
    parsed = parse_plan(plan)
    mesh = parsed.mesh(None)
    other = {axis: n for axis, n in mesh.sizes.items() if axis != "tp"}
    if other:
        split = [f"zero{parsed.zero}" if axis == "dp" and parsed.dp is None and parsed.zero is not None else f"{axis}{n}" for axis, n in other.items()]
        raise InferenceError(f"plan {plan!r} splits over {', '.join(split)}; inference splits over tp alone\n  fix: a plan such as tp2")
    return mesh.ranks
