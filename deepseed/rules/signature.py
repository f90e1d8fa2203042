"""What one op does to its dimensions: the factors that operands and results share, and in what it is linear.

A form is one line, ``"m k, k n -> m n"``: operands in the order of ``op.refs``, then results, one word a dimension.

    form    ::= tensor ("," tensor)* "->" tensor ("," tensor)*      the left side is empty for a creation op
    tensor  ::= "." | dim+                                          "." has no dimension
    dim     ::= factor | "(" factor+ ")" | "1" | "*" name ["!"]     "1" has no factor, "*b" is any number of dimensions
    factor  ::= name ["=" size] mark*
    mark    ::= "!" | "~" | "^" | "+"     "!" is never split, "~" only into one contiguous range a rank, "^" has its size in the
                                    arguments, "+" is never split so unevenly that a rank holds nothing of it

A factor that a result lacks is contracted: its shards leave partial values, reduced by the rule's ``reduce``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from deepseed.ir.layout import Split
from deepseed.ir.program import Arg, Op, Ref, Type

Dims = tuple[tuple[str, ...], ...]  # one tensor: per dimension its factors, major first


class RuleError(ValueError):
    """A form that does not fit the shapes of its op: names the op, the factor and both sizes."""


@dataclass(frozen=True)
class Call:
    """An op with the types of its operands and results: what the functions of a rule look at."""

    op: Op
    operands: tuple[Type, ...]

    @property
    def results(self) -> tuple[Type, ...]:
        return self.op.types

    def shape(self, operand: int) -> tuple[int, ...]:
        return self.operands[operand].shape

    @property
    def out(self) -> tuple[int, ...]:
        """The first result's shape."""
        return self.op.types[0].shape

    def arg(self, position: int, name: str, default: Arg = None) -> Arg:
        """An argument by position or by keyword."""
        if len(self.op.args) > position:
            return self.op.args[position]
        return self.op.kw(name, default)

    def dim(self, position: int, name: str = "dim", default: int = -1) -> int:
        """A dimension argument, counted from the left."""
        value = self.arg(position, name, default)
        if not isinstance(value, int):
            raise RuleError(f"{self.op.target}: argument {name} is {value!r}, a number is needed")
        return value % max(len(self.shape(0)), 1)


@dataclass(frozen=True)
class Rule:
    """One row of the table. ``linear`` and ``monotone`` name the sets of arguments that may be partial together
    (sum, max): ``"0|1"`` is either alone, ``"0+1"`` both together, ``"all"`` every operand together, ``"born"`` a result
    that may be created partial. A scalar 0 in a set counts as partial, another scalar forbids the set. ``adds`` is the argument to
    which a contraction is added: where a factor is contracted it must be partial, or each rank would add it once."""

    form: str | Callable[[Call], str | None]
    linear: str | Callable[[Call], str] = ""
    monotone: str = ""
    reduce: str = "sum"
    adds: int | None = None
    resize: Callable[[Op, Mapping[str, int], Mapping[str, int]], Op] | None = None  # op, sizes of factors now and wanted


@dataclass(frozen=True)
class Place:
    """Where a factor stands: tensor ``slot`` (operands, then results), dimension, product of the factors left of it."""

    slot: int
    dim: int
    left: int


