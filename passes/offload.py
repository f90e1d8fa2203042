"""Decide what lies on the host, and put a move wherever a value is read in the other memory.

``optimizer``: parameters and their optimizer state are stored on the host, where they are updated. A parameter goes to the device once a step
(cast there already, where it is used in a shorter dtype) and stays for the step. ``params``: parameters are stored on the host and go
to the device for each use, in each phase again. ``gradients``: they go to the host as soon as they are there, and what is summed over
microbatches is summed there. Activations are ``offload_activations``' work.

An op of the update runs where what it reads lies; so does what leads there, where no more would have to be moved. All that ranks exchange
lies on the device. A move to the host starts when its value is made, one to the device before its first reader; what is issued when is
``schedule_collectives``' choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from deepseed.ir.collective import LOCAL, TO_DEVICE, TO_HOST
from deepseed.ir.contract import program_pass
from deepseed.ir.program import Builder, Input, Op, Output, Program, Ref, Type, params_only

Key = tuple[str, str]


@program_pass(requires={"lowered"}, provides={"offloaded"})
def offload(p: Program, what: Collection[str] = (), stored: Mapping[Key, bool] | None = None) -> Program:
    """Give every value its memory (below, for optimizer and params). ``what``: of "optimizer", "gradients" and "params". ``stored``: whether an earlier program stores an input on the host.

    before: %w : f32[64] param "w"
            %x : f32[64] batch "x"
            %y = aten.mul.Tensor(%x, %w) : f32[64] {phase="forward"}
            %w.new = aten.sub.Tensor(%w, %y) : f32[64] {phase="update"}
    after:  %w : f32[64] host param "w"
            %x : f32[64] batch "x"
            %w.device.start = to_device.start(%w) : f32[64] {phase="forward"}
            %w.device = wait(%w.device.start) : f32[64] {phase="forward"}
            %y = aten.mul.Tensor(%x, %w.device) : f32[64] {phase="forward"}
            %y.host.start = to_host.start(%y) : f32[64] host {phase="update"}
            %y.host = wait(%y.host.start) : f32[64] host {phase="update"}
            %w.new = aten.sub.Tensor(%w, %y.host) : f32[64] host {phase="update"}
    """
    if not {"optimizer", "gradients", "params"} & set(what):
        return p
    return _Offload(p, frozenset(what), stored or {}).run()


class _Offload:
    def __init__(self, p: Program, what: frozenset[str], stored: Mapping[Key, bool]) -> None:
        self.p, self.what = p, what
        self.out = Builder(p)
        self.weights = params_only(p)
        self.host = self._inputs(stored)
        self.sums = self._gradients() if "gradients" in what else frozenset()
        self.on_host = self._ops()
        self.hypers = {i.name for i in p.by_role("hyper") if p.uses[i.name] and all(isinstance(u, Op) and u.name in self.on_host for u in p.uses[i.name])}
        self.there: dict[tuple[str, bool, object], str] = {}  # (value, memory, for whom) -> its copy there
        self.waits: dict[str, Op] = {}  # waits of moves to the host that are under way
        self.cast: dict[tuple[object, ...], str] = {}  # casts on the host that were made once for the step
        self.same: dict[str, str] = {}

    def run(self) -> Program:
        self.out.inputs = [replace(i, type=i.type.on(i.name in self.host or i.name in self.hypers)) for i in self.p.inputs]
        self.out.types = {i.name: i.type for i in self.out.inputs}
        for op in self.p.ops:
            self._emit(op)
        outputs = [self._output(o) for o in self.p.outputs]
        return self.out.program(outputs=outputs)

    # what lies where --------------------------------------------------------------------------------------------------

    def _inputs(self, stored: Mapping[Key, bool]) -> frozenset[str]:
        """The parameters and state that are stored on the host."""
        trained = {(o.role, o.key) for o in self.p.outputs}

        def host(i: Input) -> bool:
            if i.role == "state":
                return "optimizer" in self.what
            return i.role == "param" and ("params" in self.what or ("optimizer" in self.what and (i.role, i.key) in trained))

        return frozenset(i.name for i in self.p.inputs if stored.get((i.role, i.key), host(i)))

    def _gradients(self) -> frozenset[str]:
        """Values that the update reads of the backward, as they are summed over microbatches or, where they are not, after the last move."""
        moved: set[str] = set()  # of the backward, by moves alone
        found: dict[str, None] = {}
        made = {r: op for op in self.p.ops for r in op.results}
        for op in self.p.ops:
            if op.phase == "update" and not (_moves(op) and op.refs[0].name in moved):
                for ref in op.refs:
                    if ref.name in moved and self.p.types[ref.name].shape:
                        found[ref.name] = None
            elif op.phase == "backward" or _moves(op):
                moved.update(op.results)
        for o in self.p.outputs:
            if o.role == "grad" and o.ref.name in moved and self.p.types[o.ref.name].shape:
                found[o.ref.name] = None
        out = set()
        for name in found:
            at, summed = name, ""
            while at in made and _moves(made[at]):
                summed = at if made[at].target == "accumulate" else summed
                at = made[at].refs[0].name
            out.add(summed or name)
        return frozenset(out)

    def _ops(self) -> frozenset[str]:
        """The names of the ops that run on the host."""
        lies = set(self.host)  # values on the host
        out: set[str] = set()
        for op in self.p.ops:
            large = [r.name for r in op.refs if self.p.types[r.name].shape] or [r.name for r in op.refs]
            if op.target == "accumulate":
                here = op.name in self.sums
            elif _exchanges(op):
                here = False
            elif op.phase != "update":
                here = self._shortens(op, lies)
            elif "optimizer" in self.what:
                here = any(name in lies for name in large)
            else:
                here = bool(large) and all(name in lies for name in large) and _bytes(op.types) < _bytes([self.p.types[n] for n in large])
            if here:
                out.add(op.name)
                lies.update(op.results)
            else:
                lies.update(r for r in op.results if r in self.sums)
        for op in reversed(self.p.ops):
            if op.name not in out and op.phase == "update" and not _exchanges(op) and op.target != "accumulate" and self._pulled(op, out, lies):
                out.add(op.name)
                lies.update(op.results)
        return frozenset(out)

    def _shortens(self, op: Op, lies: Collection[str]) -> bool:
        """A parameter's cast to a shorter dtype, or a part of it: it is moved after that."""
        if op.target not in ("cast", *LOCAL) or op.refs[0].name not in lies or op.refs[0].name not in self.weights:
            return False
        return op.type.local_bytes(self.p.mesh) < self.p.types[op.refs[0].name].local_bytes(self.p.mesh)

    def _pulled(self, op: Op, out: Collection[str], lies: Collection[str]) -> bool:
        """Whether an op of the update that only ops of the host read is better there: no more has to be moved then."""
        users = self.p.uses[op.name] if len(op.results) == 1 else ()
        if not users or not all(isinstance(u, Op) and u.name in out for u in users):
            return False
        missing = [r.name for r in op.refs if r.name not in lies and self._costs(r.name, op)]
        return len(missing) <= 1 and sum(self.p.types[name].nbytes for name in missing) <= _bytes(op.types)

    def _costs(self, name: str, reader: Op) -> bool:
        """Whether a value would be moved for this reader: numbers that many read, and hyper-parameters, are moved once or not at all."""
        return bool(self.p.types[name].shape) or not (name in {i.name for i in self.p.by_role("hyper")} or len(self.p.uses[name]) > 1)

    # the ops ----------------------------------------------------------------------------------------------------------

    def _emit(self, op: Op) -> None:
        host = op.name in self.on_host
        kept = host and op.phase != "update" and "params" not in self.what
        op = op.map_refs(lambda ref: Ref(self._at(self.same.get(ref.name, ref.name), host, op)))
        op = op.typed(tuple(t.on(host) for t in op.types)) if host else op
        if kept:  # the same cast in another phase
            found = self.cast.setdefault((op.form, op.refs, op.types), op.name)
            if found != op.name:
                self.same[op.name] = found
                return
        self.out.emit(op)
        for result in op.results:
            if not host and self._wanted(result):
                self._to_host(result, op)

    def _wanted(self, value: str) -> bool:
        """Whether a value of the device is read on the host, or has to be there."""
        if value in self.sums:
            return True
        started = value in self.out.types and self.out.ops[-1].target.endswith(".start")
        return not started and any(self._reads_on_host(u) for u in self.p.uses.get(value, ()))

    def _reads_on_host(self, user: Op | Output) -> bool:
        if isinstance(user, Op):
            return user.name in self.on_host
        return any(i.name in self.host and (i.role, i.key) == (user.role, user.key) for i in self.p.inputs)

    def _at(self, value: str, host: bool, reader: Op) -> str:
        """The value, or its copy, in the memory in which ``reader`` reads it."""
        if (value, True, "") in self.there and not host and value in self.sums:
            value = self._arrived(self.there[value, True, ""])  # it is on the host only, once it is there
        if self.out.types[value].host == host:
            return value
        if host:
            if (value, True, "") not in self.there:
                self._to_host(value, reader)
            return self._arrived(self.there[value, True, ""])
        whom: object = ("step" if "params" not in self.what else (reader.phase, reader.path)) if reader.phase != "update" else "update"
        if (value, False, whom) not in self.there:
            self.there[value, False, whom] = self._to_device(value, reader, whom == "step")
        return self.there[value, False, whom]

    def _arrived(self, name: str) -> str:
        wait = self.waits.pop(name, None)
        if wait is not None:
            self.out.emit(wait)
        return name

    def _to_host(self, value: str, at: Op) -> None:
        t, name = self.out.types[value].on(True), self.out.fresh(f"{value}.host")
        start = self.out.fresh(f"{name}.start")
        self.out.emit(Op((start,), TO_HOST, (Ref(value),), (t,), (), "update", at.path, at.line))
        self.waits[name] = Op((name,), "wait", (Ref(start),), (t,), (), "update", at.path, at.line)
        self.there[value, True, ""] = name

    def _to_device(self, value: str, reader: Op, kept: bool) -> str:
        t, name = self.out.types[value].on(False), self.out.fresh(f"{value}.device")
        start = self.out.fresh(f"{name}.start")
        self.out.emit(Op((start,), TO_DEVICE, (Ref(value),), (t,), (("kept", True),) if kept else (), reader.phase, reader.path, reader.line))
        self.out.emit(Op((name,), "wait", (Ref(start),), (t,), (), reader.phase, reader.path, reader.line))
        return name

    def _output(self, o: Output) -> Output:
        value = self.same.get(o.ref.name, o.ref.name)
        if value in self.sums and (value, True, "") in self.there:
            return replace(o, ref=Ref(self._arrived(self.there[value, True, ""])))
        host = self._reads_on_host(o) if o.role in ("param", "state", "buffer") else self.out.types[value].host
        if host == self.out.types[value].host:
            return replace(o, ref=Ref(value))
        last = self.out.ops[-1]
        return replace(o, ref=Ref(self._at(value, host, replace(last, phase="update", path=""))))


def _moves(op: Op) -> bool:
    return op.target.endswith(".start") or op.target in ("wait", "accumulate", "collect", *LOCAL)


def _exchanges(op: Op) -> bool:
    """What ranks do together, and its wait: on the device."""
    return op.target.endswith(".start") or op.target in ("wait", "reshard")


def _bytes(types: Collection[Type] | Iterator[Type]) -> int:
    return sum(t.nbytes for t in types)
