"""Random plans with stages for small models, and one way to run them: captured once, built for each plan, two steps beside eager PyTorch.

A draw is a model's name and a plan: mesh and order of its axes, ZeRO stage, schedule, microbatches. What runs is what the front door
runs (``build``, then the ranks in one process); only the capture is shared by the plans of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import pipeline_models
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseed.build import build
from deepseed.capture import Captured, capture
from deepseed.ir.mesh import TIME
from deepseed.plan import parse_plan
from deepseed.runtime.host import SimulatedHost
from deepseed.runtime.state import State, gather_states, shard
from deepseed.verify import LOSS_TOLERANCE, TOLERANCE, _compare, _copied, _eager, _rotate, _Run, _widen

STEPS, CLIP, RANKS = 2, 0.01, 8
DEPTHS = {"seven layers": 7, "unet": 6, "one layer five times": 5}  # how many stages a model has room for; others 4
WITH_TOKENS = ("a loss of each layer", "one layer five times")
TOGETHER = {"contrastive towers": "mb1", "batch norm": "bn(local)"}  # what models need whose rows meet
Key = tuple[str, str]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, str]:
    """A model and a plan of at most eight ranks, two to four of them in the pipeline."""
    name = draw(st.sampled_from(sorted(pipeline_models.MODELS)))
    rows = 6 if name == "odd sizes" else pipeline_models.ROWS
    room = DEPTHS.get(name, 4)
    pp = draw(st.sampled_from([n for n in (2, 2, 3, 4) if n <= room]))
    schedule = draw(st.sampled_from(["", "gpipe", "1f1b", "zb", *(f"interleaved{v}" for v in (2, 3) if v * pp <= room)]))
    sizes = {"pp": pp}
    for axis, choices in (("dp", (1, 2, 2, 4)), ("tp", (1, 1, 2, 3)), ("sp", (1, 1, 2) if name in WITH_TOKENS else (1,))):
        sizes[axis] = draw(st.sampled_from([n for n in choices if n * prod(sizes.values()) <= RANKS]))
    words = [f"{axis}{n}" for axis, n in sizes.items() if n > 1 or axis == "dp"]
    words += [f"zero{draw(st.integers(0, 3))}"]
    axes = [axis for axis, n in sizes.items() if n > 1]
    if draw(st.booleans()):
        words.append(f"order({','.join(draw(st.permutations(axes)))})")
    words += [schedule] if schedule else []
    if name in TOGETHER:
        words.append(TOGETHER[name])
    if TOGETHER.get(name) != "mb1":
        own = rows // sizes["dp"]
        m = draw(st.sampled_from([0, *(n for n in range(1, own + 1) if rows % sizes["dp"] == 0 and own % n == 0)]))
        words += [f"mb{m}"] if m else []
    return name, "+".join(words)


@dataclass(frozen=True)
class _Known:
    captured: Captured
    stored: Mapping[Key, Tensor]
    batches: Sequence[Any]
    eager: _Run
    after: Mapping[str, Tensor]  # eager's parameters and buffers


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


@cache
def _known(name: str) -> _Known:
    model, batch, loss = pipeline_models.built(name)
    ours, theirs = _copied(model), _copied(model)
    batches = [_rotate(_widen(batch), n) for n in range(STEPS)]
    captured = capture(ours, batches[0], loss_fn=loss, optimizer=sgd(list(ours.parameters())), clip_grad_norm=CLIP, want="step", grads=True, wide=True)
    stored = {("param", key): p.detach() for key, p in ours.named_parameters()} | {("buffer", key): b for key, b in ours.named_buffers()}
    eager = _eager(theirs, batches, sgd, loss, CLIP, 0)
    assert all(float(norm) > CLIP for each in eager.norms for norm in each.values())
    return _Known(captured, stored, batches, eager, dict(theirs.named_parameters()) | dict(theirs.named_buffers()))


def run(name: str, plan: str) -> str:
    """What differs from eager PyTorch, nothing where all is equal. Raises PassError where the plan is refused."""
    known, p = _known(name), parse_plan(plan).resolve()
    if p.bn == "local":
        return _own_statistics(name, plan)
    host = SimulatedHost(p.mesh())
    built = build(known.captured, p, host, wide=True, quiet=True)
    states = [State(host.mesh, c, torch.device("cpu")) for c in host.coordinates]
    for i in built.program.inputs:
        for state in states:
            if i.role == "state":
                state.fill(i, known.captured.state[i.key].fill)
            elif i.role in ("param", "buffer"):
                state.put(i, known.stored[i.role, i.key].clone())
    for n, batch in enumerate(known.batches):
        given: dict[Key, Tensor] = {("batch", k): t for k, t in known.captured.batch.flatten(batch).items()}
        given |= {("constant", k): t for k, t in built.constants.items()} | {("hyper", k): torch.tensor(read(), dtype=torch.float64) for k, read in known.captured.hyper.items()}
        given["rng", "rng"] = torch.tensor([0, n])
        arguments = []
        for e, state in zip(built.executables, states, strict=True):
            laid = [(i, i.type.laid(i.type.layout.with_(TIME, None))) for i in e.inputs]
            arguments.append([shard(given[i.role, i.key], t, host.mesh, state.coordinate) if (s := state.stored(i)) is None else s for i, t in laid])
        shown = built.returned(host, host.run(built.executables, arguments))
        found = _differs(n, known.eager, shown)
        if found:
            return found
    now = {key: t for (role, key), t in gather_states(states).items() if role in ("param", "buffer")}
    error, worst = _compare(now, {key: t.detach() for key, t in known.after.items() if key in now})
    return f"after {STEPS} steps {worst}" if error > TOLERANCE else ""


def _differs(n: int, eager: _Run, shown: Mapping[Key, Tensor]) -> str:
    loss, want = float(shown["loss", "loss"]), eager.losses[n]
    if not abs(loss - want) <= LOSS_TOLERANCE * abs(want):
        return f"step {n}: loss {loss!r}, eager {want!r}"
    grads = {key: t for (role, key), t in shown.items() if role == "grad"}
    for have, wanted in ((grads, eager.grads[n]), ({"the gradient norm": shown["norm", "grad_norm"]}, eager.norms[n])):
        error, worst = _compare(have, wanted)
        if not error <= TOLERANCE:
            return f"step {n}: {worst}"
    return ""


def _own_statistics(name: str, plan: str) -> str:
    """Where what eager computes depends on the plan: its rows are taken together as the plan has them."""
    from deepseed.verify import verify

    model, batch, loss = pipeline_models.built(name)
    report = verify(model, batch, plan, loss_fn=loss, clip_grad_norm=CLIP, optimizer_factory=sgd, steps=STEPS, backend="simulate")
    return "" if report.ok else str(report)
