"""Writes the ops that replace one op: a small builder that infers shapes and dtypes, helper of ``canonicalize``.

Values are ``Ref``; numbers may stand wherever a pointwise op takes one. Arithmetic is written in the dtype that PyTorch's
kernels compute in: ``wide`` lifts f16 and bf16 to f32, and each result is cast back once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from deepseed.ir.contract import PassError
from deepseed.ir.program import FLOATS, Arg, Op, Ref, Type

Number = float | int
Value = Ref | Number


@dataclass
class Group:
    """The replacement of ``op``: its ops inherit phase, path and line."""

    op: Op
    types: dict[str, Type]  # of all values so far; the group's own are added
    fresh: Callable[[str], str]
    producers: Mapping[str, Op]
    ops: list[Op] = field(default_factory=list)

    # operands and arguments of the replaced op

    def arg(self, position: int, name: str = "", default: Arg = None) -> Arg:
        """The argument at ``position`` of the schema, which may also be given by name."""
        if position < len(self.op.args):
            return self.op.args[position]
        return self.op.kw(name, default)

    def ref(self, position: int, name: str = "") -> Ref:
        value = self.arg(position, name)
        if not isinstance(value, Ref):
            raise self.error(f"argument {position} is {value!r} where a tensor is needed")
        return value

    def optional(self, position: int, name: str = "") -> Ref | None:
        return None if self.arg(position, name) is None else self.ref(position, name)

    def number(self, position: int, name: str = "", default: Number | None = None) -> Number:
        value = self.arg(position, name, default)
        if not isinstance(value, int | float):
            raise self.error(f"argument {position} ({name}) is {value!r} where a number is needed")
        return value

    def integer(self, position: int, name: str = "", default: int | None = None) -> int:
        return int(self.number(position, name, default))

    def ints(self, position: int, name: str = "") -> tuple[int, ...] | None:
        value = self.arg(position, name)
        if value is None or isinstance(value, int):
            return None if value is None else (int(value),)
        if not isinstance(value, tuple):
            raise self.error(f"argument {position} ({name}) is {value!r} where a list of numbers is needed")
        return tuple(n for n in value if isinstance(n, int))

    def flags(self, position: int, name: str = "output_mask") -> tuple[bool, ...]:
        return tuple(bool(n) for n in self.ints(position, name) or ())

    def dims(self, x: Ref, given: Sequence[int] | None) -> tuple[int, ...]:
        """Non-negative and sorted; None or empty: all."""
        rank = len(self.shape(x))
        return tuple(sorted(d % rank for d in given)) if given and rank else tuple(range(rank))

    def error(self, what: str) -> PassError:
        op = self.op
        return PassError(f"canonicalize: %{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + (f" ({op.line})" if op.line else "") + f": {what}")

    # values

    def shape(self, x: Ref) -> tuple[int, ...]:
        return self.types[x.name].shape

    def dtype(self, x: Ref) -> str:
        return self.types[x.name].dtype

    def emit(self, target: str, args: Sequence[Arg], dtype: str, shape: Sequence[int], **kwargs: Arg) -> Ref:
        parts = target.split(".")
        name = self.fresh(f"{self.op.name}.{parts[1] if parts[0] == 'aten' else parts[0]}")
        type_ = Type(dtype, tuple(shape))
        self.types[name] = type_
        self.ops.append(
            replace(self.op, results=(name,), target=target, args=tuple(args), kwargs=tuple(kwargs.items()), types=(type_,))
        )
        return Ref(name)

    def pointwise(self, name: str, *args: Value, dtype: str = "") -> Ref:
        """Broadcasts its operands; the dtype is that of the first unless given."""
        refs = [a for a in args if isinstance(a, Ref)]
        return self.emit(f"aten.{name}", args, dtype or self.dtype(refs[0]), broadcast([self.shape(r) for r in refs]))

    def add(self, a: Ref, b: Value) -> Ref:
        return self.pointwise("add.Tensor", a, b)

    def sub(self, a: Ref, b: Value) -> Ref:
        return self.pointwise("sub.Tensor", a, b)

    def mul(self, a: Ref, b: Value) -> Ref:
        return self.pointwise("mul.Tensor", a, b)

    def div(self, a: Ref, b: Value) -> Ref:
        return self.pointwise("div.Tensor", a, b)

    def neg(self, a: Ref) -> Ref:
        return self.pointwise("neg", a)

    def exp(self, a: Ref) -> Ref:
        return self.pointwise("exp", a)

    def log(self, a: Ref) -> Ref:
        return self.pointwise("log", a)

    def sqrt(self, a: Ref) -> Ref:
        return self.pointwise("sqrt", a)

    def rsqrt(self, a: Ref) -> Ref:
        return self.pointwise("rsqrt", a)

    def abs(self, a: Ref) -> Ref:
        return self.pointwise("abs", a)

    def compare(self, name: str, a: Ref, b: Number) -> Ref:
        return self.pointwise(f"{name}.Scalar", a, b, dtype="bool")

    def masked_fill(self, a: Ref, mask: Ref, value: Number) -> Ref:
        return self.pointwise("masked_fill.Scalar", a, mask, value)

    def where(self, mask: Ref, a: Ref, b: Ref) -> Ref:
        return self.pointwise("where.self", mask, a, b, dtype=self.dtype(a))

    def cast(self, x: Ref, dtype: str) -> Ref:
        return x if self.dtype(x) == dtype else self.emit("cast", (x,), dtype, self.shape(x))

    def wide(self, x: Ref) -> Ref:
        """In the dtype that kernels compute in."""
        return self.cast(x, wide(self.dtype(x)))

    def full(self, shape: Sequence[int], value: Number, dtype: str) -> Ref:
        return self.emit("full", (), dtype, shape, value=float(value) if is_float(dtype) else value)

    def reshape(self, x: Ref, shape: Sequence[int]) -> Ref:
        return x if self.shape(x) == tuple(shape) else self.emit("reshape", (x,), self.dtype(x), shape)

    def expand(self, x: Ref, shape: Sequence[int]) -> Ref:
        return x if self.shape(x) == tuple(shape) else self.emit("expand", (x,), self.dtype(x), shape)

    def permute(self, x: Ref, dims: Sequence[int]) -> Ref:
        shape = self.shape(x)
        return self.emit("permute", (x,), self.dtype(x), [shape[d] for d in dims], dims=tuple(dims))

    def slice(self, x: Ref, dim: int, start: int, n: int, step: int = 1) -> Ref:
        shape = self.shape(x)
        if shape[dim] == n:
            return x
        return self.emit("slice", (x,), self.dtype(x), [*shape[:dim], n, *shape[dim + 1 :]], dim=dim, start=start, step=step)

    def cat(self, xs: Sequence[Ref], dim: int) -> Ref:
        shape = list(self.shape(xs[0]))
        shape[dim] = sum(self.shape(x)[dim] for x in xs)
        return self.emit("cat", (tuple(xs),), self.dtype(xs[0]), shape, dim=dim)

    def gather(self, x: Ref, index: Ref, dim: int) -> Ref:
        return self.emit("gather", (x, index), self.dtype(x), self.shape(index), dim=dim)

    def scatter_add(self, x: Ref, index: Ref, source: Ref, dim: int) -> Ref:
        return self.emit("scatter_add", (x, index, source), self.dtype(x), self.shape(x), dim=dim)

    def sum(self, x: Ref, dims: Sequence[int], keepdim: bool = False, dtype: str = "") -> Ref:
        """``dtype``: that of the result; its own unless given."""
        if not dims:
            return self.cast(x, dtype or self.dtype(x))
        return self._reduce("sum", x, dims, keepdim, dtype or self.dtype(x))

    def amax(self, x: Ref, dims: Sequence[int], keepdim: bool = False) -> Ref:
        return self._reduce("amax", x, dims, keepdim, self.dtype(x)) if dims else x

    def mm(self, a: Ref, b: Ref) -> Ref:
        """The last two dimensions' product; [m, k] [k, n] or [b, m, k] [b, k, n]."""
        shape = [*self.shape(a)[:-1], self.shape(b)[-1]]
        return self.emit("aten.mm" if len(shape) == 2 else "aten.bmm", (a, b), self.dtype(a), shape)

    def numel(self, x: Ref, dims: Sequence[int]) -> int:
        return prod(self.shape(x)[d] for d in dims)

    def _reduce(self, target: str, x: Ref, dims: Sequence[int], keepdim: bool, dtype: str) -> Ref:
        shape = [1 if d in dims else n for d, n in enumerate(self.shape(x)) if keepdim or d not in dims]
        return self.emit(target, (x,), dtype, shape, dims=tuple(dims), keepdim=keepdim)

    # closing

    def close(self, values: Sequence[Ref]) -> dict[str, Ref]:
        """Gives the group's values the replaced op's names. Returns what its other results are: values made elsewhere."""
        made = {op.name for op in self.ops}
        renamed: dict[str, str] = {}
        elsewhere: dict[str, Ref] = {}
        for result, type_, value in zip(self.op.results, self.op.types, values, strict=True):
            found = self.types[value.name]
            if (found.dtype, found.shape) != (type_.dtype, type_.shape):
                raise self.error(f"%{result} decomposes to {found.dtype}{list(found.shape)}, its type says {type_.dtype}{list(type_.shape)}")
            if value.name in made and value.name not in renamed:
                renamed[value.name] = result
            else:
                elsewhere[result] = Ref(renamed.get(value.name, value.name))
        for old, new in renamed.items():
            self.types[new] = self.types.pop(old)
        self.ops = [
            replace(op.map_refs(lambda r: Ref(renamed.get(r.name, r.name))), results=(renamed.get(op.name, op.name),)) for op in self.ops
        ]
        return elsewhere


def wide(dtype: str) -> str:
    return "f32" if dtype in ("f16", "bf16") else dtype


def is_float(dtype: str) -> bool:
    return dtype in FLOATS


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    rank = max(len(s) for s in shapes)
    aligned = [(1,) * (rank - len(s)) + s for s in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*aligned, strict=True))


Decomposition = Callable[[Group], "Sequence[Ref] | None"]  # the results, or None: keep the op
