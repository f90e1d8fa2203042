"""The ``mb`` axis becomes a loop: which part of the step every op runs in, read from the layouts alone.

An op with an operand or result that is split or partial over ``mb`` runs in a loop, once a microbatch; all others run once. What is
wanted whole of a loop's partial values ends that loop (``accumulate``), so a step may need several: the labels are counted before the
loss can be divided. Every op runs in the last loop that its users allow, or the whole forward would run in the first; a value that two
loops need is computed in each. What depends on parameters alone (gathers, casts) runs beside its users, in each part again: kept, it
would hold the whole model through the loop. A shorter copy of a parameter that no rank gathers is made once, as it is without ``mb``, where forward and backward share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from deepseed import cost
from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.mesh import TIME
from deepseed.ir.program import ITEMSIZE, Builder, Op, Program, Ref, after_tangents, kept, params_only
from deepseed.ir.schedule import kind_of, loop_of, order_of

DEAR = 2.0  # times the work of the step itself, above which its loops must be confirmed


@program_pass(requires={"lowered"}, provides={"looped"})
def loop_microbatches(p: Program, staged: bool = False, confirmed: bool = False) -> Program:
    """Give every op its part, and list the ops part by part; a program without ``mb`` stays as it is, unless it is to be cut in stages or
    has tangents: what it shows is then there before anything that depends on these.
    Raises PassError where what is computed again in several loops is more than ``DEAR`` times the step, unless ``confirmed``.

    before: mesh(mb=2)
            %x : f32[8@mb] batch "x"
            %mask : f32[8@mb] batch "mask"
            %n = sum(%mask, dims=[0], keepdim=false) : f32[] sum@mb {phase="forward"}
            %n.whole_mb = accumulate(%n, axis="mb") : f32[] {phase="forward"}
            %y = aten.div.Tensor(%x, %n.whole_mb) : f32[8@mb] {phase="forward"}
    after:  %x : f32[8@mb] batch "x"
            %mask : f32[8@mb] batch "mask"
            %n = sum(%mask, dims=[0], keepdim=false) : f32[] sum@mb {phase="forward", part="forward.1"}
            %n.whole_mb = accumulate(%n, axis="mb") : f32[] {phase="forward", part="forward.1"}
            %y = aten.div.Tensor(%x, %n.whole_mb) : f32[8@mb] {phase="forward", part="forward.2"}
    """
    if TIME not in p.mesh.sizes and not staged and not p.by_role("tangent"):
        return p
    loops = _Loops(p, staged)
    out = loops.run()
    if not confirmed:
        loops.check_price()
    return out


class _Loops:
    def __init__(self, p: Program, staged: bool) -> None:
        self.p = p
        self.timed = TIME in p.mesh.sizes
        self.weights = params_only(p) - {i.name for i in p.inputs} - kept(p) - (set() if staged or TIME not in p.mesh.sizes else _short_copies(p))
        self.looped = {op.name for op in p.ops if op.name not in self.weights and self._loops(op)}
        self.home = {r: op.name for op in p.ops for r in op.results}  # value -> the first result of its op
        self.late = after_tangents(p)
        self.parts: dict[str, tuple[str, ...]] = {}  # op -> where it runs, first to last
        self.out = Builder(p)
        self.named: dict[tuple[str, str], str] = {}  # (part, value) -> its name there; ("loop", value) in all parts of one loop

    def run(self) -> Program:
        self._place(self._kinds())
        by_part: dict[str, list[Op]] = {}
        for op in self.p.ops:
            if op.name not in self.weights:
                for part in self.parts[op.name]:
                    by_part.setdefault(part, []).append(op)
        for part in sorted(by_part, key=order_of):
            self._emit_part(part, by_part[part])
        return self._with_origins(self.out.program())

    # which part ------------------------------------------------------------------------------------------------------

    def _loops(self, op: Op) -> bool:
        """Whether an op runs once a microbatch."""
        if not self.timed:
            return op.phase != "update"
        return any(t.layout.on(TIME) is not None for t in (*op.types, *(self.p.types[r.name] for r in op.refs)))

    def _kinds(self) -> dict[str, str]:
        """Op of a loop -> "forward" or "backward": what reads a backward value is of the backward."""
        kinds: dict[str, str] = {}
        for op in self.p.ops:
            if op.name in self.looped:
                late = op.phase == "backward" or any(kinds.get(self.home.get(r.name, "")) == "backward" for r in op.refs)
                kinds[op.name] = "backward" if late else "forward"
        return kinds

    def _ready(self) -> dict[str, int]:
        """Op -> the loop that it runs in, or follows, at the earliest: how many sums over microbatches it waits for."""
        ready: dict[str, int] = {}
        self._find_ready([op for op in self.p.ops if op.name not in self.late], 1, ready)
        shown = {self.home[o.ref.name] for o in self.p.outputs if o.ref.name in self.home} - self.late - self.weights
        border = max([1, *(ready[name] + (name not in self.looped) for name in shown)]) if self.late else 1
        self._find_ready([op for op in self.p.ops if op.name in self.late], border, ready)
        return ready

    def _find_ready(self, ops: Iterable[Op], first: int, ready: dict[str, int]) -> None:
        for op in ops:
            if op.name in self.weights:
                continue
            found = first if op.name in self.looped else 0
            for ref in op.refs:
                source = self.home.get(ref.name)
                if source is not None and source not in self.weights:
                    same = op.name not in self.looped or self._inside(ref.name)
                    found = max(found, ready[source] + (not same))
            ready[op.name] = found

    def _inside(self, value: str) -> bool:
        """Whether a value differs from microbatch to microbatch; without ``mb``, whether it is made in the loop of one."""
        source = self.home.get(value)
        return source in self.looped and (not self.timed or self.p.types[value].layout.on(TIME) is not None)

    def _place(self, kinds: dict[str, str]) -> None:
        ready = self._ready()
        last = max([1, *ready.values()])
        needed: dict[str, set[str]] = {op.name: set() for op in self.p.ops}  # op -> the parts that read its results
        for o in self.p.outputs:
            if (name := self.home.get(o.ref.name)) is not None:
                early = bool(self.late) and name not in self.late and name in ready
                needed[name].add(f"once.{ready[name] if early else last}")
        for op in reversed(self.p.ops):
            needs = needed[op.name] or {f"once.{last}"}
            if op.name in self.weights:
                parts = needs
            elif op.name not in self.looped:
                parts = {f"once.{min(map(_before, needs))}"}
            elif any(self._inside(r) for r in op.results) and self.timed:
                parts = {f"{kinds[op.name]}.{loop_of(n)}" for n in needs if kind_of(n) != "once"} or {f"{kinds[op.name]}.{last}"}
            else:  # it ends its loop
                parts = {f"{kinds[op.name]}.{max(1, min(map(_before, needs))) if self.timed else 1}"}
            self.parts[op.name] = tuple(sorted(parts, key=order_of))
            for ref in op.refs:
                if ref.name in self.home:
                    needed[self.home[ref.name]] |= parts

    def check_price(self) -> None:
        """Refuse what ends loops again and again: the statistics of batch norms."""
        once = {op.name: _work(self.p, op) for op in self.p.ops}
        done = sum(once[op.name] * (len(self.parts[op.name]) if op.name not in self.weights else 1) for op in self.p.ops)
        ratio = done / max(1.0, sum(once.values()))
        if ratio <= DEAR:
            return
        loops = max(loop_of(part) for parts in self.parts.values() for part in parts)
        ends = [op for op in self.p.ops if op.target == "accumulate" and op.phase != "update" and loop_of(self.parts[op.name][0]) < loops]
        first = next((op for op in ends if op.path), ends[0])
        raise PassError(
            f"{loops} loops over the microbatches compute {ratio:.1f} times the step: {len(ends)} values of all microbatches are needed before they can go on, "
            f"such as %{first.name} at {first.path or 'the top level'}" + (f" ({first.line})" if first.line else "") + "\n"
            "  fix: bn(local), the statistics of each microbatch, where these are of batch norms; bn(exact) to pay for it; or a plan without mb (and pp with mb1)"
        )

    # the ops in order --------------------------------------------------------------------------------------------------

    def _emit_part(self, part: str, ops: Iterable[Op]) -> None:
        """In the order of the program; sums of gradients as soon as their operands are there, parameters' values when they are read."""
        late = [op for op in ops if op.phase == "update" and op.name in self.looped]
        waiting: dict[str, list[Op]] = {}
        missing = {op.name: 0 for op in late}
        made_here = {r for op in ops for r in op.results}
        for op in late:
            for name in {r.name for r in op.refs if r.name in made_here}:
                missing[op.name] += 1
                waiting.setdefault(name, []).append(op)
        ready = [op for op in late if not missing[op.name]]
        for op in (*ready, *(op for op in ops if op.name not in missing)):
            stack = [op]
            while stack:
                now = stack.pop()
                self._emit(now, part)
                for result in now.results:
                    for user in waiting.pop(result, ()):
                        missing[user.name] -= 1
                        if not missing[user.name]:
                            stack.append(user)

    def _emit(self, op: Op, part: str) -> None:
        parts = self.parts[op.name]
        own = f"{op.phase}.{loop_of(parts[-1])}"
        primary = parts[-1] if own not in parts or op.name not in self.weights else own
        op = op.map_refs(lambda ref: Ref(self._name(ref.name, part)))
        results = op.results if part == primary else tuple(self.out.fresh(f"{r}.{part.replace('.', '')}") for r in op.results)
        scope = part if op.name in self.weights else str(loop_of(part))
        self.named.update(((scope, old), new) for old, new in zip(op.results, results, strict=True))
        self.out.emit(replace(op, results=results, part=part, origin=op.origin if part == primary else ""))

    def _name(self, value: str, part: str) -> str:
        """The value as ``part`` reads it; what depends on parameters alone is computed there now if it was not yet."""
        source = self.home.get(value)
        if source in self.weights:
            if (part, value) not in self.named:
                self._emit(self.p.producers[value], part)
            return self.named[part, value]
        return self.named.get((str(loop_of(part)), value), value) if self._inside(value) else value

    def _with_origins(self, p: Program) -> Program:
        """A group whose ops run in several parts is no group any more."""
        parts: dict[str, set[str]] = {}
        for op in p.ops:
            parts.setdefault(op.origin, set()).add(op.part)
        kept = {key for key, where in parts.items() if len(where) == 1}
        ops = tuple(op if not op.origin or op.origin in kept else replace(op, origin="") for op in p.ops)
        return replace(p, ops=ops, origins=tuple((key, op) for key, op in p.origins if key in kept or key not in parts))


