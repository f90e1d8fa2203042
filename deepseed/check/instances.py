"""Is every rule that a program uses true? Each distinct instance is run once, sharded and whole, on small random tensors.

With typing this is an argument by induction that the program means what the single-device program means: every op is an
instance of a rule, and every instance that occurs was executed. Costs nothing in the size of the model: instances repeat, and
what was checked is remembered, in the process and on disk, until the source of a rule or an op changes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deepseed.check.collectives import perform
from deepseed.check.shards import ShardsError, assemble, coordinates, elsewhere, owner, shards
from deepseed.check.shrink import Instance, shrink
from deepseed.check.typing import KEYED, MOVES, SAME, describe, instance_key, operand_types, why_not
from deepseed.ir import sources
from deepseed.ir.collective import MEMORIES
from deepseed.ir.layout import REPLICATED, Layout, Owned, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Type
from deepseed.ops import OpError, run, torch_dtype
from deepseed.rules import localize_op, signature

TOLERANCE = 1e-10  # relative to the largest element of the result

# op -> the operand that points, the operand into which it points (-1: the result), its dimension (a string: position or keyword of
# the argument; "plane2": the last two together)
INDEXED: dict[str, tuple[int, int, int | str]] = {
    "embedding": (1, 0, 0),
    "gather": (1, 0, "dim"),
    "scatter_add": (1, 0, "dim"),
    "routed_mm": (2, 1, 0),
    "aten.scatter.src": (1, 0, "1"),
    "aten.scatter.value": (1, 0, "1"),
    "aten.index_select": (1, 0, "1"),
    "aten.scatter_reduce.two": (1, 0, "1"),
    "aten.max_pool2d_with_indices_backward": (2, 1, "plane2"),
    "aten.max_pool3d_with_indices_backward": (2, 1, "plane3"),
    "aten.adaptive_max_pool2d_backward": (2, 1, "plane2"),
    "aten.adaptive_max_pool3d_backward": (2, 1, "plane3"),
    "aten.max_unpool2d": (1, -1, "plane2"),
    "aten.max_unpool3d": (1, -1, "plane3"),
    "aten.nll_loss_forward": (1, 0, 1),
    "aten.nll_loss_backward": (2, 1, 1),
    "aten.nll_loss2d_forward": (1, 0, 1),
    "aten.nll_loss2d_backward": (2, 1, 1),
}

PIVOTED = ("aten.linalg_lu_solve", "aten.lu_unpack")

_passed: set[tuple[object, ...]] = set()  # instances as they stand in programs
_hashes: dict[Path, set[str]] = {}  # shrunk instances, by the file that remembers them


class InstanceError(ValueError):
    """An op that gives another result sharded than whole: names op, module path, line, layouts and the two numbers."""


def check_instances(p: Program, *, cache_dir: Path | str | None = None) -> int:
    """Run every distinct instance of ``p`` that was not checked before; return how many distinct instances ``p`` has.

    ``cache_dir``: default ``$DEEPSEED_CACHE_DIR`` or ``~/.cache/deepseed``. Raises InstanceError."""
    found: dict[tuple[object, ...], tuple[Op, tuple[Type, ...]]] = {}
    for bucket in p.ops:
        for op in _members(bucket) if bucket.target not in MEMORIES else ():
            operands = tuple([t.on(False) for t in operand_types(p, op)])  # an op means the same in both memories
            op = op if not any([t.host for t in op.types]) else op.typed(tuple([t.on(False) for t in op.types]))
            key = instance_key(op, operands)
            if key not in found:
                found[key] = op, operands
    fresh = [(on_mesh, op, operands) for key, (op, operands) in found.items() if (on_mesh := (key, p.mesh)) not in _passed]
    if fresh:
        file = _file(cache_dir)
        known = _known(file)
        new: list[str] = []
        for key, op, operands in fresh:
            large = Instance(op, operands, p.mesh)
            small = _small(large)
            digest = hashlib.sha256(repr((instance_key(small.op, small.operands), small.mesh)).encode()).hexdigest()[:24]
            if digest not in known:
                still = _still_typed(large, small)
                why = disagreement(small)
                if why is not None:
                    _remember(file, new)
                    raise InstanceError(
                        f"{describe(op, operands, p.mesh)}\n  {why}\n  checked as {describe(small.op, small.operands, small.mesh)}\n"
                        f"  fix: the rule of {op.target} in deepseed/rules, or the op in deepseed/ops"
                    )
                if still:
                    known.add(digest)
                    new.append(digest)
            _passed.add(key)
        _remember(file, new)
    return len(found)


def _members(op: Op) -> Sequence[Op]:
    """A bucket of collectives one by one: each tensor's is independent of the others'."""
    if len(op.results) == 1 or op.target not in MOVES:
        return (op,)
    return [replace(op, results=(result,), args=(ref,), types=(type_,)) for ref, result, type_ in zip(op.refs, op.results, op.types, strict=True)]


def disagreement(i: Instance) -> str | None:
    """Run one instance whole and on every rank; None where both agree, else which element differs, and both numbers."""
    op = i.op
    if op.target in (*SAME, "reshard") or not i.mesh.axes:
        return None  # the same on both sides by definition
    try:
        operands, wholes = _drawn(i)
    except InstanceError as error:
        return str(error)
    parts = [shards(x, t, i.mesh, _generator(n)) for n, (x, t) in enumerate(zip(operands, i.operands, strict=True))]
    if op.target in MOVES:
        axis = str(op.kw("axis"))
        ids = parts[1] if op.target in KEYED else ()
        results = [perform(op.target, parts[k], i.operands[k], t, axis, i.mesh, ids) for k, t in enumerate(op.types)]
    else:
        try:
            ranks = [
                run(localize_op(op, i.operands, i.mesh, c), [x[rank] for x in parts], i.mesh.seen_from(c)) for rank, c in enumerate(coordinates(i.mesh))
            ]
        except (OpError, LookupError) as error:
            return f"whole it runs, on a shard it does not: {error}"
        results = [[outs[k] for outs in ranks] for k in range(len(op.types))]
    for k, (whole, t) in enumerate(zip(wholes, op.types, strict=True)):
        try:
            got = assemble(results[k], t, i.mesh)
        except ShardsError as error:
            return f"result {k + 1}: {error}"
        why = unequal(got, whole, "put together from the shards", "whole") or _not_zero(results[k], t, i.mesh)
        if why is not None:
            return f"result {k + 1}: {why}"
    return None


def _not_zero(parts: Sequence[Tensor], t: Type, mesh: Mesh) -> str | None:
    """Where a rank has anything but zeros in rows that another owns."""
    for axis, e in t.layout.elements:
        if isinstance(e, Owned):
            whole = t.laid(Layout.of(**{a: s for a, s in t.layout.elements if isinstance(s, Split)}))
            for rank, c in enumerate(coordinates(mesh)):
                others = shards(elsewhere(torch.empty(t.shape), mesh.size(axis), c[axis], e).expand(t.shape), whole, mesh)[rank]
                if bool((parts[rank] * others).any()):
                    return f"rank {rank} has {parts[rank][others].abs().max().item()!r} in rows that another rank of {axis} owns"
    return None


def _drawn(i: Instance) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Random operands with the whole op's results: the first ranges of numbers on which it is finite."""
    best: tuple[int, list[Tensor], tuple[Tensor, ...]] | None = None
    whole_op = replace(i.op, types=tuple(t.laid(REPLICATED) for t in i.op.types))
    failure: Exception | None = None
    for seed, (low, high) in enumerate(((-2.0, 2.0), (0.1, 0.9), (1.1, 3.0))):
        generator = _generator(seed)
        operands = [_draw(i, k, t, low, high, generator) for k, t in enumerate(i.operands)]
        if i.op.target in MOVES:
            results: tuple[Tensor, ...] = tuple(operands[: len(i.op.types)])
        else:
            try:
                results = run(whole_op, operands, Mesh())
            except (OpError, LookupError) as error:
                failure = error
                continue
        wrong = sum(int((~torch.isfinite(x)).sum()) for x in results if x.dtype.is_floating_point)
        if best is None or wrong < best[0]:
            best = (wrong, operands, results)
        if not wrong:
            break
    if best is None:
        raise InstanceError(f"the whole op does not run on random operands: {failure}") from failure
    return best[1], best[2]


