"""The packed step as a Program: DeepSeed's own passes place it, so that a plan such as ``tp2`` splits heads, weights and vocabulary with no line about them.

The forward is captured as any other (``deepseed.capture``), with attention as the op ``paged_attention``, whose rule leaves kv heads and their group free. Programs
have static shapes; a step has any number of tokens, T, of which it wants any number of logits, L. So it is compiled for two primes that divide no number of the captured
program, and no axis may split rows. A number of a rank's source that is a multiple of one of them is then one of tokens, ``T * n``, or of wanted rows, ``L * n``: one
source for all sizes. A rank's caches have the kv heads that arrive there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepseed import pipeline
from deepseed.api import Module
from deepseed.codegen import cpp_files, triton_files
from deepseed.codegen.any_rows import general, stands_for
from deepseed.codegen.cpp import Shape
from deepseed.codegen.cpp_native import TEMPLATES
from deepseed.codegen.cpp_ops import LIBRARY
from deepseed.codegen.cpp_step import Lies, side_by_side, step
from deepseed.codegen.expressions import DTYPES, CodegenError
from deepseed.codegen.kernels import Kernel, kernels
from deepseed.codegen.python import generate
from deepseed.codegen.triton import launches
from deepseed.inference import gpu, native
from deepseed.inference.attention import Packing, attend
from deepseed.inference.capture import Looked, PackedStep, Recorder, complete, hooked
from deepseed.inference.errors import InferenceError
from deepseed.inference.packing import Packed, Plain, pack
from deepseed.inference.quantize import Report, in_eight_bits, made, mm, rows
from deepseed.inference.scheduler import Step
from deepseed.ir.fragment import groups
from deepseed.ir.program import Program
from deepseed.kernels import AUTO, CPP, ROWS, TRITON_ROWS
from deepseed.logs import say
from deepseed.programs import Found
from deepseed.rules.strides import contiguous, laid_out
from deepseed.runtime.executable import Executable as Source
from deepseed.runtime.executable import cache_dir

T = TypeVar("T")
BEAT = "beat"  # in the place of a step: there is none, wait on
MOST_RANKS = 64  # that split one dimension
FIRST = 503  # of the primes that stand for them
TRIES = 4  # of such primes
CALLED = [*((f"{of}.{op}", name, function) for of in ("torch", "ops") for op, name, function in (("mm", "product", native.product), ("addmm", "biased", native.biased))), ("torch.ops.eight_bits.mm.default", "eight_bits_mm", mm), ("torch.ops.eight_bits.rows.default", "eight_bits_rows", rows)]


class Executable:
    """A step on the ranks of a plan, those that this process hosts."""

    def __init__(
        self, model: nn.Module, looked: Looked, plan: str, blocks: int, size: int, backend: str | None = None, weights: Any = None, checkpoint: Any = None, codegen: str = "auto",
        quantize: str | None = None, own: bool = False,
    ) -> None:  # fmt: skip
        """``codegen``: "cpp", "python", "triton", or "auto", which is the first on a CPU with a compiler, else the second. ``own``: nobody else reads the model's weights, which may go once they are in eight bits."""
        self.size = size
        device = next(p.device for p in model.parameters())
        self.codegen = codegen if codegen != "auto" else AUTO if device.type in ("cpu", "meta") and native.load() is not None else "python"
        self._step = Module(model, plan, backend=backend, weights=weights, quiet=True, codegen={CPP: ROWS, "triton": TRITON_ROWS}.get(self.codegen, self.codegen))
        if checkpoint is not None:
            self._step.load(checkpoint, optimizer=False, cast=True)
        sizes, locals_ = self._compiled(model, looked.numbers)
        built = self._found.built
        self._given: list[list[Tensor]] = []
        self.quantized: Report | None = None
        self.device = self._step.host.device
        self.whole: native.FewRows | None = None
        self.launches = 0  # functions that a step runs
        self.emitted = 0  # of these, emitted Triton kernels
        self.in_python: dict[str, str] = {}  # kernels that have no C++ or Triton, and why
        if quantize is not None:
            locals_ = self._in_eight_bits(locals_, quantize, own, example(*sizes))
        self._sources = [self._of_any_size(p, sizes) for p in locals_]
        self.ranks = [Pages(blocks, size, self.device, self.codegen == "triton") for _ in self._sources]
        complete(model, sum(op.target == "paged_attention" for op in built.program.ops), len(looked.layers))

    def _compiled(self, model: nn.Module, numbers: frozenset[int]) -> tuple[tuple[int, int], list[Program]]:
        """The numbers of tokens and wanted rows that stand for all, and the hosted ranks' programs of so many, in which no other number is a multiple of one of them."""
        before = None
        for _ in range(TRIES):
            sizes = stand_ins(numbers)
            with packed(model):
                self._found = self._step._find(example(*sizes), "forward")
            found: list[Program] = [pipeline.run(self.program, {"localize": {"coordinate": c}}, pipeline.EACH_RANK, check=False)[-1].program for c in self._step.host.coordinates]
            taken = frozenset(n for p in found for n in mistaken(side_by_side(p) if self.codegen == CPP else p, sizes))
            named = {stands_for(n, dict(zip(sizes, "TL", strict=True))) for n in taken}
            if not named or named == before:  # as many tokens or rows again, whatever their number
                return sizes, found
            numbers, before = numbers | taken, named
        raise InferenceError(f"{type(model).__name__}: the step has sizes {', '.join(map(str, sorted(taken)))} that cannot be told from its {sizes[0]} tokens or {sizes[1]} wanted rows\n  fix: another plan, such as tp1")

    def _in_eight_bits(self, programs: Sequence[Program], kind: str, own: bool, batch: dict[str, Tensor]) -> list[Program]:
        """The hosted ranks' programs on weights in eight bits, which are made here."""
        done = [in_eight_bits(p, kind) for p in programs]
        given = self._step._given(Found(self._found.built, {k: batch[k] for k in self._found.batch}, True))
        self._given, self.quantized = made(self._step.host, programs, [matrices for _, matrices in done], given, kind)
        for state, (_, matrices) in zip(self._step.states, done, strict=True):
            for key in {("param", m.source.key) for m in matrices} if own else ():
                state.tensors[key].data = state.tensors[key].data.new_empty(0)  # nobody reads the whole ones any more
        return [p for p, _ in done]

    def _of_any_size(self, local: Program, sizes: tuple[int, int]) -> Source:
        """A rank's step for any numbers of tokens and wanted rows, with its kernels and products."""
        calls, names = dict[str, Any](), dict[str, str]()
        if self.codegen in (CPP, "triton"):
            local = side_by_side(local) if self.codegen == CPP else local
            strides, views = laid_out(local)
            found, free = kernels(local, strides, views), dict(zip(sizes, "TL", strict=True))
            names = {mark: k.name for mark, k in found.items()}
            calls = (self._in_cpp if self.codegen == CPP else self._in_triton)(local, strides, views, found, free)
        text = any_size(generate(local, kernels=names), sizes)
        for op, name, function in CALLED if self.codegen == CPP else CALLED[-2:]:
            text, calls = text.replace(f"{op}(", f"{name}("), {**calls, name: function}
        return Source(text, f"{self.program.name}-packed", local.inputs, local.outputs, calls, self.codegen)

    def _in_cpp(self, local: Program, strides: Mapping[str, Shape], views: Sequence[bool], found: Mapping[str, Kernel], free: Mapping[int, str]) -> dict[str, Any]:
        self.launches = sum(not view and not op.kernel for op, view in zip(local.ops, views, strict=True)) + len(list(groups(local)))
        makes = {g.kernel: g.makes for g in groups(local)}
        lying = {k: [dense(local.types[v].local(local.mesh), strides[v]) for v in makes[mark]] for mark, k in found.items()}
        made, why = cpp_files.functions(lying, free)
        self.in_python.update(why)
        parts = [LIBRARY, *(f.text for f in made.values())]
        try:
            whole = step(local, Lies(strides, views, found, made, {k.name: each for k, each in lying.items()}), free, native.FEW)
            parts = [parts[0], TEMPLATES, *parts[1:], whole.text]
            self.launches = whole.calls
        except CodegenError as error:
            whole, self.in_python["step"] = None, str(error)
        loaded: Any = None
        try:
            loaded = cpp_files.library("\n".join(parts), cache_dir() / "kernels", cpp_files.EXACT)
        except CodegenError as error:  # what the compiler refuses runs as Python
            say(str(error))
            made, whole = {}, None
        if whole is not None and len(self._step.host.coordinates) == 1:
            output = next(local.types[o.ref.name] for o in local.outputs if o.role == "output")
            self.whole = native.FewRows(loaded.step, whole.arena, output.shape[1:], getattr(torch, DTYPES[output.dtype].removeprefix("torch.")))
        return {**cpp_files.callables(lying, made, loaded, free)}

    def _in_triton(self, local: Program, strides: Mapping[str, Shape], views: Sequence[bool], found: Mapping[str, Kernel], free: Mapping[int, str]) -> dict[str, Any]:
        """Groups, and what a layer does with its pages: two kernels."""
        any_number = tuple(free.items())
        calls, why = triton_files.of_any_rows(list(dict.fromkeys(found.values())), any_number, cache_dir() / "kernels")
        self.in_python.update(why)
        self.emitted = sum(launches(k.fragment, any_number) for k in found.values() if k.name not in why) + gpu.KERNELS * sum(op.target == "paged_attention" for op in local.ops)
        self.launches = self.emitted + sum(k.name in why for k in found.values())
        self.launches += sum(not view and not op.kernel and op.target != "paged_attention" for op, view in zip(local.ops, views, strict=True))
        return calls

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
        if self.whole is not None and self.whole.takes(made) and self.ranks[0].caches:
            plain.copy([x for pair in self.ranks[0].caches.values() for x in pair], self.device)
            return self.whole.run(inputs[0], self.ranks[0].caches, made)
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
    emitted: bool = False  # attention is Triton's, be there a GPU or its interpreter

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
            if self.emitted:
                return gpu.attend(q, k, v, *self.caches[layer], packing, scale, window, softcap, sinks)
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
        self.model, self.recorder = model, Recorder(attends=True)
        self._hooks = hooked(model)

    def __enter__(self) -> Recorder:
        self._hooks.__enter__()
        step = PackedStep(self.model, self.recorder, self.model.forward)
        self.model.forward = step
        return self.recorder

    def __exit__(self, *error: Any) -> None:
        del self.model.forward
        self._hooks.__exit__(*error)