def _short_copies(p: Program) -> set[str]:
    """Casts of parameters to fewer bytes that are read as they are, not gathered.

    before: %c = cast(%w) : bf16[8, 8] {phase="forward", part="forward.1"}
            %c.again = cast(%w) : bf16[8, 8] {phase="backward", part="backward.1"}
    after:  %c = cast(%w) : bf16[8, 8] {phase="forward", part="once.0"}
            %c.again = cast(%w) : bf16[8, 8] {phase="backward", part="once.0"}
    """
    parameters = {i.name for i in p.by_role("param") if not i.type.host}
    return {
        op.name for op in p.ops
        if op.target == "cast" and op.phase != "update" and op.refs[0].name in parameters and ITEMSIZE[op.type.dtype] < ITEMSIZE[p.types[op.refs[0].name].dtype]
        and not any(isinstance(u, Op) and u.target.endswith(".start") for u in p.uses[op.name])
    }  # fmt: skip


def _work(p: Program, op: Op) -> float:
    """Flops, and a few for each element that is read or written."""
    operands = [p.types[r.name] for r in op.refs]
    return float(cost.flops(op, operands)) + 4.0 * sum(t.numel for t in (*operands, *op.types))


def _before(need: str) -> int:
    """The last loop after which a value can be made that is read in the part ``need``."""
    return loop_of(need) if kind_of(need) == "once" else loop_of(need) - 1
