"""``offload(activations)``: what the backward reads of the forward waits on the host. Helper of the pass ``offload``.

A value goes to the host when it is made, and its device memory ends with its last reader in the forward; it comes back for its first
reader in the backward. A reshape, a turn or an expansion is made again there from what it was made of, which is moved once.
"""

from __future__ import annotations

from deepseed.ir.collective import TO_DEVICE, TO_HOST
from deepseed.ir.program import Arg, Builder, Op, Program, Ref, params_only

VIEWS = ("reshape", "permute", "expand")  # they share the memory of their operand, or may
LEAST = 1024  # bytes on a rank below which a value stays: moving it would cost more than it frees


def offload_saved(p: Program) -> Program:
    """Moves for every value of ``LEAST`` bytes or more that the backward reads of the forward.

    before: %h = aten.exp(%x) : f32[64, 64] {phase="forward"}
            %g = aten.mul.Tensor(%d, %h) : f32[64, 64] {phase="backward"}
    after:  %h = aten.exp(%x) : f32[64, 64] {phase="forward"}
            %h.host.start = to_host.start(%h) : f32[64, 64] host {phase="forward"}
            %h.host = wait(%h.host.start) : f32[64, 64] host {phase="forward"}
            %h.device.start = to_device.start(%h.host) : f32[64, 64] {phase="backward"}
            %h.device = wait(%h.device.start) : f32[64, 64] {phase="backward"}
            %g = aten.mul.Tensor(%d, %h.device) : f32[64, 64] {phase="backward"}
    """
    weights = params_only(p)
    out = Builder(p)
    back: dict[str, str] = {}  # saved value -> its name in the backward
    waits: dict[str, Op] = {}  # saved root -> the wait of its move to the host

    def saved(name: str) -> bool:
        made = p.producers.get(name)
        return made is not None and made.phase == "forward" and name not in weights and not p.types[name].host and not made.target.endswith(".start")

    def root(name: str) -> str:
        made = p.producers[name]
        return root(made.refs[0].name) if made.target in VIEWS and saved(made.refs[0].name) else name

    roots = {root(ref.name) for op in p.ops if op.phase == "backward" for ref in op.refs if saved(ref.name)}
    roots = {name for name in roots if p.types[name].local_bytes(p.mesh) >= LEAST}

    def here(ref: Ref, reader: Op) -> Arg:
        """A value of the forward as the backward reads it."""
        name = ref.name
        if not saved(name) or root(name) not in roots:
            return ref
        if name not in back:
            back[name] = returned(name, reader) if name in roots else again(name, reader)
        return Ref(back[name])

    def again(name: str, reader: Op) -> str:
        op, new = p.producers[name], out.fresh(f"{name}.again")
        out.emit(Op((new,), op.target, tuple([here(a, reader) if isinstance(a, Ref) else a for a in op.args]), op.types, op.kwargs, "backward", op.path, op.line))
        return new

    def returned(name: str, reader: Op) -> str:
        wait = waits.pop(name)
        out.emit(wait)
        t, new = p.types[name], out.fresh(f"{name}.device")
        start = out.fresh(f"{new}.start")
        out.emit(Op((start,), TO_DEVICE, (Ref(wait.name),), (t,), (), "backward", reader.path, reader.line))
        out.emit(Op((new,), "wait", (Ref(start),), (t,), (), "backward", reader.path, reader.line))
        return new

    for op in p.ops:
        out.emit(op.map_refs(lambda ref, op=op: here(ref, op)) if op.phase == "backward" else op)  # type: ignore[misc]
        for name in op.results:
            if name in roots:
                t, host = p.types[name].on(True), out.fresh(f"{name}.host")
                start = out.fresh(f"{host}.start")
                out.emit(Op((start,), TO_HOST, (Ref(name),), (t,), (), "forward", op.path, op.line))
                waits[name] = Op((host,), "wait", (Ref(start),), (t,), (), "forward", op.path, op.line)
    return out.program()