@dataclass(frozen=True, eq=False)
class Signature:
    """The factors of one op at given shapes."""

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    contiguous: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()  # sizes that the arguments determine
    filled: frozenset[str] = frozenset()  # every rank holds some of it
    reduce: str = "sum"
    linear: tuple[frozenset[int], ...] = ()  # sets of operands that may be partial (sum) together
    monotone: tuple[frozenset[int], ...] = ()  # the same for max
    adds: frozenset[int] = frozenset()  # operands to which a contraction is added: partial where a factor is contracted

    @cached_property
    def places(self) -> Mapping[str, tuple[Place, ...]]:
        """Every place of every factor."""
        out: dict[str, list[Place]] = {}
        for slot, dims in enumerate(self.operands + self.results):
            for dim, names in enumerate(dims):
                left = 1
                for name in names:
                    out.setdefault(name, []).append(Place(slot, dim, left))
                    left *= self.sizes[name]
        return {name: tuple(found) for name, found in out.items()}

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The factors that may be split."""
        return tuple(name for name in self.places if name not in self.whole and self.sizes[name] > 1)

    def factor_at(self, slot: int, split: Split, n: int) -> tuple[str, int] | None:
        """Which factor ``split`` over ``n`` ranks splits, and the outer inside that factor; None: it crosses factors."""
        dims = (self.operands + self.results)[slot]
        left = 1
        for name in dims[split.dim] if split.dim < len(dims) else ():
            size = self.sizes[name]
            if split.outer % left == 0 and split.outer // left < size:
                inner = split.outer // left
                return (name, inner) if size % (inner * (split.of or n)) == 0 else None
            left *= size
        return None

    def __str__(self) -> str:
        def word(name: str) -> str:
            return f"{name}={self.sizes[name]}" + ("!" if name in self.whole else "~" if name in self.contiguous else "")  # "^" concerns checks only

        def tensor(dims: Dims) -> str:
            return " ".join("1" if not d else word(d[0]) if len(d) == 1 else "(" + " ".join(map(word, d)) + ")" for d in dims) or "."

        return ", ".join(map(tensor, self.operands)) + " -> " + ", ".join(map(tensor, self.results))


_WORD = re.compile(r"\s*(?:(\()|(\))|(\*?)([A-Za-z_]\w*)(?:=(\d+))?([!~^+]*)|(1)(?!\w)|(\.))")

Factor = tuple[str, int | None, str]  # name, size, mark


def build(call: Call, rule: Rule) -> Signature | None:
    """The signature of ``call`` under ``rule``; None where the rule's function has no form for these arguments.

    Raises RuleError where the form does not fit the shapes."""
    form = rule.form if isinstance(rule.form, str) else rule.form(call)
    if form is None:
        return None
    left, _, right = form.partition("->")
    operands = [_tensor(t, form) for t in left.split(",")] if left.strip() else []
    results = [_tensor(t, form) for t in right.split(",")]
    shapes = [t.shape for t in call.operands + call.results]
    if len(operands) != len(call.operands) or len(results) != len(call.results):
        raise RuleError(f"{call.op.target}: the rule {form!r} has {len(operands)} operands and {len(results)} results, the op {len(call.operands)} and {len(call.results)}")
    stars = _stars(operands + results, shapes, form, call)
    tensors = [_unstar(t, stars) for t in operands + results]
    sizes = _solve(tensors, shapes, form, call)
    marks = {name: mark for t in tensors for dim in t for name, _, mark in dim if mark}
    dims = tuple(
        tuple(tuple(name for name, _, _ in dim if sizes[name] != 1) if size else () for dim, size in zip(t, shape, strict=True))
        for t, shape in zip(tensors, shapes, strict=True)
    )  # a dimension without elements has nothing to split
    linear = rule.linear if isinstance(rule.linear, str) else rule.linear(call)
    whole, contiguous, fixed, filled = (frozenset(n for n, mark in marks.items() if kind in mark) for kind in "!~^+")
    return Signature(
        dims[: len(operands)],
        dims[len(operands) :],
        sizes,
        whole,
        contiguous,
        fixed,
        filled,
        rule.reduce,
        _sets(linear, call, "bool"),  # bools have no sum
        _sets(rule.monotone, call),
        frozenset() if rule.adds is None else frozenset().union(*_members(str(rule.adds), call)),
    )


def _tensor(text: str, form: str) -> list[list[Factor]]:
    """One tensor of a form: per dimension its factors; a star is one factor named ``*b``."""
    dims: list[list[Factor]] = []
    group: list[Factor] | None = None
    at = 0
    text = text.strip()
    while at < len(text):
        m = _WORD.match(text, at)
        if m is None:
            raise RuleError(f"cannot read {text[at:]!r} in the form {form!r}")
        at = m.end()
        opening, closing, star, name, size, mark, one, _ = m.groups()
        if opening:
            group = []
        elif closing:
            dims.append(group or [])
            group = None
        elif name:
            factor: Factor = (star + name, int(size) if size else None, mark)
            if group is None:
                dims.append([factor])
            else:
                group.append(factor)
        elif one:
            dims.append([])
    return dims


def _stars(tensors: Sequence[list[list[Factor]]], shapes: Sequence[tuple[int, ...]], form: str, call: Call) -> dict[str, int]:
    """How many dimensions each star stands for."""
    known: dict[str, int] = {}
    for tensor, shape in list(zip(tensors, shapes, strict=True)) * 2:
        names = [d[0][0] for d in tensor if d and d[0][0].startswith("*")]
        unknown = [n for n in names if n not in known]
        if len(unknown) == 1:
            known[unknown[0]] = len(shape) - (len(tensor) - len(names)) - sum(known[n] for n in names if n in known)
            if known[unknown[0]] < 0:
                raise RuleError(f"{call.op.target}: a shape of {len(shape)} dimensions is too short for {form!r}")
    return known


def _unstar(tensor: list[list[Factor]], stars: Mapping[str, int]) -> list[list[Factor]]:
    out: list[list[Factor]] = []
    for dim in tensor:
        if dim and dim[0][0].startswith("*"):
            name, _, mark = dim[0]
            out += [[(f"{name[1:]}{i}", None, mark)] for i in range(stars[name])]
        else:
            out.append(dim)
    return out


def _solve(tensors: Sequence[list[list[Factor]]], shapes: Sequence[tuple[int, ...]], form: str, call: Call) -> dict[str, int]:
    """The size of every factor. Raises RuleError where two places disagree."""
    sizes = {name: size for t in tensors for dim in t for name, size, _ in dim if size is not None}
    pending: list[tuple[list[str], int]] = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        if len(tensor) != len(shape):
            raise RuleError(f"{call.op.target}: {list(shape)} has {len(shape)} dimensions, the rule {form!r} has {len(tensor)}")
        pending += [([name for name, _, _ in dim], size) for dim, size in zip(tensor, shape, strict=True) if dim]
    while pending:
        later: list[tuple[list[str], int]] = []
        for names, size in pending:
            unknown = [n for n in names if n not in sizes]
            known = prod(sizes[n] for n in names if n in sizes)
            if len(unknown) > 1:
                later.append((names, size))
            elif unknown:
                if known == 0 or size % known:
                    raise RuleError(f"{call.op.target}: dimension of {size} is no multiple of {known} ({' '.join(names)} in {form!r})")
                sizes[unknown[0]] = size // known
            elif known != size:
                raise RuleError(f"{call.op.target}: dimension of {size}, the rule {form!r} makes it {known} ({' '.join(names)})")
        if len(later) == len(pending):
            raise RuleError(f"{call.op.target}: the sizes of {later[0][0]} are not determined by {form!r}")
        pending = later
    return sizes


def _sets(spec: str, call: Call, without: str = "") -> tuple[frozenset[int], ...]:
    """``"0|1+2"`` as sets of operand numbers; none with an operand or result of dtype ``without``."""
    found = () if any(t.dtype == without for t in call.results) else _members(spec, call)
    return tuple(members for members in found if all(call.operands[k].dtype != without for k in members))


def _members(spec: str, call: Call) -> tuple[frozenset[int], ...]:
    if not spec:
        return ()
    if spec == "all":
        return (frozenset(range(len(call.operands))),)
    if spec == "born":
        return (frozenset(),)
    first: list[int | None] = []
    count = 0
    for a in call.op.args:
        first.append(count if isinstance(a, Ref) else None)
        count += _refs(a)
    out: list[frozenset[int]] = []
    for group in spec.split("|"):
        members: list[int] = []
        for position in map(int, group.split("+")):
            operand = first[position] if position < len(first) else None
            if operand is not None:
                members.append(operand)
            elif position >= len(call.op.args) or call.op.args[position] != 0:
                break
        else:
            if members:
                out.append(frozenset(members))
    return tuple(out)


def _refs(arg: Arg) -> int:
    return 1 if isinstance(arg, Ref) else sum(map(_refs, arg)) if isinstance(arg, tuple) else 0
