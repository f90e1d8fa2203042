"""The groups of ops that one kernel computes, each as a small program of its own.

A group is a run of ops that stand side by side and carry the same ``kernel``: a mark, so that every check sees through it. Its fragment is what back ends
compile and caches are keyed by: a rank's shapes, no mesh, values numbered in order, no places, so that all layers of a model share one fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from deepseed.ir.layout import REPLICATED
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Input, Op, Output, Program, Ref, Type


@dataclass(frozen=True)
class Group:
    """``ops[first:last]`` of a program. ``reads``: values from outside, in the order of their first use; ``makes``: values that are read outside,
    or nowhere: where a lane is written out, what it sends is not read there (deepseed.unroll)."""

    kernel: str
    first: int
    last: int
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def groups(p: Program) -> Iterator[Group]:
    """The groups of a program, in order."""
    returned = {o.ref.name for o in p.outputs}
    for kernel, run in groupby(range(len(p.ops)), lambda n: p.ops[n].kernel):
        if kernel:
            at = list(run)
            ops = p.ops[at[0] : at[-1] + 1]
            inside, made = {id(op) for op in ops}, [r for op in ops for r in op.results]
            reads = dict.fromkeys(ref.name for op in ops for ref in op.refs if ref.name not in made)
            makes = [r for r in made if r in returned or not p.uses[r] or any(id(user) not in inside for user in p.uses[r])]
            yield Group(kernel, at[0], at[-1] + 1, tuple(reads), tuple(makes))


def fragment(p: Program, group: Group) -> Program:
    """A group of a localized program as a program of its own: ``%i0`` … are what it reads, ``%v0`` … what its ops make, ``return`` what is read outside."""
    ops = p.ops[group.first : group.last]
    new = {name: f"i{n}" for n, name in enumerate(group.reads)}
    new |= {result: f"v{n}" for n, result in enumerate(r for op in ops for r in op.results)}
    inputs = tuple(Input(new[name], _local(p.types[name], p.mesh), "batch", new[name]) for name in group.reads)
    outputs = tuple(Output(Ref(new[name]), "output", new[name]) for name in group.makes)
    return Program("kernel", Mesh(()), inputs, tuple(_bare(op, new, p.mesh) for op in ops), outputs)


def _bare(op: Op, new: dict[str, str], mesh: Mesh) -> Op:
    op = op.map_refs(lambda ref: Ref(new[ref.name]))
    return replace(op, results=_named(op.results, new), types=tuple([_local(t, mesh) for t in op.types]), path="", line="", origin="", part="", stage=0, kernel="", phase="forward")


def _named(results: Sequence[str], new: dict[str, str]) -> tuple[str, ...]:
    return tuple([new[r] for r in results])


def _local(t: Type, mesh: Mesh) -> Type:
    return replace(t, shape=t.local(mesh), layout=REPLICATED)
