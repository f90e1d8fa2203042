"""Logits of a large vocabulary are never held: the loss and its gradients are computed for a part of the rows at a time.

The region is found from shapes and rules alone: a product whose result is much larger than its rows, and all that lies between it and where these
rows become small again (a sum over them, a product back to the hidden size). Each of its ops must have a strategy that splits the rows; then the ops are written
once a chunk, on slices of what the region reads: sums are added up, rows are put together again. Forward and backward of a chunk stand side by side, as
in Liger (Hsu et al. 2024, section 3.2, FusedLinearCrossEntropy), so that what was made of a chunk is gone before the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from deepseed import cost
from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.layout import REPLICATED, Element, Layout, Partial, Split, local_shape
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Builder, Op, Program, Ref, Type
from deepseed.rules import localize_op
from deepseed.rules.blocks import Candidates, candidates, op_strategies
from deepseed.rules.strategy import Strategy

AXIS = "rows"  # of the chunks, while the pass looks for a split
WIDER = 4  # times as large as its rows: a product that is worth cutting
LARGEST = 100  # ops of a region: logits, loss and gradients are 17 to 32; more is a part of the model itself, which microbatches cut
CHUNK = 1 << 26  # bytes of the product that a chunk may have, where the number of chunks is not said


@program_pass(requires={"lowered"}, provides={"chunked"})
def chunk_rows(p: Program, chunks: int | None = None) -> Program:
    """Compute the widest product and what is made of it for ``chunks`` parts of its rows, one after another; ``0``: as many as keep each below ``CHUNK``
    bytes; None leaves the program as it is, and so does one without such a product, or where something else reads all of what it makes. Raises PassError where the
    rows can be cut, but not in so many.

    before: %x : f32[8, 4] batch "x"
            %w : f32[4, 64] param "w"
            %h = aten.mm(%x, %w) : f32[8, 64]
            %e = aten.exp(%h) : f32[8, 64]
            %s = sum(%e, dims=[0, 1], keepdim=false) : f32[]
    after, chunks=2:
            %x : f32[8, 4] batch "x"
            %w : f32[4, 64] param "w"
            %x.rows0 = slice(%x, dim=0, start=0, step=1) : f32[4, 4]
            %h.rows0 = aten.mm(%x.rows0, %w) : f32[4, 64]
            %e.rows0 = aten.exp(%h.rows0) : f32[4, 64]
            %s.rows0 = sum(%e.rows0, dims=[0, 1], keepdim=false) : f32[]
            %x.rows1 = slice(%x, dim=0, start=4, step=1) : f32[4, 4]
            %h.rows1 = aten.mm(%x.rows1, %w) : f32[4, 64]
            %e.rows1 = aten.exp(%h.rows1) : f32[4, 64]
            %s.rows1 = sum(%e.rows1, dims=[0, 1], keepdim=false) : f32[]
            %s = add_into(%s.rows0, %s.rows1) : f32[]
    """
    if chunks is None or chunks == 1:
        return p
    position = {op.name: n for n, op in enumerate(p.ops)}
    products = [op for op in p.ops if op.phase == "forward" and len(op.type.shape) == 2 and cost.flops(op, [p.types[r.name] for r in op.refs]) and _wide(p, op)]
    products.sort(key=lambda op: -op.type.local_bytes(p.mesh))
    found = candidates(p)
    for op in products:
        wanted = chunks or -(-op.type.local_bytes(p.mesh) // CHUNK)
        if wanted < 2:
            break
        for n in _numbers(op, wanted, exact=bool(chunks)):
            for region in _regions(p, op, n, position, found):
                return _write(p, region, position)
    for op in products if chunks else ():
        rows = op.type.shape[0]
        others = [n for n in range(2, rows + 1) if rows % n == 0 and n != chunks and next(_regions(p, op, n, position, found), None)]
        if others:
            where = op.path or "the top level"
            raise PassError(f"the {rows} rows of %{op.name} at {where} cannot be cut into {chunks} chunks\n  fix: chunkedN with N one of {', '.join(map(str, others))}, or chunked alone")
    return p


def _wide(p: Program, op: Op) -> bool:
    rows = next(ref for ref in op.refs if len(p.types[ref.name].shape) == 2)
    return prod(op.type.local(p.mesh)) >= WIDER * prod(p.types[rows.name].local(p.mesh))


def _numbers(op: Op, wanted: int, exact: bool) -> Iterator[int]:
    rows = op.type.shape[0]
    yield from [wanted] if exact else [n for n in range(wanted, 2 * wanted + 1) if rows % n == 0]


# the region ---------------------------------------------------------------------------------------------------------


@dataclass
class _Region:
    """``elements``: how each value that its ops make is split over the chunks. ``reads``: value from outside and the split in which it is read."""

    n: int
    ops: list[Op]
    elements: dict[str, Element]
    at: dict[str, Strategy]  # op -> how it is placed


def _regions(p: Program, product: Op, n: int, position: Mapping[str, int], found: Candidates) -> Iterator[_Region]:
    """Each legal region that begins with ``product``, its rows cut into ``n`` parts."""
    mesh = Mesh((*p.mesh.axes, (AXIS, n)))
    for s in op_strategies(product, p.types, AXIS, mesh, found):
        e = s.results[0]
        if isinstance(e, Split) and e.dim == 0 and not e.of:
            region = _spread(p, product, s, n, mesh, found)
            region = region and _closed(p, region, mesh, found, product.type.numel // 2, position)
            if region is not None:
                yield region


def _spread(p: Program, product: Op, first: Strategy, n: int, mesh: Mesh, found: Candidates) -> _Region | None:
    """What follows from the product's rows, as far as rows are kept or added up."""
    out = _Region(n, [], {}, {})
    for op in p.ops[p.ops.index(product) :]:
        if op is product:
            s: Strategy | None = first
        elif op.phase == "update" or not any(isinstance(out.elements.get(r.name), Split) for r in op.refs):
            continue
        else:
            s = _placed(p, op, [out.elements.get(r.name) if r.name in out.elements else ... for r in op.refs], mesh, found)
        if s is not None:
            out.ops.append(op)
            out.at[op.name] = s
            out.elements.update(zip(op.results, s.results, strict=True))
    return out


