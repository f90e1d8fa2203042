"""Integer expressions over the variables of an iteration space: where in a tensor a point of the space reads or writes.

    index ::= const + sum(coefficient * atom)
    atom  ::= Var | Quotient | Loaded

A reshape writes an index as a flat one and takes it apart again. Where a variable spans two dimensions of the new shape, ``Refine`` asks for the
variable in two parts, and the caller begins again with these: nothing is divided where the sizes allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod

PIECES = 8  # the most parts that a variable is unrolled into


@dataclass(frozen=True)
class Var:
    """``0 <= name < size``. ``unrolled``: written out, once for each of its values."""

    name: str
    size: int
    unrolled: bool = False

    @property
    def range(self) -> tuple[int, int]:
        return 0, self.size - 1


@dataclass(frozen=True)
class Quotient:
    """``of // by``, or ``of % by``, where neither can be simplified."""

    kind: str
    of: Index
    by: int

    @property
    def range(self) -> tuple[int, int]:
        low, high = self.of.range
        return (low // self.by, high // self.by) if self.kind == "//" else (0, self.by - 1)


@dataclass(frozen=True)
class Loaded:
    """A number that was read from memory, as an index below ``size``."""

    name: str
    size: int

    @property
    def range(self) -> tuple[int, int]:
        return 0, self.size - 1


Atom = Var | Quotient | Loaded


@dataclass(frozen=True)
class Index:
    const: int = 0
    terms: tuple[tuple[Atom, int], ...] = ()  # in the order of their names, no coefficient is 0

    @property
    def range(self) -> tuple[int, int]:
        ends = [(a.range, c) for a, c in self.terms]
        return self.const + sum(min(c * lo, c * hi) for (lo, hi), c in ends), self.const + sum(max(c * lo, c * hi) for (lo, hi), c in ends)

    @property
    def vars(self) -> frozenset[Var]:
        found: set[Var] = set()
        for a, _ in self.terms:
            found |= {a} if isinstance(a, Var) else a.of.vars if isinstance(a, Quotient) else set()
        return frozenset(found)

    @property
    def loaded(self) -> frozenset[str]:
        found: set[str] = set()
        for a, _ in self.terms:
            found |= {a.name} if isinstance(a, Loaded) else a.of.loaded if isinstance(a, Quotient) else set()
        return frozenset(found)

    def __add__(self, other: Index | int) -> Index:
        other = other if isinstance(other, Index) else Index(other)
        terms = dict(self.terms)
        for a, c in other.terms:
            terms[a] = terms.get(a, 0) + c
        return _index(self.const + other.const, terms)

    def __mul__(self, n: int) -> Index:
        return _index(self.const * n, {a: c * n for a, c in self.terms})

    def put(self, values: Mapping[Var, Index]) -> Index:
        """The same with variables replaced."""
        out = Index(self.const)
        for a, c in self.terms:
            if isinstance(a, Var):
                out += values.get(a, of(a)) * c
            elif isinstance(a, Quotient):
                inner = a.of.put(values)
                if inner == a.of:
                    out += Index(0, ((a, c),))
                else:
                    parts = divided(inner, a.by, refine=False)
                    out += parts[0 if a.kind == "//" else 1] * c
            else:
                out += Index(0, ((a, c),))
        return out


@dataclass
class Refine(Exception):
    """``var`` must be two variables, the minor one of ``minor`` values. ``unrolled``: the major one is written out."""

    var: Var
    minor: int
    unrolled: bool = False


def of(atom: Atom) -> Index:
    """An index that is one atom."""
    if isinstance(atom, Var) and atom.size == 1:
        return Index()
    return Index(0, ((atom, 1),))


def _index(const: int, terms: Mapping[Atom, int]) -> Index:
    return Index(const, tuple(sorted(((a, c) for a, c in terms.items() if c), key=lambda term: repr(term[0]))))


def divided(e: Index, by: int, refine: bool = True) -> tuple[Index, Index]:
    """``e // by`` and ``e % by`` for an index that is not negative."""
    if by == 1:
        return e, Index()
    whole, rest = Index(e.const // by), Index(e.const % by)
    for a, c in e.terms:
        if c % by == 0:
            whole += Index(0, ((a, c // by),))
        else:
            rest += Index(0, ((a, c),))
    low, high = rest.range
    if low >= 0 and high < by:
        return whole, rest
    for a, c in rest.terms:
        if refine and isinstance(a, Var) and c > 0 and by % c == 0 and a.size * c > by and a.size % (by // c) == 0:
            raise Refine(a, by // c)
    return whole + Index(0, ((Quotient("//", rest, by), 1),)), Index(0, ((Quotient("%", rest, by), 1),))


def flat(index: Sequence[Index], shape: Sequence[int]) -> Index:
    """The place of an element in row-major order."""
    out = Index()
    for n, (i, size) in enumerate(zip(index, shape, strict=True)):
        if size > 1:
            out += i * prod(shape[n + 1 :])
    return out


def _whole(e: Index) -> Index:
    """The same where an index and its rest stand side by side: ``by * (x // by) + x % by`` is x."""
    terms = dict(e.terms)
    for a, c in e.terms:
        if isinstance(a, Quotient) and a.kind == "//" and c % a.by == 0 and terms.get(Quotient("%", a.of, a.by)) == c // a.by:
            del terms[a], terms[Quotient("%", a.of, a.by)]
            return _whole(_index(e.const, terms) + a.of * (c // a.by))
    return e


def covers(index: Sequence[Index], shape: Sequence[int]) -> bool:
    """Whether an index goes through each element of a tensor once, as its variables go through their values: in some order of these, they are the digits of its place."""
    place, at = _whole(flat(index, shape)), 1
    if place.const or not all(isinstance(a, Var) for a, _ in place.terms):
        return False
    for c, size in sorted((c, a.size) for a, c in place.terms if isinstance(a, Var)):
        if c != at:
            return False
        at *= size
    return at == prod(shape)


def unflat(place: Index, shape: Sequence[int]) -> tuple[Index, ...]:
    """The indices of the element at a row-major place."""
    out: list[Index] = []
    for n, size in enumerate(shape):
        stride = prod(shape[n + 1 :])
        if size == 1:
            out.append(Index())
        else:
            q, place = divided(place, stride)
            out.append(q)
    return tuple(out)


def reshaped(index: Sequence[Index], old: Sequence[int], new: Sequence[int]) -> tuple[Index, ...]:
    """The index, in a tensor of the shape ``new``, of the element at ``index`` of one of the shape ``old``."""
    out: list[Index] = []
    i = j = 0
    while i < len(old) or j < len(new):  # runs of dimensions with as many elements in one as in the other
        a, b, ii, jj = 1, 1, i, j
        while True:
            if ii < len(old) and (a <= b or jj == len(new)):
                a, ii = a * old[ii], ii + 1
            elif jj < len(new):
                b, jj = b * new[jj], jj + 1
            if a == b or (ii == len(old) and jj == len(new)):
                break
        out += [index[i]] if (ii - i, jj - j) == (1, 1) else unflat(flat(index[i:ii], old[i:ii]), new[j:jj])
        i, j = ii, jj
    return tuple(out)


def within(e: Index, low: int, high: int, cut: Iterable[int] = ()) -> bool | None:
    """Whether ``low <= e < high``; None where it depends on the point. Raises Refine where parts of a variable, few enough to be written out, would decide
    it; ``cut``: other numbers at which they should end too."""
    least, most = e.range
    if least >= low and most < high:
        return True
    if most < low or least >= high:
        return False
    if len(e.terms) == 1 and isinstance(e.terms[0][0], Var) and e.terms[0][1] == 1:
        var = e.terms[0][0]
        part = var.size
        for n in (low, high, *cut):
            if least < n <= most:
                part = gcd(part, n - e.const)
        if 1 < var.size // part <= PIECES:
            raise Refine(var, part, unrolled=True)
    return None


def write(e: Index, name: Callable[[Atom], str]) -> str:
    """As source."""
    words = [name(a) if c == 1 else f"{name(a)} * {c}" for a, c in e.terms]
    if e.const or not words:
        words.append(str(e.const))
    return " + ".join(words).replace("+ -", "- ")
