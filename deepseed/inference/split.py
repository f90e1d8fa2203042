"""The packed step as a Program: DeepSeed's own passes place it, so that a plan such as ``tp2`` splits heads, weights and vocabulary with no line about them.

The forward is captured as any other (``deepseed.capture``), with attention as the op ``paged_attention``, whose rule leaves kv heads and their group free. Programs
have static shapes; a step has any number of tokens, T, of which it wants any number of logits, L. So it is compiled for two primes that divide no number of the captured
program, and no axis may split rows. A number of a rank's source that is a multiple of one of them is then one of tokens, ``T * n``, or of wanted rows, ``L * n``: one
source for all sizes. A rank's caches have the kv heads that arrive there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepseed.api import Module
from deepseed.capture import capture
from deepseed.inference.attention import Packing, attend
from deepseed.inference.capture import PAGELESS, PackedStep, Recorder, complete, hooked, look
from deepseed.inference.errors import InferenceError
from deepseed.inference.packing import Packed, Plain, pack
from deepseed.inference.scheduler import Step
from deepseed.programs import Found
from deepseed.runtime.executable import Executable as Source

T = TypeVar("T")
BEAT = "beat"  # in the place of a step: there is none, wait on
TRIED = (11, 7)  # tokens and wanted rows of the capture that is looked through for numbers
FIRST = 503  # of the primes that stand for them
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")


class SplitExecutable:
    """A step on the ranks of a plan, those that this process hosts."""

    def __init__(self, model: nn.Module, plan: str, blocks: int, size: int, backend: str | None = None, weights: Any = None) -> None:
        self.size, self.layers = size, look(model)
        self._step = Module(model, plan, backend=backend, weights=weights, quiet=True)
        with packed(model):
            sizes = stand_ins(str(capture(model, example(*TRIED), want="forward").program))
            self._found = self._step._find(example(*sizes), "forward")
        built = self._found.built
        self._given: list[list[Tensor]] = []
        self.device = self._step.host.device
        self._sources = [Source(any_size(e.source, sizes), f"{built.program.name}-packed", e.inputs, e.outputs) for e in built.executables]
        self.ranks = [Pages(blocks, size, self.device) for _ in self._sources]
        complete(model, sum(op.target == "paged_attention" for op in built.program.ops), len(self.layers))

    @property
    def program(self) -> Any:
        """As all ranks share it, with primes for the numbers of tokens and wanted rows."""
        return self._found.built.program

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.ranks)

    def run(self, step: Step) -> Tensor:
        """Logits [wanted pieces, vocabulary], whole; each rank's caches then hold the step's tokens. Ranks that ``follow`` run it too."""
        plain = Plain.of(step, self.size)
        if self._real:
            self._step.host.decide(plain.text)
        return self._run(plain)

    @torch.no_grad()
    def _run(self, plain: Plain) -> Tensor:
        made = pack(plain, self.size, self.device)
        batch = {"ids": made.ids, "positions": made.positions, "last": made.last}
        if not self._given:  # stored tensors and constants, which stay
            self._given = self._step._given(Found(self._found.built, {k: batch[k] for k in self._found.batch}, True))  # of any size
        inputs = [[batch[i.key] if i.role == "batch" else x for i, x in zip(s.inputs, given, strict=True)] for s, given in zip(self._sources, self._given, strict=True)]
        results = self._step.host.run([r.around(s, plain, made) for r, s in zip(self.ranks, self._sources, strict=True)], inputs)
        (output,) = (o for o in self.program.outputs if o.role == "output")
        type_ = self.program.types[output.ref.name]
        return self._step.host.whole([r[0] for r in results], replace(type_, shape=(len(made.last), *type_.shape[1:])))

    @property
    def _real(self) -> bool:
        return self._step.backend != "simulate"

    @property
    def leads(self) -> bool:
        return self._step.host.first

    def together(self) -> AbstractContextManager[None]:
        return self._step.host.together()

    def follow(self) -> None:
        while text := self._step.host.decide(str):
            if text != BEAT:
                self._run(Plain.parse(text))

    def beat(self) -> None:
        if self._real:
            self._step.host.decide(lambda: BEAT)

    def release(self) -> None:
        if self._real:
            self._step.host.decide(str)

    def everyone(self, value: T) -> T:
        got: T = self._step.host.everyone(value)[0]
        return got


@dataclass
class Pages:
    """One rank's caches: of each layer the kv heads that this rank has."""

    blocks: int
    size: int
    device: torch.device

    def __post_init__(self) -> None:
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.caches.values() for x in pair)

    def around(self, source: Source, step: Plain, made: Packed) -> Callable[[Any, list[Tensor]], tuple[Tensor, ...]]:
        """The rank's source, with attention over these pages."""

        def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: int, scale: float, window: int, softcap: float) -> Tensor:
            if not q.numel():
                return q.new_empty(*q.shape[:2], v.shape[2])  # a rank without a head
            if layer not in self.caches:
                self.caches[layer] = (self._cache(k), self._cache(v))
            packing: Packing = made.packing
            return attend(q, k.contiguous(), v.contiguous(), *self.caches[layer], packing, scale, window, softcap, sinks)

        def run(rt: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
            step.copy([x for pair in self.caches.values() for x in pair], self.device)
            rt.paged_attention = attention
            return source(rt, inputs)

        return run

    def _cache(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[1], self.blocks, self.size, x.shape[2], dtype=x.dtype, device=self.device)


class packed:
    """While it lasts the model's forward is that of a packed step: ``model(ids=, positions=, last=)``."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.recorder = model, Recorder({}, PAGELESS)
        self._hooks = hooked(model)

    def __enter__(self) -> Recorder:
        self._hooks.__enter__()
        step = PackedStep(self.model, self.recorder, self.model.forward)
        self.model.forward = lambda ids, positions, last: step(ids, positions, last, PAGELESS)
        return self.recorder

    def __exit__(self, *error: Any) -> None:
        del self.model.forward
        self._hooks.__exit__(*error)


def example(tokens: int, wanted: int) -> dict[str, Tensor]:
    return {"ids": torch.zeros(tokens, dtype=torch.long), "positions": torch.arange(tokens), "last": torch.arange(wanted)}


def stand_ins(text: str) -> tuple[int, int]:
    """Two primes that divide no number of a program, which has neither of them for a size."""
    numbers = {n for n in map(int, _NUMBER.findall(text)) if n >= FIRST}
    primes = (p for p in count(FIRST) if all(p % d for d in range(2, int(p**0.5) + 1)) and all(n % p for n in numbers))
    return next(primes), next(primes)


def any_size(source: str, sizes: tuple[int, int]) -> str:
    """The source of a step of ``sizes``, tokens and wanted rows, for any."""

    def general(found: re.Match[str]) -> str:
        n = int(found[0])
        name, k = next(((name, n // size) for name, size in zip("TL", sizes, strict=True) if n and n % size == 0), ("", n))
        return f"{name} * {k}" if name and k > 1 else name or str(n)

    names = [m[1] for key in ("ids", "last") if (m := re.search(rf"^\s+(\w+),  # batch {key}:", source, re.M))]
    if len(names) != 2 or any(re.search(rf"\b{word}\b", source) for word in "TL"):
        raise InferenceError("the step's source does not show its tokens and wanted rows\n  fix: a plan of one rank")
    lines = [_NUMBER.sub(general, line) for line in source.splitlines()]
    lines.insert(lines.index("    inputs.clear()"), f"    T, L = {names[0]}.shape[0], {names[1]}.shape[0]")
    return "\n".join(lines) + "\n"
