"""The user's own loop with the update compiled (deepseed.trained), on real ranks beside what DistributedDataParallel means."""

from __future__ import annotations

import pytest
import torch
from gloo.engine import Sequence
from gloo.launch import ranks
from gloo.trained import on_ranks

from deepseed.build import prepared, run_passes
from deepseed.capture import capture, capture_update
from deepseed.ir.layout import Split
from deepseed.ir.mesh import Mesh
from deepseed.plan import parse_plan

wide = pytest.mark.wide
PLANS = ("zero0", "zero1", "zero2", "zero3")


def exact(found: dict[str, dict[str, float]]) -> None:
    for case, worst in found.items():
        assert worst["loss"] <= 1e-12 and max(worst.values()) <= 1e-10, (case, worst)


def test_every_stage_is_ddp() -> None:
    for found in ranks(2, on_ranks, [(plan, {"own_loss": own}) for plan in PLANS for own in (True, False)]):
        exact(found)


@wide
def test_three_ranks_and_two_axes() -> None:
    for found in ranks(3, on_ranks, [(plan, {"micro": 1}) for plan in PLANS]):
        exact(found)
    for found in ranks(4, on_ranks, [(f"{plan}+tp2", {}) for plan in PLANS]):
        exact(found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_update_alone_of_a_weight_that_is_split_in_blocks(stage: int) -> None:
    """Query, key and value in one weight, over tp as 3*8: no op of the update shows the blocks, only where the weight lies. Another weight of its shape lies otherwise."""
    mesh = Mesh((("dp", 2), ("tp", 2)))
    model = Sequence()
    model.up, model.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
    plan = parse_plan(f"zero{stage}+dp2+tp2")
    module = capture(model.double(), (torch.zeros(4, 6, 8).double(),), want="module", pending=True).program
    p = run_passes(prepared(module, plan, mesh, own=True), plan, mesh, {}, tell=print)[-1].program
    stored = {("pending", o.key): p.types[o.ref.name].layout for o in p.outputs if o.role == "pending"} | {(i.role, i.key): i.type.layout for i in p.inputs if i.role == "param"}
    assert {stored["param", name].on("tp") for name in ("qkv.weight", "up.weight")} == {Split(0, 3), Split(0, 1)}
    update = capture_update(model, torch.optim.AdamW(model.parameters()), {key: torch.float64 for role, key in stored if role == "pending"}, clip_grad_norm=1.0).program
    placed = run_passes(prepared(update, plan, mesh, own=True), plan, mesh, {}, stored=stored, tell=print)[-1].program
    assert {(i.role, i.key): i.type.layout for i in placed.inputs if i.role in ("param", "pending")} == stored
