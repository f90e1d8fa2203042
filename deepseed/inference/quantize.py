"""Weights in eight bits: each matrix that products read becomes whole numbers (or 8-bit floats) and one scale for each 32 along an output channel. Activations stay as they are, sums are float32.

    p, stored = in_eight_bits(p, "int8")         # a rank's program that reads them
    given, errors = stored.read(host, given)     # what it is called with

A pass over a localized program. Which weights: those of two dimensions that products read, and nothing but products and lookups (a tied table is both), all with the same dimension
for channels. No name of a module is looked at. ``int8`` is symmetric, round(w / s) with s = max|w| / 127 over the group; ``fp8`` is float8_e4m3fn of w / s with s = max|w| / 448. A rank makes
its own part of a matrix, whose groups begin where it begins: where that is a multiple of 32 the parts are those of the whole matrix in eight bits.

    before: %w : f32[96, 64@tp] param     %w.t = permute(%w, dims=[1, 0])     %y = aten.mm(%x, %w.t)
    after:  %w : i8[96, 64@tp] param      %w.scale : f32[96, 1] param         %y = eight_bits.mm(%x, %w, %w.scale, kind="int8")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deepseed.codegen.cpp_ops import computed
from deepseed.codegen.python import generate
from deepseed.inference import native
from deepseed.inference.errors import InferenceError
from deepseed.ir.layout import Layout, Split
from deepseed.ir.program import FLOATS, Input, Op, Output, Program, Ref, Type
from deepseed.ops import products
from deepseed.runtime.executable import Executable

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
GROUP = 32  # as codegen.cpp_native has it
AT_A_TIME = 1 << 18  # elements of a matrix that are whole at a time
MM, ROWS = "eight_bits.mm", "eight_bits.rows"
SUBNORMAL = 256.0  # an e4m3's bits, read as those of a float16, say a number so many times as small: its scale makes up for it
# op: (argument that is the matrix, of the input, of the bias)
_PRODUCTS: dict[str, tuple[int, int, int | None]] = {"aten.mm": (1, 0, None), "aten.addmm": (2, 1, 0)}


@dataclass(frozen=True)
class Error:
    """What one matrix lost. ``relative``: the error's norm over the matrix's; ``largest``: of an element, over the matrix's largest."""

    name: str
    shape: tuple[int, ...]
    relative: float
    largest: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    """``errors``: of what this process's ranks hold of each matrix."""

    kind: str
    errors: tuple[Error, ...]
    relative: float  # of all matrices together
    kept: int  # bytes of what stays as it is

    @property
    def bytes_before(self) -> int:
        return self.kept + sum(e.bytes_before for e in self.errors)

    @property
    def bytes_after(self) -> int:
        return self.kept + sum(e.bytes_after for e in self.errors)

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda e: e.relative)
        return (
            f"{self.kind}: {len(self.errors)} matrices, {self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB of weights; "
            f"relative error {self.relative:.2%} in all, {worst.relative:.2%} at most ({worst.name})"
        )

    def table(self) -> str:
        return "\n".join([f"{e.relative:8.3%} {e.largest:8.3%}  {e.name} {list(e.shape)}" for e in self.errors] + [str(self)])


@dataclass(frozen=True)
class Matrix:
    """A matrix in eight bits: ``source`` is the stored one, of which ``part`` (None: all of it) is read; ``channels``: the dimension of the output's channels."""

    name: str
    source: Input
    part: Op | None
    type: Type
    channels: int


@dataclass
class Lost:
    """Sums over the parts of a matrix."""

    error: float = 0.0
    norm: float = 0.0
    most_off: float = 0.0
    most: float = 0.0
    before: int = 0
    after: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)


