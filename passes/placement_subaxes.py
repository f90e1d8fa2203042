"""Which axes are placed as sub-axes: those that the major factor of a dimension cannot take alone, but shares with the next.

Attention's heads are (kv heads, group). Over four ranks two kv heads do not divide, and a split of the group alone would leave keys
and values whole on every rank; but one sub-axis of 2 may take the kv heads and one more the group. A sub-axis is placed like any axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import gcd, prod

from deepseed import cost
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.rules import signature


def with_sub_axes(p: Program, mesh: Mesh, axes: Iterable[str]) -> Mesh:
    """``mesh`` with each of ``axes`` as the sub-axes that the products of the program need; as it is where none does."""
    for axis in axes:
        ends = {end for sizes in _shares(p, mesh.size(axis)) for end in _ends(sizes)}
        if ends:
            mesh = mesh.refined(axis, _sizes(sorted(ends), mesh.size(axis)))
    return mesh


def _shares(p: Program, n: int) -> set[tuple[int, ...]]:
    """How the factors of a dimension share ``n`` ranks, major first, for each op with much to compute where the first does not take all."""
    out: set[tuple[int, ...]] = set()
    for op in p.ops:
        types = [p.types[r.name] for r in op.refs]
        sig = signature(op, types) if cost.flops(op, types) else None
        if sig is None:
            continue
        for dims in (*sig.operands, *sig.results):
            for names in dims:
                sizes = [sig.sizes[name] for name in names if name in sig.free]
                shares, left = [], n
                for size in sizes:
                    shares.append(gcd(size, left))
                    left //= shares[-1]
                shares = [share for share in shares if share > 1]
                if left == 1 and len(shares) > 1:
                    out.add(tuple(shares))
    return out


def _ends(sizes: tuple[int, ...]) -> list[int]:
    return [prod(sizes[: k + 1]) for k in range(len(sizes))]


def _sizes(ends: list[int], n: int) -> list[int]:
    """Sub-axes that end wherever a share ends; prime factors where those do not nest."""
    if all(after % before == 0 for before, after in pairwise(ends)):
        return [after // before for before, after in pairwise([1, *ends])]
    out, prime = [], 2
    while n > 1:
        while n % prime == 0:
            out.append(prime)
            n //= prime
        prime += 1
    return out
