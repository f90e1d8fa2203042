"""A plan in words: its mesh, what each axis does, and what a rank holds and sends by the closed forms."""

from __future__ import annotations

from deepseed import closed_forms as form
from deepseed.idle import idle_share, notes
from deepseed.ir.amounts import format_bytes
from deepseed.ir.mesh import Mesh
from deepseed.plan import Plan

OFFLOADED = {
    "optimizer": "optimizer state lies on the host with the parameters, which are updated there",
    "gradients": "gradients, and their sums over microbatches, lie on the host",
    "params": "parameters go to the device for each use",
    "": "a parameter goes to the device once a step",
    "activations": "what the backward reads of the forward waits on the host",
}


def meaning(said: Plan, plan: Plan, mesh: Mesh) -> list[str]:
    """``said``: as the user wrote it; ``plan``: with dp filled in; ``mesh``: of its ranks."""
    n, e, s, t, m = plan.dp or 1, plan.ep or 1, plan.sp or 1, plan.tp or 1, plan.mb or (2 * plan.stages if plan.stages > 1 else 1)
    stored = ("everything whole on each rank", "optimizer state split over dp", "optimizer state and gradients split over dp",
              "optimizer state, gradients and parameters split over dp; parameters gathered for use")  # fmt: skip
    lines = [f"{said or 'one rank'} on {mesh.ranks} rank{'s' if mesh.ranks > 1 else ''}: {mesh}"]
    lines.append(f"  dp{n:<6} " + (f"the batch is split over {n} ranks" if n > 1 else "one data-parallel rank has the whole batch"))
    lines.append(f"  zero{plan.stage:<4} {stored[plan.stage]}")
    if e > 1:
        lines.append(f"  ep{e:<6} experts are split over {e} ranks, and the rows of the batch; the ranks share the rest of the state too")
    if s > 1:
        lines.append(f"  sp{s:<6} the sequence is split over {s} ranks, which share the state too")
    if t > 1:
        lines.append(f"  tp{t:<6} each weight is split over {t} neighbouring ranks")
    if plan.stages > 1:
        layers = f"{plan.stages * plan.chunks} stages, {plan.chunks} on each of {plan.stages} ranks" if plan.chunks > 1 else f"{plan.stages} stages, one a rank"
        lines.append(f"  pp{plan.stages:<6} the layers are cut into {layers}; they run in the order of {plan.kind}")
    if plan.mb is not None:
        idle = f"; a rank is idle {idle_share(plan.kind, plan.stages, m, plan.chunks):.1%} of the step, where all stages take as long" if plan.stages > 1 else ""
        lines.append(f"  mb{m:<6} each rank's rows are cut into {m} microbatches, one after another{idle}")
    elif plan.stages > 1:
        lines.append(f"  {'mb':8} is chosen when the rows of a rank are known: the smallest divisor of them that is {2 * plan.stages} or more, else the largest; below, mb{m}")
    if plan.dtype:
        lines.append(f"  {plan.precision:8} computed in {plan.dtype}" + ("; the loss is scaled, and a step whose gradients overflow is skipped" if plan.dtype == "f16" else ""))
    if plan.grad_dtype:
        lines.append(f"  {'grads':8} reduced and added up in {plan.grad_dtype}")
    if plan.chunked is not None:
        lines.append(f"  {'chunked':8} the loss of a large vocabulary and its gradients for {plan.chunked or 'as many'} parts of the rows {'in turn' if plan.chunked else 'as memory asks for, in turn'}")
    if plan.remat:
        lines.append(f"  {'remat':8} of the forward the layers' inputs are kept; the backward computes the rest again")
    kept = "optimizer" in plan.offload and "params" not in plan.offload
    lines += [f"  {'offload':8} {OFFLOADED[kind]}" for kind in (*plan.offload, *([""] if kept else []))]
    lines += [f"  {'disk':8} what of that is stored between steps lies in files below {plan.disk}"] if plan.disk else []
    if plan.budget:
        lines.append(f"  {'budget':8} the step fits {format_bytes(plan.budget)} of each rank's device: what is computed again and what lies on the host is chosen for that")
    lines += [f"  {'':8} {note}" for note in notes(plan)]
    lines.append("")
    lines.append("  of the whole, a rank holds      closed form")
    one = {"Psi": 1.0, "G": 1.0, "Omega": 1.0, "U": 1.0, "V": 1.0, "C": 1.0, "N": float(n * e * s), "t": float(t * plan.stages), "m": float(m)}
    mixed = plan.precision in ("bf16", "fp16")
    once = mixed and plan.stage in (1, 2) and "params" not in plan.offload
    sizes = [("parameters", form.param_bytes(plan.stage, form.Psi if mixed else 0)), *([("gathered once", form.gathered_bytes(plan.stage))] if once else [])]
    for what, size in (*sizes, ("gradients", form.grad_bytes(plan.stage)), ("optimizer", form.optimizer_bytes(plan.stage))):
        lines.append(f"  {what:14}{form.value(size, **one):>10.4f}        {size}")
    volume = form.mixed_volume(plan.stage, m > 1, once or plan.stage not in (1, 2)) if mixed else form.data_volume(plan.stage, m > 1)
    if n * e * s > 1:
        lines.append(f"  {'sent over dp' if s == e == 1 else 'sent for state':14}{form.value(volume, **one):>10.4f}        {volume}")
    if mesh.ranks > 1:
        lines.append("")
        shown = [f"{rank}: " + " ".join(f"{a}={i}" for a, i in mesh.coordinate(rank).items()) for rank in range(min(mesh.ranks, 8))]
        lines.append("  rank " + ", ".join(shown) + (" ..." if mesh.ranks > 8 else ""))
    lines.append(f"next: deepseed explain TARGET --plan {said or 'zero0'}" + (f" --world-size {mesh.ranks}" if mesh.ranks > 1 else ""))
    return lines
