"""A scheduled program as Python: one function for each part of a stage, and ``step``, which walks the rank's instruction list.

``v`` holds what lives as long as the step (inputs, what runs once, sums over microbatches), ``m`` what one microbatch leaves for its
later parts; a value is taken out by the last function that reads it. ``mb`` is the number of the microbatch.

A program with tangents has ``forward`` and ``backward`` in the place of ``step``: the lane is cut before the first part that depends on
tangents. ``forward`` returns what the model shows, then ``v`` and ``m`` with what ``backward`` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deepseed.codegen.chains import Chain, Chaining, chains, write
from deepseed.codegen.expressions import ADDED, DTYPES, CodegenError, Source, assignment, listed
from deepseed.codegen.kernels import NONE, call, starts
from deepseed.codegen.optim import UPDATES, Update
from deepseed.ir.collective import step
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.program import FLOATS, GRADIENTS, Input, Op, Output, Program, Type, after_tangents
from deepseed.ir.schedule import kind_of, loop_of, order_of
from deepseed.ir.text import format_type

Place = tuple[str, int]  # a part and its stage; -1 where one function serves all stages of the lane, LATE or less as said there
LATE = -2  # of a part that runs once: what waits for tangents, where the part itself does not; below it a receive on its own


@dataclass
class _Function:
    name: str
    ops: list[tuple[int, Op]] = field(default_factory=list)
    reads: dict[str, None] = field(default_factory=dict)  # made elsewhere, in the order of their first use
    lines: list[str] = field(default_factory=list)


def generate_parts(p: Program, lane: int, looked: bool = False, kernels: Mapping[str, str] = NONE, chaining: Chaining | None = None) -> str:
    """The source of ``step(rt, inputs)`` for the localized program of the pipeline rank ``lane``."""
    return _Parts(p, lane, looked, kernels, chaining).source()


class _Parts:
    def __init__(self, p: Program, lane: int, looked: bool = False, kernels: Mapping[str, str] = NONE, chaining: Chaining | None = None) -> None:
        assert p.schedule is not None
        self.kernels, self.grouped, self.chaining = kernels, starts(p, kernels), chaining
        self.p, self.schedule, self.lane = p, p.schedule, p.schedule.lanes[lane]
        self.out = Source(p, looked=looked)
        self.donation = self.out.donation
        self.update = Update(self.donation, self.out.name, self.out.emit, kernels)
        several = len({op.stage for op in p.ops if kind_of(op.part) != "once"}) > 1
        self.cut = first_backward(p)  # the loop with the first part of the second half
        waiting = after_tangents(p)
        self.functions: dict[Place, _Function] = {}
        self.chains: list[Chain] = []
        self.at: list[Place] = []  # of each op
        for n, op in enumerate(p.ops):
            alone = op.kw("turns") is not None
            where = (op.part, LATE - 1 - n) if alone else _place(op.part, op.stage)
            if kind_of(op.part) == "once" and op.name in waiting and self._first_half(where):
                where = (op.part, LATE)
                if op.target in ("send", "receive.start"):
                    raise CodegenError(f"%{op.name} of {op.part} depends on tangents and goes to another stage\n  fix: a plan without mb or without pp")
            name = op.part.replace(".", "_") + (f"_s{op.stage}" if several and where[1] >= 0 else f"_{self.out.name(op.name)}" if alone else "_late" if where[1] == LATE else "")
            self.functions.setdefault(where, _Function(name)).ops.append((n, op))
            self.at.append(where)
        self.made = {r: self.at[n] for n, op in enumerate(p.ops) for r in op.results}
        self.into = self._straight_into_sums()
        self.late: list[int] = []  # writes into stored tensors that are due in a loop: at the end of the step
        self.readers: dict[str, list[Place]] = {}
        self._find_reads()
        late = [stored for stored, n in self.donation.written.items() if n in self.late]
        new = {self.donation.stored[stored].ref.name for stored in late}
        self.to_the_end = {o.ref.name for o in self.donation.returned} | {*late, *new}  # read by ``step`` itself
        self.turns = list(self._turns())
        self.steplong = {v for v in (*self.made, *self.readers) if v in self.to_the_end or self._steplong(v)}

    def _find_reads(self) -> None:
        def read(value: str, where: Place) -> None:
            readers = self.readers.setdefault(value, [])
            if where not in readers:
                readers.append(where)
            if self.made.get(value) != where:
                self.functions[where].reads.setdefault(value)

        writes: dict[int, list[str]] = {}
        for stored, n in self.donation.written.items():
            writes.setdefault(n, []).append(stored)
        for n, op in enumerate(self.p.ops):
            for ref in op.refs:
                read(ref.name, self.at[n])
            for stored in writes.get(n, ()):
                if kind_of(self.at[n][0]) == "once" and self._first_half(self.at[n]):
                    read(stored, self.at[n])
                    read(self.donation.stored[stored].ref.name, self.at[n])
                else:
                    self.late.append(n)
        for readers in self.readers.values():  # in the order in which they run
            readers.sort(key=lambda where: (not self._first_half(where), where[1] != LATE))

    def _steplong(self, value: str) -> bool:
        made = self.made.get(value)
        if made is None or kind_of(made[0]) == "once" or self.p.producers[value].target in ("accumulate", "collect"):
            return True
        return any(kind_of(reader[0]) == "once" for reader in self.readers.get(value, ()))

    # source -----------------------------------------------------------------------------------------------------------

    def source(self) -> str:
        p, s = self.p, self.schedule
        lines = [
            f'"""Generated from program {p.name} on {Mesh(p.mesh.axes)}, {s.name}: one pipeline rank\'s step on local tensors, see deepseed/codegen/parts.py."""',
            "", "import torch", "", "from deepseed import ops",
        ]  # fmt: skip
        for where, function in self.functions.items():
            self.out.lines = function.lines
            self._function(where, function)
            lines += ["", "", *function.lines]
        lines += [line for chain in self.chains for line in ("", "", *chain.text)]
        self.out.lines = []
        if self.cut:
            self._halves()
        else:
            self._step()
        return "\n".join([*lines, *self.out.lines]) + "\n"

    def _function(self, where: Place, function: _Function) -> None:
        out = self.out
        out.lines.append(f"def {function.name}(rt, v, m, mb):")
        out.emit("device = rt.device")
        if where[0] == f"once.{self.schedule.loops}" and any(op.target == "send" for op in self.p.ops):
            out.emit("rt.flush()", "what was sent may be overwritten now")
        for value in function.reads:
            out.emit(f"{out.name(value)} = {self._load(value, where)}", format_type(self.p.types[value], self.p.mesh))
            if value in self.donation.copied:
                out.emit(f"{out.name(value + '.copy')} = v[{out.name(value + '.copy')!r}]")
        here = set(function.reads) | {r for _, op in function.ops for r in op.results if op.target not in ("accumulate", "collect", "send")}
        place = ("", "")
        done = -1
        found = chains(out, function.ops, self.chaining, self.grouped, self.kernels, self.into, lambda n, op: self._writes(op, n), self._kept)
        ends = {chain.ops[-1][0]: chain for chain in found.values()}
        self.chains += found.values()
        for n, op in function.ops:
            if n <= done:
                continue
            if n in found:
                out.lines = []
            if (op.path, op.phase) != place:
                place = (op.path, op.phase)
                out.lines.append(f"    # {op.path or '(top)'}, {op.phase}" + (f" ({op.line})" if op.line else ""))
            together = self.update.together(n) if op.target in UPDATES else (op,)
            shown = {r for each in together for r in each.results}
            if n in self.grouped and op.name not in self.into:
                g = self.grouped[n]
                together, shown = self.p.ops[n : g.last], set(g.makes)
                call(out, self.p, g, self.kernels[g.kernel])
                here.difference_update({r for each in together for r in each.results}.difference(g.makes))
            elif op.target in UPDATES:
                self.update.optimizer(n)
            elif op.name in self.into:
                self._add_into(op)
                here.discard(op.name)
            elif not (op.target == "accumulate" and op.refs[0].name in self.into) and not (self._writes(op, n) and self.update.waited(n, op)):
                self._op(op, n)
            for done, each in enumerate(together, n):
                self._close(done, each, here, shown)
            if done in ends:
                lines, out.lines = out.lines, function.lines
                write(out, ends[done], lines, [self._stored(value) for value in ends[done].results if value in here and self._kept(value)], here.__contains__)

    def _op(self, op: Op, n: int) -> None:
        out, types = self.out, ", ".join(format_type(t, self.p.mesh) for t in op.types)
        if op.target == "send":
            out.emit(f"rt.send({out.name(op.refs[0].name)}, {op.kw('to')})", types)
        elif op.target == "receive.start":
            out.emit(f"{out.name(op.name)} = rt.receive_start({out.shape(op.type)}, {DTYPES[op.type.dtype]}, {op.kw('source')})", types)
        elif op.target == "accumulate":
            x, key = op.refs[0].name, out.name(op.name)
            element = self.p.types[x].layout.on(TIME)
            own = x in self.made and self.donation.memory(x) == frozenset({x}) and self.donation.last_use[x] == n
            out.emit(f"v[{key!r}] = rt.accumulate(v.get({key!r}), {out.name(x)}, {getattr(element, 'op', 'sum')!r}, own={own})", types)
            if out.looked:
                out.emit(f"rt.look({op.name!r}, v[{key!r}], mb)")
        elif op.target == "collect":
            out.emit(f"v.setdefault({out.name(op.name)!r}, [None] * {self.schedule.microbatches})[mb] = {out.name(op.refs[0].name)}", types)
        else:
            out.emit(assignment(out, op), types)

    def _straight_into_sums(self) -> dict[str, Op]:
        """Products and rows that only a sum over microbatches reads, in the function that makes them: they are added to it as they are made."""
        out, members = {}, Counter(op.kernel for op in self.p.ops)
        for op in self.p.ops if not self.out.looked else ():
            x = op.refs[0].name if op.target == "accumulate" else ""
            made, t = self.p.producers.get(x), self.p.types.get(x)
            if made is None or t is None or t.dtype not in FLOATS or getattr(t.layout.on(TIME), "op", "sum") != "sum" or len(self.p.uses[x]) > 1 or self.made[x] != self.made[op.name]:
                continue
            kernel = self.kernels.get(made.kernel, "")
            if (not kernel or members[made.kernel] == 1) and made.target in ADDED and ADDED[made.target](self.out, made, "", kernel) is not None:
                out[x] = op
        return out

    def _add_into(self, op: Op) -> None:
        out, total = self.out, self.into[op.name]
        key, types = out.name(total.name), ", ".join(format_type(t, self.p.mesh) for t in total.types)
        out.emit(f"v[{key!r}] = {ADDED[op.target](out, op, f'v.get({key!r})', self.kernels.get(op.kernel, ''))}", types)

    def _close(self, n: int, op: Op, here: set[str], shown: set[str]) -> None:
        """What follows an op: what other functions read is put away, stored tensors are written, values that nothing reads here end."""
        out, donation = self.out, self.donation
        out.look([r for r in op.results if r in shown], ", mb")
        for value in op.results:
            if value in donation.copied:
                out.emit(f"{out.name(value + '.copy')} = {out.name(value)}.clone()")
            if value in here and value in donation.copied:
                out.emit(f"v[{out.name(value + '.copy')!r}] = {out.name(value + '.copy')}")
            if value in here and self._kept(value):
                out.emit(self._stored(value))
        if self._writes(op, n):
            self.update.after(n)
        if dead := [out.name(v) for v in donation.dies.get(n, ()) if v in here]:
            out.emit(f"del {', '.join(dead)}")

    def _writes(self, op: Op, n: int) -> bool:
        """Whether what is due after an op is written into stored tensors here."""
        return kind_of(op.part) == "once" and n not in self.late

    def _kept(self, value: str) -> bool:
        """Whether a value is read outside of the function that makes it."""
        late = value in self.steplong and kind_of(self.made[value][0]) != "once"
        return late or value in self.to_the_end or any(r != self.made[value] for r in self.readers.get(value, ()))

    def _stored(self, value: str) -> str:
        return f"{'v' if value in self.steplong else 'm'}[{self.out.name(value)!r}] = {self.out.name(value)}"

    def _load(self, value: str, where: Place) -> str:
        key = repr(self.out.name(value))
        last = self.readers[value][-1] == where
        if value not in self.steplong:
            return f"m.pop({key})" if last else f"m[{key}]"
        found = f"v.pop({key})" if last and kind_of(where[0]) == "once" and value not in self.to_the_end else f"v[{key}]"
        if (turn := self._last_turn(value)) is not None and turn[0] == where:
            found = f"(v.pop({key}) if mb == {turn[1]} else v[{key}])"
        if value not in self.made and kind_of(where[0]) != "once" and (part := self._microbatch(self.p.types[value])):
            return f"rt.microbatch({found}, mb, {self.schedule.microbatches}, {part})"
        return self._joined(value, found)

    def _joined(self, value: str, found: str) -> str:
        """The whole of what was collected from every microbatch."""
        made = self.p.producers.get(value)
        if made is None or made.target != "collect":
            return found
        before = self.p.types[made.refs[0].name]
        place = step(before.shape, before.layout, made.type.layout, TIME, self.p.mesh).put
        assert place is not None
        return f"rt.collect({found}, {place.numbers})"

    def _microbatch(self, t: Type) -> str:
        """Where a rank's part of a batch is cut into microbatches; nothing where it is not."""
        if t.layout.on(TIME) is None:
            return ""
        place = step(t.shape, t.layout.with_(TIME, None), t.layout, TIME, self.p.mesh).take
        assert place is not None
        return str(place.numbers)

    def _last_turn(self, value: str) -> tuple[Place, int] | None:
        """The function and the microbatch that read a value of the whole step last, where that is in a loop."""
        readers = self.readers[value]
        if value in self.to_the_end or value in self.donation.copied or value in self.donation.stored or any(stage == LATE for _, stage in readers):
            return None
        turn = next((turn for turn in reversed(self.turns) if turn[0] in readers), None)
        return None if turn is None or kind_of(turn[0][0]) == "once" else turn

    def _step(self) -> None:
        self._list("LANE", self.turns)
        self._begin("step", self.p.inputs)
        self._walk("LANE")
        for stored in self._late_writes():
            self._write(stored)
        self.out.emit(f"return {listed([self._shown(o) for o in self.donation.returned])}")

    def _list(self, name: str, turns: Sequence[tuple[Place, int]]) -> None:
        self.out.lines += ["", "", f"{name} = ("]
        self.out.lines += [f"    {line}" for line in _wrapped(f"({self.functions[place].name}, {microbatch})," for place, microbatch in turns)]
        self.out.lines += [")"]

    def _begin(self, name: str, inputs: Sequence[Input]) -> None:
        out = self.out
        out.lines += ["", "", f"def {name}(rt, inputs):", "    v = {"]
        for n, i in enumerate(inputs):
            if i.name in self.readers or i.name in self.to_the_end or i.name in self.donation.stored:  # another rank of the pipeline reads the others
                out.lines.append(f"        {out.name(i.name)!r}: inputs[{n}],  # {i.role} {i.key}: {format_type(i.type, self.p.mesh)}")
        out.emit("}")
        if out.looked:
            out.emit(f"rt.look_at({[i.name for i in inputs]!r}, inputs)")
        out.emit("inputs.clear()")
        out.emit(f"m = [{{}} for _ in range({self.schedule.microbatches})]")
        for stored in (s for s, n in self.donation.written.items() if n == -1):
            self._write(stored)

    def _walk(self, name: str) -> None:
        self.out.emit(f"for part, mb in {name}:")
        self.out.emit("    part(rt, v, m[mb], mb)")
        if any(op.target == "send" for op in self.p.ops):
            self.out.emit("rt.flush()")

    def _late_writes(self) -> Iterator[str]:
        return (s for s, n in self.donation.written.items() if n in self.late)

    def _shown(self, o: Output) -> str:
        """What is returned for an output."""
        name = o.ref.name + (".copy" if o.ref.name in self.donation.copied else "")
        return self._joined(o.ref.name, f"v[{self.out.name(name)!r}]")

    # two halves -------------------------------------------------------------------------------------------------------

    def _first_half(self, where: Place) -> bool:
        """Whether something runs before the caller has seen the outputs."""
        part, stage = where
        return stage != LATE and (not self.cut or loop_of(part) < self.cut or (loop_of(part) == self.cut and kind_of(part) == "forward"))

    def _halves(self) -> None:
        out, tangents = self.out, self.p.by_role("tangent")
        first = [turn for turn in self.turns if self._first_half(turn[0])]
        late = [(where, 0) for where in sorted(self.functions, key=lambda where: order_of(where[0])) if where[1] == LATE]
        self._list("FORWARD", first)
        self._list("BACKWARD", [*late, *self.turns[len(first) :]])
        second = {value for value, readers in self.readers.items() if not all(map(self._first_half, readers))}
        early, last = ([o for o in self.donation.returned if (o.role in GRADIENTS) == there] for there in (False, True))
        second |= {o.ref.name for o in last}
        assert self.turns[: len(first)] == first
        kept = [v for v in (*(i.name for i in self.p.inputs if i not in tangents), *self.made) if v in self.steplong and v in second]
        kept += [f"{v}.copy" for v in kept if v in self.donation.copied]
        out.lines += ["", "", "KEPT = ("] + [f"    {line}" for line in _wrapped(f"{out.name(v)!r}," for v in kept)] + [")  # of what lives as long as the step"]
        self._begin("forward", [i for i in self.p.inputs if i not in tangents])
        self._walk("FORWARD")
        for stored in self._late_writes():
            new = self.donation.stored[stored].ref.name
            if new in self.made and not self._first_half(self.made[new]):
                raise CodegenError(f"stored {stored} would be written by the backward, which is not done: its new value %{new} depends on tangents")
            if stored in second:
                out.emit(f"{out.name(stored)} = v[{out.name(stored)!r}]", "the backward reads what it was")
                out.emit(f"v[{out.name(stored)!r}] = {out.name(stored)}.clone()")
                out.emit(f"{out.name(stored)}.copy_(v[{out.name(new)!r}])")
            else:
                self._write(stored)
        out.emit(f"shown = {listed([self._shown(o) for o in early])}")
        out.emit("return shown, ({name: v[name] for name in KEPT if name in v}, m)")
        out.lines += ["", "", "def backward(rt, kept, tangents):"]
        out.emit("v, m = kept")
        out.emit(f"{listed([f'v[{out.name(i.name)!r}]' for i in tangents])} = tangents")
        if out.looked:
            out.emit(f"rt.look_at({[i.name for i in tangents]!r}, tangents)")
        out.emit("tangents.clear()")
        self._walk("BACKWARD")
        out.emit(f"return {listed([self._shown(o) for o in last])}")

    def _write(self, stored: str) -> None:
        new = self.donation.stored[stored].ref.name
        new += ".copy" if new in self.donation.copied else ""
        self.out.emit(f"v[{self.out.name(stored)!r}].copy_(v[{self.out.name(new)!r}])")

    def _turns(self) -> Iterator[tuple[Place, int]]:
        """What the lane does, as place and microbatch: its instructions, and the receives that stand between them."""
        alone: dict[int, tuple[Place, int]] = {}
        for part, stage in self.functions:
            if stage < LATE:
                turns = self.p.ops[LATE - 1 - stage].kw("turns")
                assert isinstance(turns, tuple)
                alone.update((int(str(turn)), ((part, stage), microbatch)) for microbatch, turn in enumerate(turns))
        count = 0
        for i in self.lane:
            while count in alone:
                yield alone[count]
                count += 1
            count += 1
            if _place(i.part, i.stage) in self.functions:
                yield _place(i.part, i.stage), i.microbatch


def first_backward(p: Program) -> int:
    """The loop in which the second half of a program with tangents begins; 0 where there are none."""
    assert p.schedule is not None
    loops = [i.loop for lane in p.schedule.lanes for i in lane if i.kind in ("backward", "weights")]
    return min(loops, default=p.schedule.loops) if p.by_role("tangent") else 0


def _place(part: str, stage: int) -> Place:
    return (part, -1) if kind_of(part) == "once" else (part, stage)


def _wrapped(words: Iterator[str]) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + len(word) > 140:
            yield line
            line = ""
        line += (" " if line else "") + word
    if line:
        yield line