def _draw(i: Instance, k: int, t: Type, low: float, high: float, generator: torch.Generator) -> Tensor:
    dtype = torch_dtype(t.dtype)
    if t.dtype == "bool":
        return torch.rand(t.shape, generator=generator) < 0.7
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.rand(t.shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return torch.complex(real, real.flip(tuple(range(real.ndim)))) if dtype.is_complex else real.to(dtype)
    if i.op.target in PIVOTED and t.dtype == "i32":
        return torch.randint(1, t.shape[-1] + 1, t.shape, generator=generator).to(dtype)  # row numbers, counted from 1
    last = _indexed(i, k)
    if last is not None and k == len(i.operands) - 1:
        owned = next(((a, e) for x in (*i.operands, *i.op.types) for a, e in x.layout.elements if isinstance(e, Owned)), None)
        each = 0 if owned is None else last // i.mesh.size(owned[0])
        if owned is not None and each:  # ids that say of each row who owns it
            return owner(t.shape[0], i.mesh.size(owned[0]), owned[1].key) * each + torch.randint(0, each, t.shape, generator=generator)
    if last is not None:
        return torch.randint(0, max(last, 1), t.shape, generator=generator).to(dtype)
    return torch.randint(1, 5, t.shape, generator=generator).to(dtype)


def _indexed(i: Instance, k: int) -> int | None:
    """The size of the dimension into which integer operand ``k`` points; None where it is no index."""
    op = i.op
    if op.target in KEYED:
        return next(e.of for t in (i.operands[0], op.type) for _, e in t.layout.elements if isinstance(e, Owned)) if k == 1 else None
    if op.target in ("embedding_backward", "routed_outer"):
        return op.type.shape[0] if k == len(i.operands) - 1 else None
    if op.target in ("aten.index.Tensor", "aten.index_put"):
        where = op.args[1]
        at = [d for d, a in enumerate(where) if a is not None] if isinstance(where, tuple) else []
        return i.operands[0].shape[at[k - 1]] if 1 <= k <= len(at) else None
    pointer, table, where = INDEXED.get(op.target, (-1, 0, 0))
    if k != pointer:
        return None
    if isinstance(where, str) and where.startswith("plane"):
        return prod((op.type if table < 0 else i.operands[table]).shape[-int(where[5:]) :])
    dim = where if isinstance(where, int) else op.args[int(where)] if where.isdigit() else op.kw(where)
    shape = i.operands[table].shape
    return shape[dim] if isinstance(dim, int) and shape else 1


def unequal(got: Tensor, whole: Tensor, here: str, there: str) -> str | None:
    """None where ``got`` is ``whole`` up to rounding; else the first element that differs, and both numbers: ``here``, ``there``."""
    if got.dtype == whole.dtype and torch.equal(got, whole):
        return None
    if got.dtype.is_floating_point or got.dtype.is_complex:
        scale = max(float(torch.nan_to_num(whole.abs(), 0.0, 0.0, 0.0).max()), 1e-3) if whole.numel() else 1.0
        same = torch.isclose(got, whole, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True)
    else:
        same = got == whole
    if bool(same.all()):
        return None
    at = int((~same).flatten().to(torch.uint8).argmax())
    return f"element {at} of {list(whole.shape)} is {got.flatten()[at].item()!r} {here}, {whole.flatten()[at].item()!r} {there}"


def _small(i: Instance) -> Instance:
    """The instance at small sizes; as it is where it is no longer an instance of its rule then."""
    if signature(i.op, i.operands) is None and i.op.target not in (*MOVES, *SAME, "reshard"):
        return replace(i, mesh=Mesh())  # no rule: replicated, typing says so
    return shrink(i)


def _still_typed(large: Instance, small: Instance) -> bool:
    """Whether the instance is well typed at small sizes. Raises InstanceError where it is at its own sizes only."""
    why = why_not(small.op, small.operands, small.mesh)
    if why is not None and why_not(large.op, large.operands, large.mesh) is None:
        raise InstanceError(
            f"{describe(large.op, large.operands, large.mesh)}\n  is no instance of its rule at small sizes: {why}\n"
            f"  as {describe(small.op, small.operands, small.mesh)}"
        )
    return why is None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# memory -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Changes with the source of rules, ops, layouts and checks, and with torch."""
    text = sources.digest(sources.files("rules", "ops", "check", "ir/layout.py")) + torch.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(cache_dir: Path | str | None) -> Path:
    return _named(str(cache_dir or os.environ.get("DEEPSEED_CACHE_DIR") or ""), source_hash())


@lru_cache
def _named(base: str, source: str) -> Path:
    return (Path(base) if base else Path.home() / ".cache" / "deepseed") / f"instances-{source}.txt"


def _known(file: Path) -> set[str]:
    if file not in _hashes:
        try:
            _hashes[file] = set(file.read_text().split())
        except OSError:
            _hashes[file] = set()
    return _hashes[file]


def _remember(file: Path, digests: Sequence[str]) -> None:
    if digests:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as f:
                f.write("".join(d + "\n" for d in digests))
        except OSError:
            pass  # remembered in the process only
