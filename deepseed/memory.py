"""How much memory one rank's step needs: liveness over storages, in the program's own order.

A view shares its base's storage (deepseed.rules.strides says which ops make views). A storage is freed after the last use of any value on it; parameters and optimizer state stay, and what is
updated in place takes no second copy (deepseed.codegen.donation says which). What a collective reads stays until its
``wait``. Attention's copies of keys and values that several query heads share, and of a mask of booleans, are counted, and the words of a random draw; other scratch
space inside kernels and collectives (the blocks that gloo's reduce_scatter receives) is not. What lies on the host is counted apart: the peak is the device's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from deepseed.codegen.donation import Donation
from deepseed.codegen.optim import UPDATES, run_from
from deepseed.ir.collective import KEYED, MEMORIES
from deepseed.ir.fragment import groups
from deepseed.ir.layout import factors, part
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import ITEMSIZE, Op, Program, Ref, Type
from deepseed.rules.strides import Lying, Strides, contiguous, in_front, laid_out

STORED = ("param", "buffer", "state", "constant")  # what stays between steps
WORDS = {"bernoulli": (2, 0), "uniform": (2, 16), "normal": (1, 32)}  # elements that share a random word, and bytes that a word takes beside itself while it is made a number
BLOCK = 2**14  # words on which a draw works at once (deepseed.ops.rng)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device. ``peak_at``: the op during which ``peak_bytes`` are live; ``resident_bytes``: what stays between steps;
    ``host_bytes``: the most that lies on its host."""

    peak_bytes: int
    peak_at: str
    resident_bytes: int
    host_bytes: int = 0


def memory(p: Program) -> Memory:
    """The liveness peak of a lowered program, or of what is executed of it (after group_kernels). Needs no values."""
    return _Liveness(p).run()


def as_kernels(p: Program) -> Program:
    """With one op for each group: a kernel keeps what it does not return in registers."""
    found = {g.first: g for g in groups(p)}
    if not found:
        return p
    ops: list[Op] = []
    n = 0
    while n < len(p.ops):
        if (g := found.get(n)) is None:
            ops.append(p.ops[n])
            n += 1
            continue
        ops.append(replace(p.ops[n], results=g.makes, target="kernel", args=tuple(map(Ref, g.reads)), kwargs=(), types=tuple([p.types[r] for r in g.makes])))
        n = g.last
    return replace(p, ops=tuple(ops))


def curve(p: Program, kinds: Mapping[str, str]) -> tuple[Mapping[str, int], ...]:
    """Bytes live while each op runs, by kind; one row an op. ``kinds``: what the storage that a value made is counted as; of a value
    that is not there, as ``other``. The sum of a row is what ``memory`` takes its peak from."""
    liveness = _Liveness(p, kinds)
    moments = liveness.moments()
    next(moments)  # the inputs
    return tuple(dict(liveness.live) for _ in moments)


def live_bytes(p: Program) -> list[int]:
    """Bytes live while each op runs."""
    return [sum(row.values()) for row in curve(p, {})]


