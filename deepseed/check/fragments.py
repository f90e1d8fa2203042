"""Two expressions of one value, before and after a pass, run on small random tensors: do they agree?

An expression is followed down to values that both programs have (leaves); constants are always part of it. Where the leaves
are not the same, the latest of those that only one side reads is opened, until they are. Everything runs in float64, but for what is made
of constants alone: that is rounded as the program rounds it. What was proved is remembered, with the instances.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from deepseed.check import instances
from deepseed.check.shrink import Instance
from deepseed.check.smaller import MOST, Shapes, sizes
from deepseed.check.translation import Made, Numbering
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import FLOATS, Arg, Op, Type
from deepseed.ops import OpError, run, torch_dtype
from deepseed.rules import RuleError

MOST_OPS = 400  # of an expression
RANGES = ((-2.0, 2.0), (0.1, 0.9), (1.1, 3.0))  # of operands
FAR = ((10.0, 100.0), (-100.0, -10.0))  # where those give no number at all
UNSEEN = "on random operands it is no number"


@dataclass
class Fragment:
    """The expression of ``root``: opened values, and the leaves that it is made of."""

    side: Numbering
    root: int
    opened: dict[int, Made] = field(default_factory=dict)
    leaves: set[int] = field(default_factory=set)

    def open(self, n: int) -> bool:
        """Replace a leaf by what makes it; False where it is an input."""
        made = self.side.made.get(n)
        if made is None:
            return False
        self.leaves.discard(n)
        self.opened[n] = made
        self.leaves.update([m for m in made.operands if m not in self.opened])
        return True

    def close_over(self, other: Numbering, but: int | None = None) -> bool:
        """Open what the other program does not have (``but`` counts as such), and constants. Whether that was all, before there were too many ops."""
        constant, holders, opened = self.side.table.constant, other.holders, self.opened
        pending = [n for n in self.leaves if n == but or n in constant or holders.get(n, 0) <= 0]
        while pending and len(opened) <= MOST_OPS:
            n = pending.pop()
            if n in self.leaves and self.open(n):
                pending += [m for m in opened[n].operands if m not in opened and (m == but or m in constant or holders.get(m, 0) <= 0)]
        return not any(n in self.leaves and n in self.side.made for n in pending)

    def order(self) -> list[int]:
        """Opened values, operands first."""
        out: dict[int, None] = {}
        stack = [self.root] if self.root in self.opened else []
        while stack:
            n = stack[-1]
            missing = [m for m in self.opened[n].operands if m in self.opened and m not in out] if n not in out else []
            if missing:
                stack += missing
            else:
                stack.pop()
                out[n] = None
        return list(out)

    def ops(self) -> list[Op]:
        return list(dict.fromkeys(self.opened[n].op for n in self.order()))


def disagreement(before: Numbering, after: Numbering, was: int, now: int) -> tuple[str, list[Op], list[Op]] | None:
    """None where value ``was`` before is value ``now`` after; else why not, and the ops of both expressions."""
    old, new = Fragment(before, was, leaves={was}), Fragment(after, now, leaves={now})
    old.open(was)  # an input stays a leaf: what does nothing to it is dropped
    new.open(now)
    place = before.order
    why = "the expressions have no operands in common"
    first: tuple[str, list[Op], list[Op]] | None = None
    step = left = 0  # leaves to open before the next run: twice as many after each, so that an expression is run few times
    inside = False  # whether a leaf was made of the others alone: once none is, they can be drawn apart, and are
    further = ""
    while True:
        closed = [old.close_over(after, now), new.close_over(before)]
        if first is None and not all(closed):
            _unproved(new)
            return None
        fits = old.leaves <= new.leaves or new.leaves <= old.leaves
        if first is None and fits:
            found = _compared(old, new, False)
            if found is None:
                return None
            first, step, left = (found, old.ops(), new.ops()), 1, 1  # leaves that are made of one another are opened from here on
        both = old.leaves | new.leaves
        within = {n for n in both if n in before.made and both.issuperset(before.made[n].operands)} if first else set()
        apart = within or old.leaves ^ new.leaves | ({n for n in both if _made_of(before, n, both - {n})} if first else set())
        latest = max((n for n in apart if n in place), key=place.__getitem__, default=-1)
        opened = [each for each in (old, new) if latest in each.leaves]
        last = not all(latest in each.side.made for each in opened) or len(old.opened) + len(new.opened) > MOST_OPS
        if first is not None and fits and (last or not opened or left <= 0 or (inside and not within)):
            found = _compared(old, new, True)
            if found is None:
                return None
            further = found if found != first[0] else ""
            left = step = 2 * step
        inside = bool(within)
        if last or not opened or not all([each.open(latest) for each in opened]):
            break
        left -= 1
    if first is None:
        return why, old.ops(), new.ops()
    if first[0] == UNSEEN and not further:
        _unproved(new)
        return None
    return first if not further else (f"{first[0]}; with what their operands are made of, {further}", *first[1:])


def _made_of(side: Numbering, n: int, others: set[int]) -> bool:
    """Whether value ``n`` is computed from one of ``others``: then they cannot be drawn apart."""
    seen, pending = set[int](), [n]
    first = min(others, default=n)  # operands have smaller numbers than results
    while pending:
        made = side.made.get(pending.pop())
        for m in made.operands if made is not None else ():
            if m in others:
                return True
            if m not in seen and m > first:
                seen.add(m)
                pending.append(m)
    return False


def _compared(old: Fragment, new: Fragment, thorough: bool) -> str | None:
    """None where the expressions agree; remembered as they stand, and at the sizes at which they were run. Where they do not, this is
    remembered for the programs that share their table."""
    file = instances._file(None)
    known, differ, types = instances._known(file), old.side.table.differ, old.side.table.types
    digest = _digest(old, new, lambda n: types[n][1], thorough)
    if digest in known:
        return None
    if digest not in differ:
        why, proved = _agree(old, new, thorough, known)
        if why is None:
            proved = {digest, *proved} if proved is not None else set()
            instances._remember(file, sorted(proved - known))
            known.update(proved)
            return None
        differ[digest] = why
    return differ[digest]


def _agree(old: Fragment, new: Fragment, thorough: bool, known: Collection[str]) -> tuple[str | None, set[str] | None]:
    """None where the expressions agree, else why not; and, of smaller sizes, the digests at which that was shown (None: it was not)."""
    types = old.side.table.types
    try:
        shapes = _shapes(old, new)
    except RuleError as error:
        return f"no sizes fit an op of these: {error}", None
    own = {n: types[n][1] for n in shapes}
    if _elements(shapes) <= MOST:
        digest = _digest(old, new, shapes.__getitem__, thorough)
        if digest in known:
            return None, {digest}
        why, runs = _run(old, new, shapes, thorough)
        if why is None:
            return None, {digest}
        if own == shapes or (runs and _elements(own) > MOST):
            return why, None
        if _elements(own) <= MOST:  # it does not run at other sizes than its own, or a number in it was taken from a size
            again, _ = _run(old, new, own, thorough)
            return (again and (why if runs else again)), set()
    _unproved(new)
    return None, None  # too large to run, and it cannot be made smaller


def _unproved(new: Fragment) -> None:
    new.side.unproved.append(new.side.made[new.root].op.name if new.root in new.side.made else f"#{new.root}")


def _elements(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def _digest(old: Fragment, new: Fragment, shape: Callable[[int], tuple[int, ...]], thorough: bool) -> str:
    return hashlib.sha256(repr((thorough, _text(old, new, shape))).encode()).hexdigest()[:24]


def _shapes(old: Fragment, new: Fragment) -> dict[int, tuple[int, ...]]:
    """The shape of every value of both expressions, made small where that is the same question."""
    types = old.side.table.types
    ops = {id(m.op): (m.op, m.operands, _results(f, n)) for f in (old, new) for n, m in f.opened.items()}
    numbers = {n for _, operands, results in ops.values() for n in (*operands, *results)} | old.opened.keys() | new.opened.keys() | old.leaves | new.leaves
    return sizes(ops.values(), {n: types[n][1] for n in numbers}, {n: types[n][0] for n in numbers}, (old.root, new.root))


def _results(f: Fragment, n: int) -> tuple[int, ...]:
    """The numbers of all results of the op that makes ``n``."""
    made = f.opened[n]
    results = made.op.results
    return (n,) if len(results) == 1 and made.result == 0 else tuple([n if k == made.result else f.side.numbers[r] for k, r in enumerate(results)])


def _text(old: Fragment, new: Fragment, shape: Callable[[int], tuple[int, ...]]) -> list[object]:
    """Both expressions with values and sites numbered from the leaves up: equal for equal layers."""
    names: dict[object, int] = {}
    out: list[object] = []
    types = old.side.table.types
    for f in (old, new):
        local: dict[int, int] = {}
        for n in f.order():
            op, result, operands = f.opened[n].op, f.opened[n].result, f.opened[n].operands
            reads = [local[m] if m in local else ("leaf", names.setdefault(m, len(names)), types[m][0], shape(m)) for m in operands]
            site = None if (site := op.kw("site")) is None else names.setdefault(site, len(names))
            out.append((op.form, site, reads, result, [(t.dtype, shape(m)) for t, m in zip(op.types, _results(f, n), strict=True)]))
            local[n] = len(out)
        out.append(("end", local.get(f.root) or ("leaf", names.setdefault(f.root, len(names)))))
    return out


# running ------------------------------------------------------------------------------------------------------------


def _run(old: Fragment, new: Fragment, shapes: Shapes, thorough: bool) -> tuple[str | None, bool]:
    """None where both give the same numbers: on the first range of operands on which the old one is finite (``thorough``, or where
    a scalar could hide behind a bound: on all), and with each integer of its arguments among the integers, where it runs on them. Also
    whether the old one runs."""
    leaves = sorted(old.leaves | new.leaves)
    thorough = thorough or any(shapes[n] == () and old.side.table.types[n][0] in FLOATS for n in leaves)
    integers = any(old.side.table.types[n][0] == "i64" for n in leaves)
    marks = sorted({n for op in old.ops() for n in _integers(op.args)}) if integers else []
    best: tuple[int, dict[int, Tensor], Tensor] | None = None
    failure = ""
    for seed, (low, high, mark) in enumerate([*((*RANGES[0], m) for m in marks), *((*r, None) for r in (*RANGES, *FAR))]):
        if (low, high) in FAR and best is not None and _seen(best[2]):
            break
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: _leaf(n, old, new, shapes, low, high, generator) for n in leaves}
        if mark is not None:
            drawn = {n: _marked(x, mark, generator) for n, x in drawn.items()}
        try:
            whole = _value(old, drawn, shapes)
        except (OpError, LookupError) as error:
            failure = str(error)
            continue
        wrong = int((~torch.isfinite(whole)).sum()) if whole.dtype.is_floating_point else 0
        if mark is not None or (thorough and not wrong):
            why = _differ(new, drawn, whole, shapes)
            if why is not None:
                return why, True
        if mark is None and (best is None or wrong < best[0]):
            best = (wrong, drawn, whole)
        if not thorough and best is not None and not best[0]:
            break
    if best is None:
        return f"the expression before the pass does not run on random operands: {failure}", False
    if not _seen(best[2]):
        return _differ(new, best[1], best[2], shapes) or UNSEEN, True
    return _differ(new, best[1], best[2], shapes) if best[0] or not thorough else None, True


def _seen(whole: Tensor) -> bool:
    """Whether there is a number in it: NaN is equal to NaN, whatever it was made of."""
    return not (whole.dtype.is_floating_point or whole.dtype.is_complex) or not whole.numel() or not bool(whole.isnan().all())


def _differ(new: Fragment, drawn: dict[int, Tensor], whole: Tensor, shapes: Shapes) -> str | None:
    try:
        return _numbers(_value(new, drawn, shapes), whole)
    except (OpError, LookupError) as error:
        return f"the expression after the pass does not run: {error}"


def _value(f: Fragment, drawn: dict[int, Tensor], shapes: Shapes) -> Tensor:
    """The root, from the leaves."""
    table = f.side.table
    values = dict(drawn)
    done: dict[tuple[str, tuple[int, ...]], tuple[tuple[Tensor, ...], list[Tensor]]] = {}
    for n in f.order():
        made = f.opened[n]
        key = (made.op.results[0], made.operands)
        if key not in done:
            constant = n in table.constant
            operands = [values[m] if constant else _double(values[m]) for m in made.operands]
            if made.result < 0:
                operands = [x.clone() for x in operands]
            results = run(_whole(made.op, constant, [shapes[m] for m in _results(f, n)]), operands, Mesh())
            done[key] = (results, operands)
        results, operands = done[key]
        values[n] = results[made.result] if made.result >= 0 else operands[-1 - made.result]
    return _double(values[f.root])


def _whole(op: Op, native: bool, shapes: Sequence[tuple[int, ...]]) -> Op:
    """The op on whole tensors, in float64 unless ``native``."""
    types = tuple(Type(t.dtype if native else _wide(t.dtype), s) for t, s in zip(op.types, shapes, strict=True))
    if native:
        return replace(op, types=types)
    return replace(op, types=types, args=_widened(op.args), kwargs=tuple((k, v if k == "site" else _widened(v)) for k, v in op.kwargs))  # type: ignore[arg-type]


def _wide(dtype: str) -> str:
    return "f64" if dtype in FLOATS else "c128" if dtype == "c64" else dtype


def _widened(arg: Arg) -> Arg:
    if isinstance(arg, tuple):
        return tuple(_widened(a) for a in arg)
    return _wide(arg) if isinstance(arg, str) else arg


def _double(x: Tensor) -> Tensor:
    return x.double() if x.dtype.is_floating_point else x.to(torch.complex128) if x.dtype.is_complex else x


def _leaf(n: int, old: Fragment, new: Fragment, shapes: Shapes, low: float, high: float, generator: torch.Generator) -> Tensor:
    """A random tensor; a scalar is short enough for any float dtype that a kernel counts steps in; an integer that points stays
    inside what it points into."""
    dtype, shape = old.side.table.types[n][0], shapes[n]
    if dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.7
    if torch_dtype(dtype).is_floating_point:
        x = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return x if shape else (x * 64).ceil() / 64
    if torch_dtype(dtype).is_complex:
        return torch.complex(*(torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low for _ in range(2)))
    bounds = [b for f in (old, new) for b in _bounds(f, n, shapes)]
    if dtype == "i32" and any(n in f.opened[m].operands and f.opened[m].op.target in instances.PIVOTED for f in (old, new) for m in f.order()):
        return torch.randint(1, shape[-1] + 1, shape, generator=generator).to(torch_dtype(dtype))  # row numbers, counted from 1
    return torch.randint(0, max(1, min(bounds, default=5)), shape, generator=generator).to(torch_dtype(dtype))


def _integers(arg: Arg) -> Iterator[int]:
    if isinstance(arg, tuple):
        for a in arg:
            yield from _integers(a)
    elif isinstance(arg, int) and not isinstance(arg, bool):
        yield arg


def _marked(x: Tensor, mark: int, generator: torch.Generator) -> Tensor:
    """Every fourth integer, or so, is ``mark``: one that stands in an op's arguments, such as an ignored label's."""
    return torch.where(torch.rand(x.shape, generator=generator) < 0.25, mark, x) if x.dtype == torch.int64 else x


def _bounds(f: Fragment, n: int, shapes: Shapes) -> list[int]:
    """The sizes of the dimensions into which leaf ``n`` points, in any view of it."""
    views, found = {n}, []
    for m in f.order():
        made = f.opened[m]
        for k, operand in enumerate(made.operands):
            if operand in views:
                types = tuple(Type(f.side.table.types[o][0], shapes[o]) for o in made.operands)
                size = instances._indexed(Instance(_whole(made.op, True, [shapes[r] for r in _results(f, m)]), types, Mesh()), k)
                if size is not None:
                    found.append(size)
                elif made.op.target in ("reshape", "permute", "expand", "cast", "slice"):
                    views.add(m)
    return found


def _numbers(got: Tensor, whole: Tensor) -> str | None:
    if got.shape != whole.shape or got.dtype != whole.dtype:
        return f"{got.dtype}{list(got.shape)} after it, {whole.dtype}{list(whole.shape)} before it"
    why = instances.unequal(got, whole, "after it", "before it")
    return why and f"on random operands {why}"
