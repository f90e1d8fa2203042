"""Issue early, wait late, and send small things together: bucket collectives, prefetch the gathers of weights.

A value that is computed joins the open bucket of its kind as soon as it is there; the bucket starts when it is full or when
something needs one of its values. A weight is there from the beginning, so its gather looks ahead instead: the first use starts a
bucket of the next weights in the order of their uses, and the bucket after it, so that it arrives during the computation. A bucket
never reaches into another phase: the backward's gathers start in the backward. Every ``wait`` stands just before the first use.
What splits a tensor or puts it together is done to save memory, which a bucket of a whole model would spend again: such a bucket holds no more than the
second largest module of its kind, unless one tensor alone is larger. With one bucket in use and one on its way, no more is whole than the two largest modules.
A move between host and device goes by itself. To the device it looks ahead as a weight's gather does, in the order of use; to the host it starts
when its value is there, and no more of them are under way than one such bucket.
What is reduced is held whole until its wait. A gradient's first use is the norm of all, at the end, when every one would still be held: so what is reduced is
waited for, and added up over microbatches where it is, when the next bucket of its kind starts.
In a looped program each part of each stage is scheduled by itself, and nothing is under way when it ends.
Then, where a machine is given (compiling gives what ``deepseed calibrate`` has measured), and what a program holds while each op runs, its times decide: gathers of weights whose waits would stand still move up (``start_early``), and computation that does not need a value
goes where it is waited for (``fill_waits``); the predicted peak is no higher for either. Stages of a pipeline are left as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deepseed.ir.collective import KEYED, MEMORIES, TO_DEVICE, TO_HOST
from deepseed.ir.contract import program_pass
from deepseed.ir.layout import Partial
from deepseed.ir.program import Builder, Op, Program, Ref, params_only
from deepseed.passes.fill_waits import fill_waits
from deepseed.passes.start_early import start_early
from deepseed.speed import Machine

BUCKET_BYTES = 25 * 2**20  # of results: as DistributedDataParallel's buckets
REDUCING = ("all_reduce.start", "reduce_scatter.start")
SPLITTING = ("all_gather.start", "reduce_scatter.start", *MEMORIES)
ALONE = 1 / 16  # of a bucket: a tensor of this size goes by itself, packing it would cost more than a message
Key = tuple[object, ...]


@program_pass(requires={"lowered"}, provides={"scheduled"})
def schedule_collectives(p: Program, bucket_bytes: int = BUCKET_BYTES, machine: Machine | None = None, live: Callable[[Program], Sequence[int]] | None = None) -> Program:
    """Put collectives of one kind, axis and dtype into buckets, each one ``start`` with several operands.

    before: %g1 : f32[8] sum@dp
            %g2 : f32[4] sum@dp
            %g1.s = all_reduce.start(%g1, axis="dp") : f32[8]
            %g1.w = wait(%g1.s) : f32[8]
            %a = aten.neg(%g1.w) : f32[8]
            %g2.s = all_reduce.start(%g2, axis="dp") : f32[4]
            %g2.w = wait(%g2.s) : f32[4]
            %b = aten.neg(%g2.w) : f32[4]
    after:  %g1 : f32[8] sum@dp
            %g2 : f32[4] sum@dp
            %g1.s, %g2.s = all_reduce.start(%g1, %g2, axis="dp") : f32[8], f32[4]
            %g1.w = wait(%g1.s) : f32[8]
            %g2.w = wait(%g2.s) : f32[4]
            %a = aten.neg(%g1.w) : f32[8]
            %b = aten.neg(%g2.w) : f32[4]
    """
    done = _Schedule(p, bucket_bytes).run()
    return done if machine is None or live is None else fill_waits(start_early(done, machine, live), machine, live)


@dataclass
class _Bucket:
    starts: list[Op] = field(default_factory=list)
    nbytes: int = 0


class _Schedule:
    def __init__(self, p: Program, limit: int) -> None:
        self.p, self.limit = p, limit
        self.out = Builder(p)
        self.starts = {op.name: op for op in p.ops if op.target.endswith(".start") and op.target.removesuffix(".start") not in KEYED}  # those stay where they are
        self.waits = {op.name: op for op in p.ops if op.target == "wait" and op.refs[0].name in self.starts}
        self.wait_of = {op.refs[0].name: op for op in self.waits.values()}
        self.of_value: dict[str, list[Op]] = {}  # operand -> the collectives that it joins when it is there
        self.weights = params_only(p)
        self.ahead = [s for s in self._by_use() if s.target == TO_DEVICE or (s.target == "all_gather.start" and (s.refs[0].name in self.weights or self._moved(s) is not None))]
        looking = {s.name for s in self.ahead}
        for s in self.starts.values():
            if s.name not in looking:
                self.of_value.setdefault(s.refs[0].name, []).append(s)
        self.looking = looking
        self.open: dict[Key, _Bucket] = {}
        self.bucket_of: dict[str, int] = {}  # collective that was started -> a number, one a bucket
        self.buckets: list[Sequence[Op]] = []
        self.in_use: set[int] = set()
        self.there: set[str] = set()
        self.limits = self._limits()
        ends = [op for op in p.ops if op.target in ("accumulate", TO_HOST) and op.refs[0].name in self.waits]
        self.sums = {op.refs[0].name: op for op in ends}  # what ends a value that arrives, by that: it is added up, or goes to the host
        self.leaving: list[tuple[Op, int]] = []  # moves to the host under way, and their bytes
        self.reducing: dict[Key, list[Op]] = {}  # of a bucket that was started and not yet waited for: its waits, or the sums of what arrives
        self.part = ""  # the part whose ops are emitted
        self.later: dict[str, list[Op]] = {}  # collectives of later parts whose operand is there, by part

    def run(self) -> Program:
        for i in self.p.inputs:
            self._there(i.name)
        parts = list(dict.fromkeys(op.part for op in self.p.ops))
        by_part: dict[str, list[Op]] = {part: [] for part in parts}
        for op in self.p.ops:
            by_part[op.part].append(op)
        added = {op.name for op in self.sums.values()}
        for part in parts:
            self.part = part
            for start in self.later.pop(part, ()):
                self._join(start)
            for op in by_part[part]:
                if op.name not in self.waits and op.name not in self.starts and op.name not in self.there and op.name not in added:
                    self._emit(op)
            if part:
                self._end(by_part[part])
        for o in self.p.outputs:
            self._need(o.ref.name)
        return self.out.program()

    def _end(self, ops: Sequence[Op]) -> None:
        """Nothing that a part started is still under way when the next one begins; what arrives may be what another collective sends."""
        waits = [op.name for op in ops if op.name in self.waits]
        while True:
            for key in list(self.open):
                self._flush(key)
            for key in list(self.reducing):
                self._reduced(key)
            while self.leaving:
                self._left()
            for wait in waits:
                self._need(wait)
            if not self.open and not self.reducing and not self.leaving:
                break

    def _reduced(self, key: Key) -> None:
        """What was started last of a kind arrives, and is added up or goes to the host."""
        for op in self.reducing.pop(key, ()):
            if op.target == "accumulate":
                self._emit(op)
            else:
                self._need(op.name if op.target == "wait" else op.refs[0].name)

    def _emit(self, op: Op) -> None:
        for ref in op.refs:
            self._need(ref.name)
        self.out.emit(op)
        for result in op.results:
            self._there(result)

    def _there(self, value: str) -> None:
        self.there.add(value)
        for start in self.of_value.get(value, ()):
            if start.part == self.part:
                self._join(start)
            else:
                self.later.setdefault(start.part, []).append(start)

    def _join(self, start: Op) -> None:
        """Into the open bucket of its kind, which starts when it is full."""
        if self._alone(start):
            self._start([start])
            return
        key, nbytes = self._key(start), start.type.local_bytes(self.p.mesh)
        if key in self.open and self.open[key].nbytes + nbytes > self._limit(start):
            self._flush(key)
        bucket = self.open.setdefault(key, _Bucket())
        bucket.starts.append(start)
        bucket.nbytes += nbytes
        if bucket.nbytes >= self._limit(start):
            self._flush(key)

    def _need(self, value: str) -> None:
        """Have a wait's result: its collective started, the wait emitted."""
        if value in self.there:
            return
        wait = self.waits[value]
        start = self.starts[wait.refs[0].name]
        if not self._made(start.refs[0].name):
            self._need(start.refs[0].name)
        if start.name in self.looking:
            if start.name not in self.bucket_of:
                self._look_ahead(start)
        elif start.name not in self.bucket_of:
            self._flush(self._key(start))
        for each in self._together(start):
            self.out.emit(each)
        for each in self._together(start):
            self._there(each.name)
        if start.name in self.looking and (number := self.bucket_of[start.name]) not in self.in_use:
            self.in_use.add(number)
            after = next((s for s in self.ahead if (_place(s), s.target) == (_place(start), start.target)), None)
            if after is not None and self._made(after.refs[0].name):  # the next bucket, while this one is used
                self._look_ahead(after)

    def _together(self, start: Op) -> Sequence[Op]:
        """The waits to emit for one: reduced values arrive with their bucket, what is joined from blocks is laid out when it is used."""
        if start.target in ("all_gather.start", "all_to_all.start", *MEMORIES):
            return (self.wait_of[start.name],)
        return tuple(self.wait_of[s.name] for s in self.buckets[self.bucket_of[start.name]])

    def _look_ahead(self, first: Op) -> None:
        """Start the next weights' gathers, in the order of their uses, up to a bucket."""
        bucket = _Bucket()
        alone: list[Op] = []
        copy = packed = 0  # of the tensor in use, which is laid out from the bucket; before that, of what is sent
        for start in [first, *(s for s in self.ahead if s is not first)]:
            nbytes = start.type.local_bytes(self.p.mesh)
            if (_place(start), start.target) != (_place(first), first.target):
                continue
            copy = max(copy, nbytes)
            sent = 0 if self._alone(start) else self.p.types[start.refs[0].name].local_bytes(self.p.mesh)
            if start is not first and bucket.nbytes + nbytes + max(copy, packed + sent) > self._limit(first):
                break
            if start is first or (self._key(start) == self._key(first) and self._made(start.refs[0].name)):
                self.ahead.remove(start)
                bucket.nbytes += nbytes
                packed += sent
                (alone if self._alone(start) else bucket.starts).append(start)
        number = len(self.buckets)
        for starts in (*([s] for s in alone), bucket.starts):
            self._start(starts)
        self.bucket_of.update(dict.fromkeys((s.name for s in (*alone, *bucket.starts)), number))  # waited for as one

    def _made(self, value: str) -> bool:
        """Compute what a look-ahead sends, a weight's cast, ahead of its place; take what a move brings of a weight, or of a new parameter that
        is there. False where a collective comes before it, or it is no weight's and is not there yet."""
        if value in self.there:
            return True
        op = self.p.producers[value]
        moved = self.starts.get(op.refs[0].name) if op.target == "wait" else None
        ready = moved is not None and (value in self.weights or moved.refs[0].name in self.there if moved.target == TO_DEVICE else moved.target == TO_HOST and moved.name in self.bucket_of)
        if ready:
            self._need(value)
            return True
        if op.target == "wait" or value not in self.weights or not all(self._made(ref.name) for ref in op.refs):
            return False
        self._emit(op)
        return True

    def _limit(self, start: Op) -> int:
        return self.limits.get(_kind(start), self.limit)

    def _limits(self) -> Mapping[Key, int]:
        """Bytes of a bucket of what splits tensors or makes them whole: those of the second largest module, of the largest if it is the only one."""
        used = Counter[tuple[Key, str, Key]]()
        for s in self.starts.values():
            if s.target in SPLITTING:
                used[_kind(s), self._module(s), _place(s)] += s.type.local_bytes(self.p.mesh)
        modules: dict[Key, dict[str, int]] = {}
        for (kind, module, _), nbytes in used.items():
            sizes = modules.setdefault(kind, {})
            sizes[module] = max(sizes.get(module, 0), nbytes)
        return {kind: min(self.limit, sorted(sizes.values())[-2:][0]) for kind, sizes in modules.items()}

    def _module(self, start: Op) -> str:
        """The path of the module that uses a gathered weight, or makes a gradient; the value itself where none is known."""
        op: Op | None = start
        while op is not None and not op.path and op.refs:
            op = self.p.producers.get(op.refs[0].name)
        return op.path if op is not None and op.path else start.name

    def _alone(self, start: Op) -> bool:
        return start.target in MEMORIES or start.type.local_bytes(self.p.mesh) >= ALONE * self.limit

    def _flush(self, key: Key) -> None:
        bucket = self.open.pop(key, None)
        if bucket is not None:
            self._start(bucket.starts)

    def _start(self, starts: Sequence[Op]) -> None:
        self.bucket_of.update(dict.fromkeys((s.name for s in starts), len(self.buckets)))
        self.buckets.append(starts)
        if starts and starts[0].target == TO_HOST:
            self._leave(starts[0])
            return
        if starts:
            self._reduced(key := self._key(starts[0]))
            ends = [self.sums.get(self.wait_of[s.name].name, self.wait_of[s.name]) for s in starts]
            self.reducing[key] = [op for op in ends if op.target != "wait" or starts[0].target in REDUCING]
        if len(starts) == 1:
            self.out.emit(starts[0])
        elif starts:
            self.out.emit(
                replace(
                    starts[0],
                    results=tuple(s.name for s in starts),
                    args=tuple(Ref(s.refs[0].name) for s in starts),
                    types=tuple(s.type for s in starts),
                )
            )

    def _leave(self, start: Op) -> None:
        """Start a move to the host, and wait for the oldest where more than a bucket would be under way: what they read is held until then."""
        self.out.emit(start)
        self.leaving.append((start, start.type.local_bytes(self.p.mesh)))
        while len(self.leaving) > 1 and sum(n for _, n in self.leaving) > 2 * self._limit(start):
            self._left()

    def _left(self) -> None:
        """The oldest move to the host has ended; what it brought is added up."""
        wait = self.wait_of[self.leaving.pop(0)[0].name]
        self._need(wait.name)
        if wait.name in self.sums:
            self._emit(self.sums[wait.name])

    def _key(self, start: Op) -> Key:
        """What may share a bucket: one kind over one axis, of one dtype and reduction."""
        if start.target in MEMORIES:
            return start.target, start.kwargs, start.type.dtype, "", start.phase == "update", start.part, start.stage
        layout = self.p.types[start.refs[0].name].layout
        element = layout.on(self.p.mesh.parts(str(start.kw("axis")))[0])
        phase = "update" if start.phase == "update" else "step"
        return start.target, start.kwargs, start.type.dtype, element.op if isinstance(element, Partial) else "", phase, start.part, start.stage

    def _by_use(self) -> Iterator[Op]:
        """The collectives in the order in which their results are first used; a move of what one of them sends comes just before it."""
        seen: set[str] = set()
        for op in self.p.ops:
            for ref in op.refs:
                wait = self.waits.get(ref.name)
                if wait is not None and (op.name not in self.starts or op.target == TO_HOST) and wait.refs[0].name not in seen:
                    start = self.starts[wait.refs[0].name]
                    moved = self._moved(start)
                    if moved is not None and moved.name not in seen:
                        seen.add(moved.name)
                        yield moved
                    seen.add(start.name)
                    yield start

    def _moved(self, start: Op) -> Op | None:
        """The move to the device that brings what is gathered: a weight, or a new parameter."""
        op = self.p.producers.get(start.refs[0].name)
        while op is not None and op.target != TO_DEVICE:
            op = self.p.producers.get(op.refs[0].name) if op.name in self.weights or op.target == "wait" else None
        return op


def _kind(start: Op) -> Key:
    return start.target, start.kwargs, start.phase == "update"


def _place(start: Op) -> tuple[str, str, int]:
    """Where a collective may be looked ahead for: a phase, or a part of a stage."""
    return start.phase, start.part, start.stage