class _Liveness:
    """Storages by number: their bytes, and how many values (and collectives under way) still need each."""

    def __init__(self, p: Program, kinds: Mapping[str, str] | None = None) -> None:
        whole, p = p, as_kernels(p)
        self.within: Mapping[str, Strides] = laid_out(whole)[0] if p is not whole else {}  # how kernels lay out what they return
        self.p, self.donation = p, Donation(p)
        self.kinds = kinds or {}
        self.kind: list[str] = []
        self.live: Counter[str] = Counter()  # bytes by kind
        self.nbytes: list[int] = []
        self.needed: list[int] = []
        self.storage: dict[str, int] = {}
        self.lying = Lying(p)
        self.strides = self.lying.strides
        self.under_way: dict[str, int] = {}  # started collective -> the storage that it reads
        self.on_host: list[bool] = []
        self.now = self.host = 0
        self.together = calls(p)
        self.ending: dict[int, list[str]] = {}

    def run(self) -> Memory:
        peak, peak_at, host = 0, "", 0
        for name, now in self.moments():
            host = max(host, self.host)
            if now > peak or not peak_at:
                peak, peak_at = now, name
        stored = sum(self.nbytes[self.storage[i.name]] for i in self.p.inputs if i.role in STORED and not i.type.host)
        return Memory(peak, peak_at, stored, host)

    def moments(self) -> Iterator[tuple[str, int]]:
        """(op, bytes live while it runs), after ("inputs", the bytes of all inputs)."""
        for i in self.p.inputs:
            self._new(i.name, i.type.local_bytes(self.p.mesh), i.type.host)
            if i.role in STORED or (i.role == "batch" and i.type.local(self.p.mesh) == i.type.shape):  # the caller holds what is not cut
                self.needed[self.storage[i.name]] += 1
        yield "inputs", self.now
        self._free(self.donation.dies.get(-1, ()))
        for n, op in enumerate(self.p.ops):
            if op.target == "wait":  # the first wait of a bucket ends what all of it reads, before the result is laid out
                for started in self.p.producers[op.refs[0].name].results:
                    if started in self.under_way:
                        self._release(self.under_way.pop(started))
            self._define(n, op)
            if op.target.endswith(".start"):
                self.under_way.update((result, self._sent(op, i)) for i, result in enumerate(op.results))
            scratch = self._scratch(op)
            yield op.name, self.now
            for storage in scratch:
                self._release(storage)
            last = self.together.get(n, n)  # updates that one call does end together
            if last != n:
                self.ending.setdefault(last, []).extend(self.donation.dies.get(n, ()))
            else:
                self._free((*self.ending.pop(n, ()), *self.donation.dies.get(n, ())))

    def _scratch(self, op: Op) -> Sequence[int]:
        """The storages that an op needs while it runs. A draw: a block of random words. Attention (deepseed.ops.attention): keys and values by
        query heads, in the backward their gradients too, and a mask as numbers."""
        first = len(self.nbytes)
        if op.target in WORDS:
            self._new("", drawn(op.type, self.p.mesh, *WORDS[op.target]))
        if op.target not in ("sdpa", "sdpa_backward"):
            return range(first, len(self.nbytes))
        backward = op.target == "sdpa_backward"
        q, k, v, *masks = (self.p.types[r.name] for r in op.refs[backward:])
        heads, shared = q.local(self.p.mesh)[1], k.local(self.p.mesh)[1]
        summed = 0  # results that are made when the mask is gone
        if heads != shared:
            for t in (k, v) * ((shared > 1) + backward):  # one head for all is seen as many without a copy
                self._new("", t.local_bytes(self.p.mesh) // shared * heads)
            summed = sum(t.local_bytes(self.p.mesh) for t in op.types[1:]) * backward
        if masks and masks[0].dtype == "bool":
            self._new("", max(0, prod(masks[0].local(self.p.mesh)) * ITEMSIZE[q.dtype] - summed))
        return range(first, len(self.nbytes))

    def _new(self, value: str, nbytes: int, host: bool = False) -> None:
        self.nbytes.append(nbytes)
        self.on_host.append(host)
        self.needed.append(1)
        self.storage[value] = len(self.nbytes) - 1
        self.kind.append(self.kinds.get(value, "other"))
        self._count(len(self.nbytes) - 1, nbytes)

    def _count(self, storage: int, nbytes: int) -> None:
        if self.on_host[storage]:
            self.host += nbytes
        else:
            self.live[self.kind[storage]] += nbytes
            self.now += nbytes

    def _share(self, value: str, other: str) -> None:
        self.storage[value] = self.storage[other]
        self.needed[self.storage[other]] += 1

    def _free(self, values: Sequence[str]) -> None:
        for value in values:
            self._release(self.storage[value])

    def _release(self, storage: int) -> None:
        self.needed[storage] -= 1
        if self.needed[storage] == 0:
            self._count(storage, -self.nbytes[storage])

    def _define(self, n: int, op: Op) -> None:
        """Place the op's results."""
        if op.target.startswith("optim."):
            return self._update(n, op)
        if op.target.endswith(".start") and len(op.results) > 1:
            return self._bucket(op)
        if op.target == "add_into" and self.donation.taken(op):
            self._share(op.name, op.refs[0].name)
            self.strides[op.name] = self.strides[op.refs[0].name]
            return None
        view = self.lying.view(op)
        for result, t in zip(op.results, op.types, strict=True):
            shape = t.local(self.p.mesh)
            if view is not None:
                self._share(result, op.refs[0].name)
                self.strides[result] = view
            else:
                self._new(result, self._arriving(op)[0] if _exchanges(op) else t.local_bytes(self.p.mesh), t.host)
                self.strides[result] = self.within[result] if op.target == "kernel" else self.lying.fresh(op, shape)
            if result in self.donation.copied:
                self._new(result, t.local_bytes(self.p.mesh), t.host)
        return None

    def _bucket(self, op: Op) -> None:
        """Several tensors in one packed buffer, which lives as long as any of them."""
        self._new(op.results[0], sum(self._arriving(op)))
        for result, t in zip(op.results, op.types, strict=True):
            if result != op.results[0]:
                self._share(result, op.results[0])
            self.strides[result] = contiguous(t.local(self.p.mesh))

    def _arriving(self, op: Op) -> list[int]:
        """Bytes of what an exchange brings, by operand: uneven parts travel as large as the largest."""
        return [elements * ITEMSIZE[t.dtype] for (_, elements), t in zip(self.lying.exchange(op), op.types, strict=True)]

    def _update(self, n: int, op: Op) -> None:
        """A fused optimizer: each entry in place, or on a copy where its stored tensor has a later reader."""
        stored = {o.ref.name: name for name, o in self.donation.stored.items()}
        for result, t in zip(op.results, op.types, strict=True):
            old = stored.get(result)
            block = next((r.name for r in op.refs if self.donation.in_block(n, r.name, result)), None)
            if old is not None and self.donation.in_place(n, old, result):
                self._share(result, old)
            elif block is not None:
                self._share(result, block)
            else:
                self._new(result, t.local_bytes(self.p.mesh), t.host)
            self.strides[result] = contiguous(t.local(self.p.mesh))

    def _sent(self, op: Op, operand: int = 0) -> int:
        """The storage that a collective reads until its wait: contiguous, blocks first; a copy where the operand does not lie so."""
        x = op.refs[operand].name
        if op.target in MEMORIES:
            self.needed[self.storage[x]] += 1
            return self.storage[x]
        if len(op.results) > 1:  # a packed copy; an all_reduce works in it
            self._new("", 0 if op.target == "all_reduce.start" else self.lying.exchange(op)[operand][0] * ITEMSIZE[self.p.types[x].dtype])
            return len(self.nbytes) - 1
        s, shape = self.lying.step(op), self.p.types[x].local(self.p.mesh)
        if s.kind in KEYED:  # a sorted copy of the rows that this rank has, or of those that it owns: one in n where ids are uniform
            self._new("", min(self.p.types[x].local_bytes(self.p.mesh), op.type.local_bytes(self.p.mesh)))
            return len(self.nbytes) - 1
        ((brought, _),) = self.lying.exchange(op)
        if self.strides[x] == contiguous(shape) and (s.take is None or in_front(shape, s.take)) and brought == prod(shape):
            self.needed[self.storage[x]] += 1
            return self.storage[x]
        self._new("", brought * ITEMSIZE[self.p.types[x].dtype])
        return len(self.nbytes) - 1


def drawn(t: Type, mesh: Mesh, each: int, beside: int) -> int:
    """Bytes of a block of random words, as deepseed.ops.rng makes them: of one run of elements counters, words and shifted words; of several short runs words and
    shifted words; of runs that do not end with a word all of it for every element."""
    held = [(n, part(n, axis, mesh)) for dim, size in enumerate(t.shape) for n, axis in factors(size, dim, t.layout, mesh)]
    run = 1
    while held and held[-1][0] == held[-1][1]:
        run *= held.pop()[0]
    runs, words = prod(count for _, count in held), -(-run // each)
    if runs == 1 or (words >= BLOCK and run % each == 0):
        return (24 + beside) * min(BLOCK, words)
    if run % each == 0:
        return max(16, 8 + beside) * min(BLOCK // words, runs) * words + 8 * words + 16 * runs
    return 32 * min(max(1, BLOCK // run), runs) * run + 8 * run + 8 * runs


def _exchanges(op: Op) -> bool:
    return op.target in ("all_gather.start", "reduce_scatter.start", "all_to_all.start")


def calls(p: Program) -> dict[int, int]:
    """For each update that shares a fused call with its neighbours: the place of the call's last one."""
    out: dict[int, int] = {}
    for n, op in enumerate(p.ops):
        if op.target in UPDATES and n not in out:
            last = n + len(run_from(n, p)) - 1
            out.update(dict.fromkeys(range(n, last + 1), last))
    return out
