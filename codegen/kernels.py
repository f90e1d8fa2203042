"""A group of ops as a function of its own: readable Python, which back ends trace, and which runs where none compiles it.

    def kernel_pow_sum_rsqrt_mul_3f2a91c0(i0, i1):
        device = i0.device
        v0 = torch.pow(i0, 2)  # f32[4, 16, 32]
        ..
        return (v4, v6)

The name says what is computed and the digest which fragment it is: all layers of a model share one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from deepseed.codegen.expressions import Source, assignment, listed
from deepseed.ir.fragment import Group, fragment, groups
from deepseed.ir.kernels import BIASED, PRODUCT, UNMASKED
from deepseed.ir.program import Op, Program
from deepseed.ir.text import format_type

NONE: Mapping[str, str] = {}  # no group has a function of its own
_MOVES = ("reshape", "permute", "expand", "slice", "unslice", "cast", "full", "iota")
WORDS = 4  # of a name
COMPILED: ContextVar[Callable[[int, int], object]] = ContextVar("COMPILED", default=lambda done, of: None)  # hears how many kernels of how many a back end has compiled


@dataclass(frozen=True)
class Kernel:
    """One distinct fragment on operands that lie in one way (``strides``, by input); ``source``: its function, which returns a tuple. ``lying``: of each op, how its results lie and
    whether they are views."""

    name: str
    fragment: Program
    strides: tuple[tuple[int, ...], ...]
    source: str
    lying: tuple[tuple[tuple[tuple[int, ...], ...], bool], ...] = ()


def is_attention(k: Kernel) -> bool:
    return len(k.fragment.ops) == 1 and k.fragment.ops[0].target in UNMASKED


def is_product(k: Kernel) -> bool:
    return len(k.fragment.ops) == 1 and k.fragment.ops[0].target in (PRODUCT, BIASED)


def kernels(p: Program, strides: Mapping[str, tuple[int, ...]], views: Sequence[bool]) -> dict[str, Kernel]:
    """What computes each group of a localized program, by the group's mark. ``strides``: of all values; ``views``: of each op, whether it makes one."""
    known: dict[str, Kernel] = {}
    out = {}
    for group in groups(p):
        part, lying = fragment(p, group), tuple([strides[name] for name in group.reads])
        text = f"{part}{lying}"
        if text not in known:
            name = f"kernel_{'_'.join(_words(part.ops))}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            known[text] = Kernel(name, part, lying, function(part, name), tuple((tuple(strides[r] for r in p.ops[n].results), views[n]) for n in range(group.first, group.last)))
        out[group.kernel] = known[text]
    return out


def function(p: Program, name: str) -> str:
    """The source of a fragment's function. Raises CodegenError for an op that has no expression."""
    out = Source(p)
    lines = [f"def {name}({', '.join(out.name(i.name) for i in p.inputs)}):", f"    device = {out.name(p.inputs[0].name)}.device"]
    returned, given = [o.ref.name for o in p.outputs], {i.name for i in p.inputs}
    last = {ref.name: n for n, op in enumerate(p.ops) for ref in op.refs}
    for n, op in enumerate(p.ops):
        out.emit(assignment(out, op), ", ".join(format_type(t, p.mesh) for t in op.types))
        dead = [r for r in dict.fromkeys((*(ref.name for ref in op.refs), *op.results)) if last.get(r, n) == n and r not in returned and r not in given]
        if dead:
            out.emit(f"del {', '.join(map(out.name, dead))}")
    return "\n".join([*lines, *out.lines, f"    return {listed([out.name(r) for r in returned])}"]) + "\n"


def call(out: Source, p: Program, group: Group, name: str) -> None:
    """The line of a step that calls a kernel."""
    types = ", ".join(format_type(p.types[r], p.mesh) for r in group.makes)
    out.emit(f"{', '.join(map(out.name, group.makes))}{',' * (len(group.makes) == 1)} = {name}({', '.join(map(out.name, group.reads))})", types)


def starts(p: Program, names: Mapping[str, str]) -> dict[int, Group]:
    """The groups that ``names`` has a function for, by the place of their first op."""
    return {g.first: g for g in groups(p) if g.kernel in names} if names else {}


def _words(ops: Sequence[Op]) -> list[str]:
    found = dict.fromkeys(re.sub(r"\W", "_", (op.target.split(".") * 2)[1 if op.target.startswith("aten.") else 0]) for op in ops if op.target not in _MOVES)
    return list(found)[:WORDS] or ["moves"]