def in_eight_bits(p: Program, kind: str) -> tuple[Program, tuple[Matrix, ...]]:
    """A rank's program that reads its matrices in eight bits, and which: they stand behind its other inputs, each before its scale. Raises InferenceError where there is none."""
    if kind not in KINDS:
        raise InferenceError(f"quantize={kind!r} is unknown\n  fix: one of {', '.join(KINDS)}")
    matrices = [m for i in p.inputs for m in _matrices(p, i)]
    if not matrices:
        raise InferenceError("no weight is read by products alone, so none can be stored in eight bits\n  fix: leave quantize out")
    of = {m.part.name if m.part is not None else m.source.name: m for m in matrices}
    gone = {m.part.name for m in matrices if m.part is not None}
    laid = {op.name: op.refs[0].name for op in p.ops if op.target == "permute" and op.refs[0].name in of}
    ops = list[Op]()
    for op in p.ops:
        if op.name in gone or op.name in laid:
            continue
        if op.target in _PRODUCTS and (name := _named(op.args[_PRODUCTS[op.target][0]], laid)) in of:
            _, x, bias = _PRODUCTS[op.target]
            op = replace(op, target=MM, args=(op.args[x], *_given(of[name]), *((op.args[bias],) if bias is not None else ())), kwargs=(("kind", kind),))
        elif op.target == "embedding" and (name := _named(op.args[0], laid)) in of:
            op = replace(op, target=ROWS, args=(*_given(of[name]), op.args[1]), kwargs=(("kind", kind), ("dtype", op.type.dtype)))
        ops.append(op)
    kept = [i for i in p.inputs if i not in {m.source for m in matrices}]
    new = [each for m in matrices for each in (Input(m.name, _stored(m, "i8"), "param", m.name), Input(f"{m.name}.scale", _scale(p, m), "param", f"{m.name}.scale"))]
    return replace(p, inputs=(*kept, *new), ops=tuple(ops)), tuple(matrices)


def made(host: Any, programs: Sequence[Program], matrices: Sequence[Sequence[Matrix]], given: Sequence[Sequence[Tensor]], kind: str) -> tuple[list[list[Tensor]], Report]:
    """What the programs of the hosted ranks are called with. ``given``: what those of whole matrices were called with."""
    steps = [Executable(generate(_parts(p, each)), f"{p.name}-parts") for p, each in zip(programs, matrices, strict=True)]
    found = host.run(steps, [[x for i, x in zip(p.inputs, xs, strict=True) if i in {m.source for m in each if m.part is not None}] for p, each, xs in zip(programs, matrices, given, strict=True)])
    out, lost, kept = list[list[Tensor]](), dict[str, Lost](), 0
    for p, each, xs, parts in zip(programs, matrices, given, found, strict=True):
        sources = {m.source for m in each}
        out.append([x for i, x in zip(p.inputs, xs, strict=True) if i not in sources])
        kept += sum(x.numel() * x.element_size() for i, x in zip(p.inputs, xs, strict=True) if i not in sources and i.role in ("param", "buffer"))
        stored, made_of = {i: x for i, x in zip(p.inputs, xs, strict=True)}, iter(parts)
        for m in each:
            weight = (stored[m.source] if m.part is None else next(made_of)).detach().movedim(m.channels, 0)
            whole_numbers, scale = eight_bits(weight, kind)
            out[-1] += [whole_numbers.view(torch.int8), scale]
            _count(lost.setdefault(m.source.key, Lost()), weight, whole_numbers, scale, kind)
    errors = tuple(Error(n, e.shapes[0], (e.error / (e.norm or 1)) ** 0.5, e.most_off / (e.most or 1), e.before, e.after) for n, e in lost.items())
    total = sum(e.norm for e in lost.values())
    return out, Report(kind, errors, (sum(e.error for e in lost.values()) / total) ** 0.5 if total else 0.0, kept)