def _placed(p: Program, op: Op, given: Sequence[object], mesh: Mesh, found: Candidates, results: Mapping[int, Element] | None = None) -> Strategy | None:
    """A strategy of an op with these elements on its operands (``...``: any) and results; a move over other axes leaves the rows where they are."""
    if op.target in ("wait", "shard", "summand") or op.target.endswith(".start"):
        known = [e for e in (*given, *(results or {}).values()) if e is not ...]
        return Strategy((known[0],), (known[0],)) if len(op.refs) == len(op.results) == 1 and isinstance(known[0], Split) else None
    fits = [
        s for s in op_strategies(op, p.types, AXIS, mesh, found)
        if all(want is ... or want == have for want, have in zip(given, s.operands, strict=True)) and all(s.results[k] == e for k, e in (results or {}).items())
        and any(isinstance(e, Split) for e in (*s.operands, *s.results)) and not any(isinstance(e, Partial) for e in s.operands)
        and all(e == Partial("sum") or (isinstance(e, Split) and not e.of) for e in s.results)
    ]  # fmt: skip
    return fits[0] if fits else None


def _closed(p: Program, spread: _Region, mesh: Mesh, found: Candidates, wide: int, position: Mapping[str, int]) -> _Region | None:
    """The part of it that must stand together: what makes or reads a wide value, and what lies between; and what makes wide values for it alone."""

    def is_wide(value: str) -> bool:
        return isinstance(spread.elements.get(value), Split) and p.types[value].numel >= wide

    needed: set[str] = set()  # values that an op of the region needs
    ops: list[Op] = []
    for op in reversed(spread.ops):
        if any(r in needed or is_wide(r) for r in op.results) or any(is_wide(r.name) for r in op.refs):
            ops.append(op)
            needed.update(r.name for r in op.refs if r.name in spread.elements)
    at = {op.name: spread.at[op.name] for op in ops}
    elements = {r: e for op in ops for r, e in zip(op.results, at[op.name].results, strict=True)}
    pending = list(ops)
    while pending:  # wide operands that come from elsewhere, and what else reads them
        op = pending.pop()
        for ref, element in zip(op.refs, at[op.name].operands, strict=True):
            maker = p.producers.get(ref.name)
            if maker is None or maker.name in at or element is None or p.types[ref.name].numel < wide:
                continue
            elements[ref.name] = element
            for other in (maker, *(user for user in p.uses[ref.name] if isinstance(user, Op))):
                if other.name not in at:
                    s = _placed(p, other, [elements.get(r.name, ...) for r in other.refs], mesh, found, {k: elements[r] for k, r in enumerate(other.results) if r in elements})
                    if s is None:
                        return None
                    at[other.name] = s
                    elements.update(zip(other.results, s.results, strict=True))
                    ops.append(other)
                    pending.append(other)
    ops.sort(key=lambda op: position[op.name])
    region = _Region(spread.n, ops, {r: e for op in ops for r, e in zip(op.results, at[op.name].results, strict=True)}, at)
    return region if len(ops) <= LARGEST and _legal(p, region, wide) else None


