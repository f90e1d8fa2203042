"""Runs of kernels as one call of compiled code. A large product empties the nearest caches, and what the interpreter does before the next kernel (views, new tensors, the call) comes back cold: 100 us for 5.

    given = [x, w]
    del x
    if (made := chain_2(given)) is not None:  # 9 kernels
        y, z = made
    else:
        x, w = given
        .. the ops' own lines, which run where there are several threads, or where a tensor lies otherwise

A chain has what lies between two ops that are no kernel in C++ and no view of one: a collective, an update, a write into what is stored, a product that is torch's. What is read outside is made as tensors; what stays inside lies in one piece
of memory, a place free again after its last use. ``chain_2`` stands in the source, as addresses (deepseed.codegen.cpp_chain.Chain).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from deepseed.codegen.cpp_chain import MOST
from deepseed.codegen.cpp_files import Fixed, Product
from deepseed.codegen.expressions import DTYPES, Source
from deepseed.codegen.places import Places, alike, extent, offset
from deepseed.ir.fragment import Group
from deepseed.ir.layout import contiguous
from deepseed.ir.mesh import TIME
from deepseed.ir.program import ITEMSIZE, Op

Shape = tuple[int, ...]
LEAST = 4  # kernels of a chain: what is checked and made for a call costs as much as two or three lines
HELD = 4 << 20  # bytes of given tensors that have ended, and of new ones that are made meanwhile, before a chain lets go of what has ended
NAMES = {word: name for name, word in DTYPES.items()}
SMALL = 1 << 16  # bytes of what is added to a sum here: a larger value is the first one's sum itself, where its op runs
VIEWS = ("reshape", "permute", "expand", "slice", "cast")


@dataclass(frozen=True)
class Chaining:
    """Of a localized program: strides of each value, which ops make views (deepseed.rules.strides), and by mark what computes a group."""

    strides: Mapping[str, Shape]
    views: Sequence[bool]
    codes: Mapping[str, object]


@dataclass(frozen=True)
class Chain:
    """``ops``: with their positions; ``given``: values, and sums over microbatches, by the name of their ``accumulate``; ``results``: the same."""

    name: str
    ops: Sequence[tuple[int, Op]]
    kernels: int
    given: tuple[str, ...]
    results: tuple[str, ...]
    text: list[str]


@dataclass(eq=False)
class _Piece:
    """Of memory: a value that is given, or something new, which is read outside where ``shown`` lists how."""

    shape: Shape
    strides: Shape
    dtype: str
    value: str = ""  # that is given
    begun: str = ""  # the sum that it begins with
    born: int = 0
    last: int = 0
    shown: list[tuple[int, Shape, Shape]] = field(default_factory=list)
    place: tuple[int, int] = (-1, 0)  # in what stays inside


@dataclass(frozen=True)
class _At:
    piece: _Piece
    offset: int  # in elements
    strides: Shape


def chains(
    out: Source, ops: Sequence[tuple[int, Op]], chaining: Chaining | None, grouped: Mapping[int, Group], names: Mapping[str, str], into: Mapping[str, Op], writes: Callable[[int, Op], bool], kept: Callable[[str], bool]
) -> dict[int, Chain]:
    """Of ops that run one after another, by the position of the first. ``names``: of kernels, by mark; ``into``: the sum of a product that is added as it is made; ``writes``: whether what is due in
    stored tensors after an op is written there; ``kept``: what is read beyond ``ops``."""
    if chaining is None:
        return {}
    found: dict[int, Chain] = {}
    run, at = _Run(out, chaining, names), 0
    donation, written = out.donation, set(out.donation.written.values())
    readers: dict[str, int] = {}  # the last of ops
    for n, op in ops:
        readers.update((ref.name, n) for ref in op.refs)

    def alone(n: int, op: Op) -> bool:
        """More than making results happens at it."""
        return op.type.host or any(r in donation.copied for r in op.results) or (n in written and writes(n, op))

    def close() -> None:
        nonlocal run
        if run.kernels >= LEAST:
            last = run.last
            found[run.first] = run.chain([each for each in ops if run.first <= each[0] <= last], lambda value: kept(value) or readers.get(value, -1) > last)
        run = _Run(out, chaining, names)

    while at < len(ops):
        n, op = ops[at]
        g = grouped.get(n)
        together = [ops[at]] if g is None else ops[at : at + g.last - g.first]
        at += len(together)
        if any(alone(*each) for each in together):
            done = False
        elif g is not None:
            done = run.add(n, g, into[op.name]) if op.name in into else run.call(n, g)
        elif op.target == "accumulate":
            done = op.name in run.sums if op.refs[0].name in into else run.sum(n, op)
        else:
            done = run.kernels == 0 or (chaining.views[n] and op.target in VIEWS and run.view(n, op))
        if not done:
            close()
    close()
    return found


def write(out: Source, chain: Chain, lines: Sequence[str], stores: Sequence[str], here: Callable[[str], bool]) -> None:
    """A chain's call in the place of its ops' ``lines``. ``stores``: what follows it; ``here``: whether a value has a name of its own in the function, as sums have not."""
    given = [out.name(value) if here(value) else f"v.get({out.name(value)!r})" for value in chain.given]
    bound = [out.name(value) if here(value) else f"v[{out.name(value)!r}]" for value in chain.results]
    inside = {r for _, op in chain.ops for r in op.results}
    dead = [v for n, _ in chain.ops for v in out.donation.dies.get(n, ()) if here(v) and (v in chain.results or v not in inside)]
    out.emit(f"given = [{', '.join(given)}]")
    if early := [out.name(v) for v in dead if v in chain.given]:
        out.emit(f"del {', '.join(early)}")
    out.emit(f"if (made := {chain.name}(given)) is not None:", f"{chain.kernels} kernels")
    for line in [f"{', '.join(bound)}{',' * (len(bound) == 1)} = made", *stores, f"del {', '.join(['made', *(out.name(v) for v in dead if v not in chain.given)])}"]:
        out.emit(f"    {line}")
    out.emit("else:")
    out.emit(f"    {', '.join([out.name(value) if here(value) else '_' for value in chain.given])}{',' * (len(given) == 1)} = given")
    out.emit("    given.clear()")
    out.lines += [f"    {line}" for line in lines]


class _Run:
    def __init__(self, out: Source, chaining: Chaining, names: Mapping[str, str]) -> None:
        self.out, self.p, self.chaining, self.names = out, out.p, chaining, names
        self.first, self.last, self.kernels = -1, -1, 0
        self.at: dict[str, _At] = {}
        self.given: dict[str, _Piece] = {}
        self.pieces: list[_Piece] = []  # new ones
        self.made: dict[str, int] = {}  # values, and the position of their op
        self.sums: dict[str, _Piece] = {}
        self.calls: list[tuple[str, list[_At], tuple[str, ...] | None]] = []  # function, tensors, and of a product the sum that it begins with, if any

    # ops --------------------------------------------------------------------------------------------------------------

    def view(self, n: int, op: Op) -> bool:
        at = self._of(op.refs[0].name)
        self._made(n, op.name, _At(at.piece, at.offset + offset(op, at.strides), self.chaining.strides[op.name]))
        return True

    def call(self, n: int, g: Group) -> bool:
        code = self.chaining.codes.get(g.kernel)
        if isinstance(code, Product):
            return self._product(n, g, code)
        if not isinstance(code, Fixed) or len(code.strides) + len(code.makes) > MOST:
            return False
        if any(not alike(self._shape(v), strides, self.chaining.strides[v]) for v, (_, _, strides, _) in zip(g.makes, code.outputs, strict=True)):
            return False
        reads = [self._of(v) for v in g.reads]
        made = [reads[code.into[k]] if k in code.into else self._new(tuple(shape), tuple(strides), NAMES[str(dtype)]) for k, (shape, strides, dtype) in enumerate(code.makes)]
        for value, (given, k, strides, before) in zip(g.makes, code.outputs, strict=True):
            base = (reads if given else made)[k]
            self._made(n, value, _At(base.piece, base.offset + before, tuple(strides)))
        self._called(n, g.last - 1, self.names[g.kernel], [*reads, *made], None)
        return True

    def _product(self, n: int, g: Group, code: Product) -> bool:
        operands = self._operands(g, code)
        if operands is None:
            return False
        made = self._new(tuple(code.shape), code.strides, "f32")
        self._made(n, g.makes[0], made)
        self._called(n, g.last - 1, self.names[g.kernel], [*operands[-2:], *operands[:-2], made], ())
        return True

    def add(self, n: int, g: Group, total: Op) -> bool:
        """A product that is added to a sum over microbatches."""
        code = self.chaining.codes.get(g.kernel)
        if not isinstance(code, Product) or total.name in self.sums or (operands := self._operands(g, code)) is None or len(operands) > 2:
            return False
        made = self._begun(total.name, tuple(code.shape), code.strides)
        self._called(n, g.last - 1, self.names[g.kernel], [*operands, made], (total.name,))
        return True

    def sum(self, n: int, op: Op) -> bool:
        """A sum over microbatches, of something that is made here."""
        x, shape = op.refs[0].name, self._shape(op.name)
        if x not in self.at or op.type.dtype != "f32" or 4 * prod(shape) > SMALL or getattr(self.p.types[x].layout.on(TIME), "op", "sum") != "sum" or not alike(shape, self.at[x].strides, contiguous(shape)):
            return False
        self._called(n, n, "sum", [self.at[x], self._begun(op.name, shape, contiguous(shape))], (op.name,))
        return True

    def _operands(self, g: Group, code: Product) -> list[_At] | None:
        """A row, where there is one, then left and right."""
        values = [g.reads[i] for i in code.order]
        if not code.takes(self.chaining.strides[values[-2]]) or (len(values) > 2 and (self._shape(values[0]), self.chaining.strides[values[0]]) != (tuple(code.row[0]), (1,))):
            return None
        return [self._of(v) for v in values]

    def _new(self, shape: Shape, strides: Shape, dtype: str) -> _At:
        piece = _Piece(shape, strides, dtype, born=len(self.calls))
        self.pieces.append(piece)
        return _At(piece, 0, strides)

    def _begun(self, total: str, shape: Shape, strides: Shape) -> _At:
        made = self._new(shape, strides, "f32")
        made.piece.begun, self.sums[total] = total, made.piece
        return made

    def _called(self, first: int, last: int, name: str, tensors: list[_At], start: tuple[str, ...] | None) -> None:
        self.first = first if self.first < 0 else self.first
        self.last, self.kernels = last, self.kernels + 1
        for t in tensors:
            t.piece.last = len(self.calls)
        self.calls.append((name, tensors, start))

    def _made(self, n: int, value: str, at: _At) -> None:
        self.at[value], self.made[value] = at, n

    def _of(self, value: str) -> _At:
        """Where a value begins; one that is given has a piece of its own."""
        if value not in self.at:
            strides = self.chaining.strides[value]
            piece = self.given[value] = _Piece(self._shape(value), strides, self.p.types[value].dtype, value)
            self.at[value] = _At(piece, 0, strides)
        return self.at[value]

    def _shape(self, value: str) -> Shape:
        return self.p.types[value].local(self.p.mesh)

    # source -----------------------------------------------------------------------------------------------------------

    def chain(self, ops: Sequence[tuple[int, Op]], read_later: Callable[[str], bool]) -> Chain:
        """``ops``: from the first to the last."""
        ended = {v for n, _ in ops for v in self.out.donation.dies.get(n, ())}
        shown = [v for v, n in self.made.items() if n <= self.last and read_later(v)]
        for v in shown:
            at = self.at[v]
            at.piece.shown.append((at.offset, self._shape(v), at.strides))
        used = {id(t.piece) for _, tensors, _ in self.calls for t in tensors} | {id(self.at[v].piece) for v in shown}
        given = [piece for piece in self.given.values() if id(piece) in used]
        sums, makes = list(self.sums), [piece for piece in self.pieces if piece.shown or piece.begun]
        for piece in makes:  # one tensor of it is made as it is shown
            if (whole := next((s for s in piece.shown if s[0] == 0 and extent(*s[1:]) == extent(piece.shape, piece.strides) and not piece.begun), None)) is not None:
                piece.shape, piece.strides = whole[1:]
        number = {id(piece): n for n, piece in enumerate([*given, *self.sums.values(), *makes])}  # of a sum the last: the memory that it is in
        size = self._inside()
        calls = self._rows([piece for piece in given if piece.value in ended], number, {total: len(given) + n for n, total in enumerate(sums)}, len(given) + len(sums) + len(makes))
        results = [(number[id(self.at[v].piece)], self.at[v].offset, self._shape(v), self.at[v].strides) for v in shown]
        results += [(number[id(piece)], 0, piece.shape, piece.strides) for piece in self.sums.values()]
        named = self.out.name(f"chain {self.out.p.ops[self.first].name}")
        text = [f"{named} = chain("]
        text += _listed("reads", (((piece.shape, piece.strides), value) for piece, value in [*((g, g.value) for g in given), *((self.sums[s], s) for s in sums)]))
        text += [f"    sums={{{', '.join(f'{len(given) + i}: {makes.index(self.sums[s])}' for i, s in enumerate(sums))}}},"]
        text += _listed("makes", ((f"({piece.shape}, {piece.strides}, {DTYPES[piece.dtype]})", "") for piece in makes))
        text += [f"    inside={size},"]
        text += _listed("calls", ((f"({', '.join(map(str, call))})", "") for call in calls))
        text += [*_listed("results", zip(results, [*shown, *sums], strict=True)), ")"]
        return Chain(named, ops, self.kernels, (*(g.value for g in given), *sums), (*shown, *sums), text)

    def _rows(self, ended: Sequence[_Piece], number: Mapping[int, int], begun: Mapping[str, int], inside: int) -> list[tuple[object, ...]]:
        """``ended``: given pieces that nothing reads after the chain; ``number``: of pieces, by identity; ``begun``: of the given sums; ``inside``: the piece of what stays inside."""

        def at(t: _At) -> tuple[int, int]:
            bytes_before = ITEMSIZE[t.piece.dtype] * t.offset
            return (number[id(t.piece)], bytes_before) if id(t.piece) in number else (inside, t.piece.place[0] + bytes_before)

        rows, dead, made_here = list[tuple[object, ...]](), list[_Piece](), list[_Piece]()
        for n, (name, tensors, total) in enumerate(self.calls):
            new = [piece for piece in self.pieces if piece.born == n and piece.shown]  # a sum is new once a step
            if dead and sum(map(_bytes, (*dead, *made_here, *new))) > HELD:
                rows.append((None, *(number[id(piece)] for piece in dead)))
                dead, made_here = [], []
            made_here += new
            dead += [piece for piece in ended if piece.last == n and not piece.shown]
            if total is None:
                rows.append((name, *map(at, tensors)))
            elif name == "sum":
                x, made = tensors
                rows.append((name, at(x), begun[total[0]], at(made), prod(made.piece.shape)))
            else:
                left, right, *row, made = tensors
                start = (begun[total[0]], 0, made.strides[0]) if total else (*at(row[0]), 0) if row else (-1, 0, 0)
                rows.append((name, at(left), left.strides, at(right), right.strides, start, at(made)))
        return rows

    def _inside(self) -> int:
        """Bytes of what stays inside, each piece at its place from the call that makes it to the last that reads it."""
        places = Places()
        stay = [piece for piece in self.pieces if not piece.shown and not piece.begun]
        for n in range(len(self.calls)):
            for piece in stay:
                if piece.born == n:
                    piece.place = places.take(_bytes(piece))
            for piece in stay:
                if piece.last == n:
                    places.free(*piece.place)
        return places.top


def _bytes(piece: _Piece) -> int:
    return extent(piece.shape, piece.strides) * ITEMSIZE[piece.dtype]


def _listed(name: str, rows: Iterable[tuple[object, str]]) -> list[str]:
    lines = [f"        {row},{f'  # {comment}' if comment else ''}" for row, comment in rows]
    return [f"    {name}=(", *lines, "    ),"] if lines else [f"    {name}=(),"]
