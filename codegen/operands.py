"""Where the elements of an op's operands are, by the index of its result: what every back end that writes source asks, and none of its own text."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import prod

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Index, divided, flat, reshaped
from deepseed.codegen.spaces import Indices
from deepseed.ir.program import Op, Program

Part = tuple[str, tuple[tuple[int, int, int], ...]]  # an operand, and the dimensions in which it has a part of the result: which, from where, to where


def broadcast(p: Program, x: str, index: Indices) -> Indices:
    """Of an operand that is spread over the result."""
    shape = p.types[x].shape
    return tuple(Index() if n == 1 else i for n, i in zip(shape, index[len(index) - len(shape) :], strict=True))


def moved(p: Program, op: Op, index: Indices) -> Indices | None:
    """Of the operand of an op that only says where elements stand; None for any other op."""
    match op.target:
        case "reshape":
            return reshaped(index, op.type.shape, p.types[op.refs[0].name].shape)
        case "permute":
            dims = op.kw("dims")
            assert isinstance(dims, tuple)
            return tuple(index[dims.index(d)] for d in range(len(dims)))
        case "expand":
            return broadcast(p, op.refs[0].name, index)
        case "slice":
            dim, start, step = _integers(op)
            return (*index[:dim], index[dim] * step + start, *index[dim + 1 :])
    return None


def parts(p: Program, op: Op) -> tuple[list[Part], float]:
    """Of what puts tensors side by side, ``cat``, ``pad`` and ``unslice``: its operands, and the number that stands where none is. Raises CodegenError."""
    dim, start, step = _integers(op)
    if op.target == "cat":
        ends = [0]
        for ref in op.refs:
            ends.append(ends[-1] + p.types[ref.name].shape[dim])
        return [(ref.name, ((dim, a, b),)) for ref, a, b in zip(op.refs, ends, ends[1:], strict=False)], 0.0
    name = op.refs[0].name
    inner = p.types[name].shape
    if op.target == "pad":
        pads, value = op.kw("pads"), op.kw("value", 0)
        assert isinstance(pads, tuple) and isinstance(value, int | float)
        before = [int(str(pads[2 * d])) for d in range(len(inner))]
        return [(name, tuple((d, before[d], before[d] + n) for d, n in enumerate(inner) if n != op.type.shape[d]))], value
    if step != 1:
        raise CodegenError(f"%{op.name} = unslice with step {step}: no kernel is written for it\n  fix: none is needed, the group runs as Python")
    return [(name, ((dim, start, start + inner[dim]),))], 0.0


def cuts(found: Sequence[Part], dim: int) -> list[int]:
    """Where the parts begin and end in a dimension."""
    return [n for _, places in found for d, *ends in places if d == dim for n in ends]


def overall(op: Op, index: Indices) -> Index:
    """The row-major place in the whole tensor of the element at ``index`` of a rank's part."""
    held = op.kw("index")
    if held is None:
        return flat(index, op.type.shape)
    assert isinstance(held, tuple)
    found, sizes = list[Index](), list[int]()
    for factors, i in zip(held, index, strict=True):
        assert isinstance(factors, tuple)
        numbers, rest = [tuple(int(str(n)) for n in f) for f in factors if isinstance(f, tuple)], i
        for k, (n, *here) in enumerate(numbers):
            minor = prod(m[2] if len(m) > 1 else m[0] for m in numbers[k + 1 :])
            q, rest = divided(rest, minor) if k + 1 < len(numbers) else (rest, Index())
            found.append(q + (here[0] if here else 0))
            sizes.append(n)
    return flat(found, sizes)


def site(op: Op) -> int:
    """The stable hash of where an op draws, as deepseed.ops.rng has it."""
    return int.from_bytes(blake2b(str(op.kw("site")).encode(), digest_size=8).digest(), "little")


def _integers(op: Op) -> tuple[int, int, int]:
    dim, start, step = (int(str(op.kw(k, d))) for k, d in (("dim", 0), ("start", 0), ("step", 1)))
    return dim, start, step