def _legal(p: Program, region: _Region, wide: int) -> bool:
    """Every value is read as it is made, none that is wide is read outside, and nothing outside lies between two ops of the region; nothing knows its row's number."""
    names = {op.name for op in region.ops}
    chunks = Mesh(((AXIS, region.n),))
    after: set[str] = set()  # values outside that depend on the region
    for op in p.ops:
        if op.name not in names:
            if any(r.name in region.elements or r.name in after for r in op.refs):
                after.update(op.results)
                if op.target in ("wait",) and any(r.name in region.elements for r in op.refs):
                    return False  # of a collective that the region has started
            continue
        s = region.at[op.name]
        for ref, element in zip(op.refs, s.operands, strict=True):
            if ref.name in after or region.elements.get(ref.name, element) != element:
                return False
            if element is not None and not _sliceable(p.types[ref.name], element, p.mesh, region.n):
                return False
        if op.target.endswith(".start") and len(op.results) > 1:
            return False
        if localize_op(op, [_cut(p.types[r.name], e) for r, e in zip(op.refs, s.operands, strict=True)], chunks, {AXIS: region.n - 1}).kw("index") is not None and op.target != "full":
            return False
        for result, element, t in zip(op.results, s.results, op.types, strict=True):
            if isinstance(element, Split) and (not _sliceable(t, element, p.mesh, region.n) or (t.numel >= wide and _outside(p, result, names))):
                return False
    return True


def _outside(p: Program, value: str, names: set[str]) -> bool:
    return any(not isinstance(user, Op) or user.name not in names for user in p.uses[value])


def _sliceable(t: Type, element: Element, mesh: Mesh, n: int) -> bool:
    """Whether the split lies behind those that other axes make of the same dimension."""
    return not isinstance(element, Split) or all(not s.of and s.outer * mesh.size(axis) <= element.outer for axis, s in t.layout.splits(element.dim))


# the program --------------------------------------------------------------------------------------------------------


def _write(p: Program, region: _Region, position: Mapping[str, int]) -> Program:
    names = {op.name for op in region.ops}
    reads = {r.name for op in region.ops for r in op.refs if r.name not in region.elements}
    due = max([position[p.producers[r].name] for r in reads if r in p.producers] + [position[region.ops[0].name]])
    out = Builder(p)
    late: list[Op] = []
    dependent = set(region.elements)
    for n, op in enumerate(p.ops):
        if op.name in names:
            pass
        elif n < due and any(r.name in dependent for r in op.refs):
            dependent.update(op.results)
            late.append(op)
        else:
            out.emit(op)
        if n == due:
            _Chunks(p, region, out).run()
            for other in late:
                out.emit(other)
    return _with_origins(out.program())