def eight_bits(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[channels, width] -> the same in eight bits, and scales [channels, groups of 32 along the width] as the C++ products take them. What they mean: ``whole``."""
    dtype, top = KINDS[kind]
    wide = weight if weight.dtype is torch.float64 else weight.float()
    short = -wide.shape[1] % GROUP
    groups = torch.nn.functional.pad(wide, (0, short)).view(wide.shape[0], -1, GROUP)
    scale = groups.abs().amax(2) / top
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = (groups / scale[..., None]).flatten(1)[:, : wide.shape[1]]
    stored = (scaled.round_().clamp_(-127, 127) if dtype is torch.int8 else scaled.clamp_(-top, top)).to(dtype).contiguous()
    return stored, scale * SUBNORMAL if kind == "fp8" else scale


def whole(weight: Tensor, scale: Tensor, kind: str) -> Tensor:
    """In the scale's precision. ``weight``: also as int8 that has an 8-bit float's bits."""
    each = scale.repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    return (_from_fp8(weight, scale.dtype) if kind == "fp8" else weight.to(scale.dtype)).mul_(each)


def mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, kind: str = "int8") -> Tensor:
    """x [rows, width] times weight [channels, width]: in C++ where rows are few, else a few channels are made whole at a time."""
    out = native.product_of_eight(x, weight, scale, kind)
    if out is None:
        channels, width = weight.shape
        out = x.new_empty(x.shape[0], channels)
        each = max(1, AT_A_TIME // max(width, 1))
        for begin in range(0, channels, each):
            part = slice(begin, begin + each)
            out[:, part] = products.mm(x, _widened(weight[part], scale[part], kind, x.dtype).t())
    return out if bias is None else out.add_(bias)


def rows(weight: Tensor, scale: Tensor, ids: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """``embedding`` of a table in eight bits."""
    flat = ids.reshape(-1)
    return whole(weight.index_select(0, flat), scale.index_select(0, flat), kind).to(dtype).view(*ids.shape, -1)


def _widened(weight: Tensor, scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    fast = native.widened(weight, scale, kind, dtype)
    return whole(weight, scale, kind).to(dtype) if fast is None else fast


def _matrices(p: Program, i: Input) -> list[Matrix]:
    """The parts of a stored tensor that are read, each in eight bits; none where not all can be."""
    if i.role != "param" or len(i.type.shape) != 2 or i.type.dtype not in FLOATS:
        return []
    found, channels, multiplied = list[Matrix](), set[int](), False
    parts = [(i.name, None, i.type), *((u.name, u, u.type) for u in p.uses[i.name] if isinstance(u, Op) and u.target == "shard")]
    for name, part, type_ in parts:
        users = [u for u in p.uses[name] if part is not None or not (isinstance(u, Op) and u.target == "shard")]
        for user in users:
            dims = _channels(p, name, user)
            if dims is None:
                return []
            channels |= dims
            multiplied |= isinstance(user, Op) and user.target != "embedding"
        if users:
            found.append(Matrix(name, i, part, type_, 0))
    return [replace(m, channels=next(iter(channels))) for m in found] if len(channels) == 1 and multiplied else []


def _channels(p: Program, name: str, user: object) -> set[int] | None:
    """The dimension of the output's channels, of a use that eight bits serve; None for another use."""
    if not isinstance(user, Op) or user.kernel:
        return None
    if user.target == "permute" and user.kw("dims") == (1, 0):
        reads = [_channels(p, user.name, u) for u in p.uses[user.name]]
        return {1 - d for r in reads for d in r} if all(r == {1} for r in reads) else None  # type: ignore[union-attr]
    at, dims = (_PRODUCTS[user.target][0], {1}) if user.target in _PRODUCTS else (0, {0})
    alone = [n for n, a in enumerate(user.args) if a == Ref(name)] == [at] and sum(r.name == name for r in user.refs) == 1
    fits = user.target in _PRODUCTS or (user.target == "embedding" and len(user.args) == 2)
    return dims if fits and alone and not user.kwargs else None


def _named(a: object, laid: Mapping[str, str]) -> str:
    return laid.get(a.name, a.name) if isinstance(a, Ref) else ""


def _given(m: Matrix) -> tuple[Ref, Ref]:
    return Ref(m.name), Ref(f"{m.name}.scale")


def _stored(m: Matrix, dtype: str) -> Type:
    """[channels, width]."""
    shape, layout = m.type.shape, m.type.layout
    if m.channels == 0:
        return replace(m.type, dtype=dtype)
    turned = tuple((axis, replace(e, dim=1 - e.dim) if isinstance(e, Split) else e) for axis, e in layout.elements)
    return replace(m.type, dtype=dtype, shape=shape[::-1], layout=Layout(turned))


def _scale(p: Program, m: Matrix) -> Type:
    """[channels, groups], of what the rank has."""
    channels, width = _stored(m, "i8").local(p.mesh)
    return Type(computed(m.type.dtype), (channels, -(-width // GROUP)))


def _parts(p: Program, matrices: Sequence[Matrix]) -> Program:
    """From the stored tensors the parts that are read."""
    cut = [m for m in matrices if m.part is not None]
    inputs = tuple(i for i in p.inputs if i in {m.source for m in cut})
    return Program("parts", p.mesh, inputs, tuple(m.part for m in cut if m.part is not None), tuple(Output(Ref(m.name), "output", m.name) for m in cut))


def _count(lost: Lost, weight: Tensor, stored: Tensor, scale: Tensor, kind: str) -> None:
    wide = weight.to(scale.dtype)
    off = whole(stored, scale, kind).sub_(wide)
    lost.error += float(off.norm()) ** 2
    lost.norm += float(wide.norm()) ** 2
    lost.most_off, lost.most = (max(a, float(x.abs().max()) if x.numel() else 0.0) for a, x in ((lost.most_off, off), (lost.most, wide)))
    lost.before += weight.numel() * weight.element_size()
    lost.after += stored.numel() + scale.numel() * scale.element_size()
    lost.shapes.append(tuple(weight.shape))


def _from_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x / 256, by bits: sign, exponent and mantissa of an e4m3 lie in a float16 as they are, whose exponents begin 8 lower. Ten times faster than torch's own conversion."""
    bits: Tensor = (x.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).to(dtype)