def example(tokens: int, wanted: int) -> dict[str, Tensor]:
    return {"ids": torch.zeros(tokens, dtype=torch.long), "positions": torch.arange(tokens), "last": torch.arange(wanted)}


def stand_ins(seen: Iterable[int]) -> tuple[int, int]:
    """Two primes that divide no number of a forward, nor a part of one: neither is a size there, whole or on a rank."""
    most = {(n, ranks, -(-n // ranks)) for n in seen if n >= FIRST for ranks in range(1, MOST_RANKS + 1)}
    numbers = {part for n, ranks, a in most for part in (n // ranks, a, n % a, n - (ranks - 1) * a) if part >= FIRST}
    primes = (p for p in count(FIRST) if all(p % d for d in range(2, int(p**0.5) + 1)) and all(n % p for n in numbers))
    return next(primes), next(primes)


def mistaken(local: Program, sizes: tuple[int, int]) -> set[int]:
    """Numbers of a rank's program that would be read as numbers of tokens or wanted rows and are not: sizes of what is stored, the second such size of a value, and what attention is told."""

    def like(numbers: Iterable[Any]) -> list[int]:
        return [n for n in numbers if type(n) is int and n and not all(n % size for size in sizes)]

    out = {n for i in local.inputs if i.role != "batch" for n in like(i.type.local(local.mesh))}
    for op in local.ops:
        for type_ in op.types:
            own = like(type_.local(local.mesh))
            out.update(own if len(own) > 1 else ())
        if op.target == "paged_attention":
            out.update(like((*op.args, *(value for _, value in op.kwargs))))
    return out


def dense(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides where they leave no gaps and repeat nothing, else row-major."""
    n = 1
    for size, stride in sorted(((size, stride) for size, stride in zip(shape, strides, strict=True) if size > 1), key=lambda each: each[1]):
        if stride != n:
            return contiguous(shape)
        n *= size
    return tuple(strides)


def any_size(source: str, sizes: tuple[int, int]) -> str:
    """The source of a step of ``sizes``, tokens and wanted rows, for any."""

    names = [m[1] for key in ("ids", "last") if (m := re.search(rf"^\s+(\w+),  # batch {key}:", source, re.M))]
    if len(names) != 2 or any(re.search(rf"\b{word}\b", source) for word in "TL"):
        raise InferenceError("the step's source does not show its tokens and wanted rows\n  fix: a plan of one rank")
    lines = [general(line, dict(zip(sizes, "TL", strict=True))) for line in source.splitlines()]
    lines.insert(lines.index("    inputs.clear()"), f"    T, L = {names[0]}.shape[0], {names[1]}.shape[0]")
    return "\n".join(lines) + "\n"