@dataclass
class _Chunks:
    p: Program
    region: _Region
    out: Builder
    sums: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, list[str]] = field(default_factory=dict)

    def run(self) -> None:
        names = {op.name for op in self.region.ops}
        shown = [r for op in self.region.ops for r in op.results if _outside(self.p, r, names)]
        for i in range(self.region.n):
            self._chunk(i, shown)
        for value, pieces in self.pieces.items():
            self._together(value, pieces)

    @cached_property
    def whole(self) -> Mapping[str, Op]:
        """The groups of ops that stand in the region with all that they make."""
        names = {op.name for op in self.region.ops}
        outside = {op.origin for op in self.p.ops if op.name not in names}
        return {key: op for key, op in self.p.origins if key not in outside and all(r in self.region.elements for r in op.results)}

    def _chunk(self, i: int, shown: Sequence[str]) -> None:
        new: dict[tuple[str, Element], str] = {}
        chunks = Mesh(((AXIS, self.region.n),))
        for op in self.region.ops:
            s = self.region.at[op.name]
            operands = [_cut(self.p.types[r.name], e) for r, e in zip(op.refs, s.operands, strict=True)]
            for ref, element in zip(op.refs, s.operands, strict=True):
                if ref.name not in self.region.elements and element is not None and (ref.name, element) not in new:
                    assert isinstance(element, Split)
                    new[ref.name, element] = self._slice(op, ref.name, element, i)
            here = localize_op(replace(op, types=tuple([_cut(t, e) for t, e in zip(op.types, s.results, strict=True)])), operands, chunks, {AXIS: i})
            here = _reading(here, [self._here(new, r.name, e) for r, e in zip(op.refs, s.operands, strict=True)])
            results = tuple([self.out.fresh(f"{r}.{AXIS}{i}") for r in op.results])
            new.update(((r, e), name) for r, e, name in zip(op.results, s.results, results, strict=True))
            kwargs = tuple((k, v) for k, v in here.kwargs if k != "index" or op.target != "full")
            types = tuple([_part(t, e, self.region.n) for t, e in zip(op.types, s.results, strict=True)])
            origin = f"{op.origin}.{AXIS}{i}" if op.origin in self.whole else ""
            self.out.emit(replace(here, results=results, types=types, kwargs=kwargs, phase="backward" if self._backward else op.phase, origin=origin))
            for r, e, name in zip(op.results, s.results, results, strict=True):
                if r in shown:
                    self._show(op, r, e, name, i)
        self._groups(new, i)

    def _groups(self, new: Mapping[tuple[str, Element], str], i: int) -> None:
        """The op that each group of this chunk came from, on its rows."""
        of = {value: element for value, element in new if value not in self.region.elements}
        for key, op in self.whole.items():
            made = [(r, self.region.elements[r]) for r in op.results]
            types = tuple([_part(t, e, self.region.n) for t, (_, e) in zip(op.types, made, strict=True)])
            here = op.map_refs(lambda ref: Ref(self._here(new, ref.name, of.get(ref.name))))
            self.out.origins[f"{key}.{AXIS}{i}"] = replace(here, results=tuple([new[each] for each in made]), types=types)

    def _here(self, new: Mapping[tuple[str, Element], str], value: str, element: Element) -> str:
        if value in self.region.elements:
            return new[value, self.region.elements[value]]
        return value if element is None else new[value, element]

    @property
    def _backward(self) -> bool:
        return any(op.phase == "backward" for op in self.region.ops)

    def _op(self, like: Op, name: str, target: str, refs: Sequence[str], t: Type, kwargs: Mapping[str, int] | None = None) -> str:
        """An op at the place of ``like``."""
        phase = "backward" if self._backward else like.phase
        args = (tuple(map(Ref, refs)),) if target == "cat" else tuple(map(Ref, refs))
        self.out.emit(Op((name,), target, args, (t,), tuple((kwargs or {}).items()), phase, like.path, like.line, part=like.part, stage=like.stage))
        return name

    def _slice(self, like: Op, value: str, element: Split, i: int) -> str:
        """Part ``i`` of a value's rows: where other axes split them too, or they lie behind another factor, of a view that shows the parts."""
        t, n = self.p.types[value], self.region.n
        name = self.out.fresh(f"{value}.{AXIS}{i}")
        part = _part(t, element, n)
        if element.outer == 1:
            return self._op(like, name, "slice", [value], part, {"dim": element.dim, "start": i * part.shape[element.dim], "step": 1})
        seen = self._op(like, self.out.fresh(f"{name}.seen"), "reshape", [value], _seen(t, element, n))
        one = self._op(like, self.out.fresh(f"{name}.one"), "slice", [seen], _seen(t, element, n, 1), {"dim": element.dim + 1, "start": i, "step": 1})
        return self._op(like, name, "reshape", [one], part)

    def _show(self, op: Op, value: str, element: Element, name: str, i: int) -> None:
        if isinstance(element, Split):
            self.pieces.setdefault(value, []).append(name)
        elif value not in self.sums:
            self.sums[value] = name
        else:
            total = value if i == self.region.n - 1 else self.out.fresh(f"{value}.{AXIS}{i}.sum")
            self.sums[value] = self._op(op, total, "add_into", [self.sums[value], name], self.p.types[value])

    def _together(self, value: str, pieces: Sequence[str]) -> None:
        t, op, n = self.p.types[value], self.p.producers[value], self.region.n
        element = self.region.elements[value]
        assert isinstance(element, Split)
        if element.outer == 1:
            self._op(op, value, "cat", pieces, t, {"dim": element.dim})
            return
        seen = [self._op(op, self.out.fresh(f"{name}.seen"), "reshape", [name], _seen(t, element, n, 1)) for name in pieces]
        whole = self._op(op, self.out.fresh(f"{value}.seen"), "cat", seen, _seen(t, element, n), {"dim": element.dim + 1})
        self._op(op, value, "reshape", [whole], t)


def _reading(op: Op, names: Sequence[str]) -> Op:
    """The op on these values, in the order of its uses."""
    left = iter(names)
    return op.map_refs(lambda _: Ref(next(left)))


def _cut(t: Type, element: Element) -> Type:
    """The whole type with no layout but the chunks'."""
    return replace(t, layout=Layout.of(**{AXIS: element}) if isinstance(element, Split) else REPLICATED)


def _part(t: Type, element: Element, n: int) -> Type:
    """The type of one chunk's part."""
    return replace(t, shape=local_shape(t.shape, Layout.of(**{AXIS: element}), Mesh(((AXIS, n),)))) if isinstance(element, Split) else t


def _seen(t: Type, element: Split, n: int, count: int = 0) -> Type:
    """The type with the split dimension as (outer, n, rest), of ``count`` of the n parts (0: all)."""
    dim, outer = element.dim, element.outer
    shape = (*t.shape[:dim], outer, count or n, t.shape[dim] // outer // n, *t.shape[dim + 1 :])
    moved = {axis: replace(e, dim=e.dim + 2) if isinstance(e, Split) and e.dim > dim else e for axis, e in t.layout.elements}
    return replace(t, shape=shape, layout=Layout.of(**moved))


def _with_origins(p: Program) -> Program:
    """A group of which some ops are in the chunks is no group any more."""
    left = {op.origin for op in p.ops if op.origin}
    made = p.types
    kept = {key for key, whole in p.origins if key in left and all(r in made for r in whole.results)}
    ops = tuple(op if not op.origin or op.origin in kept else replace(op, origin="") for op in p.ops)
    return replace(p, ops=ops, origins=tuple((key, op) for key, op in p.origins if key in kept))
