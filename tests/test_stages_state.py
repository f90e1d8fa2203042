"""What ranks of a pipeline store: each key at its home only, whole on demand, and in checkpoints that any plan reads."""

from __future__ import annotations

import io
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo.checkpoint import FIRST, Tagger, adamw, batches, everything, made, trained
from gloo.launch import ranks
from gloo.stages import CUTS, FOUR, LATER, LOOPS, THREE_D, ZERO3, Cut, rank_of, staged, stored_by
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.build import CompileError
from deepseed.ir.layout import Layout, Split
from deepseed.ir.mesh import Mesh, MeshError
from deepseed.ir.program import Input, Program, Type
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.host import SimulatedHost, refined
from deepseed.runtime.saved import Entry, share_out
from deepseed.runtime.state import State, StateError, at_home, gather_states, shard

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_waiting_for_the_disk")]
torch.set_num_threads(1)

TOLERANCE = 1e-12
PLANS = ["zero3+dp2", "tp2"]


@cache
def compiled(plan: str) -> TrainStep:
    return made(plan, backend="simulate")


@cache
def checkpoint_of(plan: str) -> tuple[Path, dict[str, Tensor], list[float], dict[str, Tensor]]:
    """Two steps under a plan without a pipeline and a checkpoint, with what it holds; losses and values of an uninterrupted run."""
    path, step, data = Path(tempfile.mkdtemp()) / "checkpoint", compiled(plan), batches()
    for batch in data[:FIRST]:
        step(batch)
    step.save(path)
    return (path, everything(step), *trained(step, data[FIRST:]))


@cache
def on_stages(name: str) -> TrainStep:
    return staged(CUTS[name], seed=5)


def same(mine: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(mine) == set(want)
    assert not [name for name in want if not torch.equal(mine[name], want[name])]


def goes_on(path: Path, then: str) -> None:
    """A plan without a pipeline trains on from a checkpoint as the uninterrupted run did."""
    _, _, losses, values = checkpoint_of(PLANS[0])
    step = compiled(then)
    checkpoint_of(then)
    step.load(path)
    assert step.steps == FIRST
    got, now = trained(step, batches()[FIRST:])
    assert got == pytest.approx(losses, rel=TOLERANCE, abs=0)
    for key, t in values.items():
        assert (now[key] - t).abs().max() <= TOLERANCE * max(1.0, float(t.abs().max())), key


# homes ------------------------------------------------------------------------------------------------------------------

PP2DP2 = Mesh((("pp", 2), ("dp", 2)))


def entry(stage: int, key: str = "w", role: str = "param") -> Input:
    return Input(key, Type("f64", (4, 2), Layout.of(dp=Split(0))), role, key, stage)


@pytest.mark.parametrize("mesh", [PP2DP2, Mesh((("dp", 2), ("pp", 2)))])
@pytest.mark.parametrize("stage", [0, 1, 2, 5])
def test_a_key_lies_at_its_home_only(mesh: Mesh, stage: int) -> None:
    """Stage s of any number lives on pipeline rank s % p, split there as without a pipeline."""
    full = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    states = [State(mesh, mesh.coordinate(rank), torch.device("cpu")) for rank in range(mesh.ranks)]
    for s in states:
        given = s.put(entry(stage), full)
        s.fill(entry(stage, "m", "state"), 3.0)
        here = s.coordinate["pp"] == stage % 2
        assert (s.tensors.keys() == s.types.keys()) == here and (given.numel() == 4) == here and bool(s.tensors) == here
        assert s.homes == {("param", "w"): stage % 2, ("state", "m"): stage % 2}
        if here:
            assert torch.equal(s.tensors["param", "w"], full[2 * s.coordinate["dp"] :][:2])
    got = gather_states(states)
    assert torch.equal(got["param", "w"], full) and torch.equal(got["state", "m"], torch.full((4, 2), 3.0, dtype=torch.float64))


def test_without_a_pipeline_all_is_at_home() -> None:
    state = State(Mesh((("dp", 2),)), {"dp": 1}, torch.device("cpu"))
    state.put(entry(3), torch.ones(4, 2, dtype=torch.float64))
    assert state.homes == {("param", "w"): 0} and state.tensors.keys() == state.types.keys()


def test_a_program_that_reads_what_is_stored_elsewhere_is_refused() -> None:
    full = {"w": torch.ones(4, 2, dtype=torch.float64)}
    state = State(PP2DP2, PP2DP2.coordinate(0), torch.device("cpu"))
    state.put(entry(1), full["w"])
    with pytest.raises(StateError, match=r"param 'w' is stored on pipeline rank 1, the program of rank 0, which stores what is of pipeline rank 0, reads it on 1\n.*its own stages"):
        state.inputs(Program("p", PP2DP2.without("pp"), (entry(1),), (), ()), full)
    with pytest.raises(StateError, match=r"is stored on pipeline rank 1, .* reads it on 0\n  fix: pin the stages"):
        state.inputs(Program("p", PP2DP2.without("pp"), (entry(0),), (), ()), full)
    there = State(PP2DP2, PP2DP2.coordinate(2), torch.device("cpu"))
    there.put(entry(1), full["w"])
    with pytest.raises(StateError, match="reads it on 0"):
        there.inputs(Program("p", PP2DP2.without("pp"), (entry(2),), (), ()), full)
    assert torch.equal(there.inputs(Program("p", PP2DP2.without("pp"), (entry(3),), (), ()), full)[0], full["w"][:2])


def test_a_value_of_one_position_is_whole() -> None:
    host, full = SimulatedHost(THREE_D.mesh), torch.arange(16.0).reshape(4, 4)
    type_ = Type("f32", (4, 4), Layout.of(tp=Split(1), dp=Split(0)))
    parts = [shard(full, type_, host.mesh, c) if host.position(c) == 1 else None for c in host.coordinates]
    assert torch.equal(host.whole(parts, type_, 1), full)
    with pytest.raises(StateError, match=r"rank 0 of mesh\(pp=2, dp=2, tp=2\) has no part of a value of pipeline rank 0"):
        host.whole(parts, type_)
    assert at_home([0, 1, 2, 3], Mesh((("dp", 2), ("pp", 2))), 1) == [1, 3]  # type: ignore[list-item]


def test_sub_axes_keep_the_pipeline_and_take_no_time() -> None:
    ranks_ = Mesh((("pp", 2), ("dp", 2), ("tp", 4)))
    fine = refined(ranks_, Mesh((("dp", 2), ("mb", 3), ("tp_0", 2), ("tp_1", 2))))
    assert fine == Mesh((("pp", 2), ("dp", 2), ("tp_0", 2), ("tp_1", 2)))
    assert refined(fine, Mesh((("dp", 2), ("mb", 3), ("tp_0", 2), ("tp_1", 2)))) == fine and refined(ranks_, Mesh((("dp", 2),))) == ranks_
    with pytest.raises(MeshError, match=r"tp_0=2 x tp_1=3, the ranks lie on mesh\(pp=2, dp=2, tp=4\)"):
        refined(ranks_, Mesh((("tp_0", 2), ("tp_1", 3))))


def test_only_ranks_at_home_write() -> None:
    mesh = Mesh((("dp", 2), ("pp", 3)))
    entries = {f"w{n}": Entry((6,), torch.float32, Layout(), [None] * 6, home=n % 3) for n in range(12)}
    entries["split"] = Entry((6,), torch.float32, Layout.of(dp=Split(0)), [None] * 6, home=2)
    shares = share_out(entries, mesh)
    for rank, share in enumerate(shares):
        assert {entries[name].home for name, _ in share} == {mesh.coordinate(rank)["pp"]}
    assert sorted(name for share in shares for name, _ in share) == sorted([*entries, "split"])
    assert [sum(name != "split" for name, _ in share) for share in shares] == [2] * 6  # what both ranks of a home hold: by turns


# checkpoints, all ranks in this process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTS)
def test_a_pipeline_reads_what_a_plan_without_one_wrote_and_writes_what_it_reads(name: str, tmp_path: Path) -> None:
    path, held, _, _ = checkpoint_of(PLANS[0])
    step = on_stages(name)
    assert stored_by(step, CUTS[name])
    before = everything(step)
    step.load(path)
    assert not torch.equal(before["embed.weight"], held["embed.weight"])
    same(everything(step), held)
    same(dict(step.model.state_dict()), step.state_dict())  # the module shows what the ranks hold
    step.save(tmp_path / "c")
    goes_on(tmp_path / "c", PLANS[list(CUTS).index(name) % 2])


def test_one_cut_reads_what_another_wrote(tmp_path: Path) -> None:
    """Once around all cuts, before and after the state is stored, then on without a pipeline."""
    path, held, _, _ = checkpoint_of(PLANS[0])
    for n, (name, cut) in enumerate(CUTS.items()):
        step = on_stages(name) if n % 2 else staged(cut, seed=7, before=path)
        step.load(path)
        same(everything(step), held)
        path = tmp_path / str(n)
        step.save(path)
    goes_on(path, "tp2")


def test_optimizer_state_waits_for_the_stages(tmp_path: Path) -> None:
    path, held, _, _ = checkpoint_of(PLANS[0])
    step = staged(THREE_D, seed=7, before=path)
    assert not step._resume and step.steps == FIRST
    same(everything(step), held)


def test_every_rank_says_what_does_not_fit(tmp_path: Path) -> None:
    """A dtype that only ranks of another stage would read."""
    path, _, _, _ = checkpoint_of(PLANS[0])
    other = staged(ZERO3, dtype=torch.float32)
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"is float64 in the checkpoint, float32 in this step\n  fix: load\(dir, cast=True\) casts"):
        other.load(path)
    same(everything(other), before)
    other.load(path, cast=True)


@pytest.mark.parametrize("cut", [ZERO3, LOOPS, FOUR, LATER])
def test_the_module_and_the_ranks_see_each_other(cut: Cut) -> None:
    """What is written into the module goes to the ranks of the home; what these compute shows in the module."""
    step = staged(cut)
    values = {name: t.clone() for name, t in step.state_dict().items()}
    with torch.no_grad():
        for p in step.model.parameters():
            p.mul_(2)
    step._ready()
    assert stored_by(step, cut)
    now = step.state_dict()
    assert all(torch.equal(now[name], t * 2) == t.is_floating_point() for name, t in values.items() if name.endswith("weight"))
    for state in step.states:
        for key, t in state.tensors.items():
            if key[0] == "param":
                t.add_(1)
    step.host.settle(step.model, step.states)
    for name, p in step.model.named_parameters():
        assert torch.equal(p, values[name] * 2 + 1), name
    step.load_state_dict(values)
    same(step.state_dict(), values)
    assert stored_by(step, cut)


@pytest.mark.parametrize("cut", [ZERO3, THREE_D])
def test_the_optimizer_reads_and_writes_all_stages(cut: Cut) -> None:
    path, held, _, _ = checkpoint_of(PLANS[0])
    step = staged(cut, seed=7, before=path)
    assert isinstance(step.optimizer, torch.optim.Optimizer)
    kept = step.optimizer.state_dict()
    assert len(kept["state"]) == len(list(step.model.parameters())) and not step.optimizer.state
    fresh = staged(cut, seed=7)
    fresh.optimizer.load_state_dict(kept)  # type: ignore[union-attr]
    same(fresh.optimizer_state(), {name: t for name, t in held.items() if "/" in name})
    plain = adamw(model := Tagger().double())
    plain.load_state_dict(kept)  # plain PyTorch takes it
    assert all(s["exp_avg"].shape == p.shape for p, s in plain.state.items()) and len(plain.state) == len(list(model.parameters()))


# over gloo --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gloo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    folder, source = tmp_path_factory.mktemp("stages"), checkpoint_of(PLANS[0])[0]
    return folder, ranks(4, rank_of, ["zero3+pp2", "zero3+pp2, later", "zero1+pp4", "zero1+pp2 interleaved"], str(source), str(folder))


@pytest.mark.parametrize("name", ["zero3+pp2", "zero3+pp2, later", "zero1+pp4", "zero1+pp2 interleaved"])
def test_real_ranks(name: str, on_gloo: tuple[Path, list[dict[str, dict[str, Any]]]]) -> None:
    folder, said = on_gloo
    cut, held = CUTS[name], checkpoint_of(PLANS[0])[1]
    for rank, out in enumerate(each[name] for each in said):
        same(torch.load(io.BytesIO(out["values"])), held)  # whole on every rank
        assert out["own"] and out["tied"] and out["parameters"], rank
        assert out["plain"] and out["optimizer"] and out["by the model"], rank
        at = cut.mesh.coordinate(rank)["pp"]
        elsewhere = sorted(n for n in on_stages(name).model.state_dict() if _home(cut, n) != at)
        assert out["elsewhere"] == elsewhere, rank
        assert len(out["refused"]) == 4 and all("that this rank of the pipeline does not store: ranks [" in text for text in out["refused"]), out["refused"]
        assert "was replaced by another tensor" in out["unseen"], out["unseen"]
        if name.startswith("zero3"):
            assert out["dtensors"] and not set(out["dtensors"]) & set(out["elsewhere"])
    total = sum(t.numel() for t in held.values())
    copies = sum(each[name]["stored"] for each in said)
    assert copies < 1.6 * total if name.startswith("zero3") or "pp4" in name else copies < 2 * total  # not once a pipeline rank
    goes_on(folder / name / "ours", "tp2")


def _home(cut: Cut, name: str) -> int:
    """``head.weight`` is the embedding's."""
    return cut.stage("embed.weight" if name == "head.weight" else name) % cut.mesh.size("pp")


@pytest.mark.wide
def test_real_ranks_in_three_dimensions(tmp_path: Path) -> None:
    source, held = checkpoint_of(PLANS[0])[:2]
    for out in ranks(8, rank_of, ["zero3+tp2+pp2"], str(source), str(tmp_path)):
        same(torch.load(io.BytesIO(out["zero3+tp2+pp2"]["values"])), held)
        assert all(out["zero3+tp2+pp2"][word] for word in ("own", "tied", "parameters", "plain", "optimizer", "by the model"))
    goes_on(tmp_path / "zero3+tp2+pp2" / "ours", "zero3+dp2")


# programs after the first -----------------------------------------------------------------------------------------------


class Long(nn.Module):
    """Attention, whose share of the work grows with the sequence, then layers: each length is balanced by other cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.mix = nn.Embedding(24, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + (h @ h.transpose(1, 2)).softmax(-1) @ self.mix(h)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.head(h)


def of_length(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {name: torch.randint(0, 24, (rows, length), generator=generator) for name in ("ids", "labels")}


@pytest.mark.parametrize("plan", ["zero3+pp2+dp2", "zero1+pp4+dp1"])
def test_a_later_program_finds_its_state_where_the_first_one_put_it(plan: str) -> None:
    def fresh(plan: str) -> TrainStep:
        torch.manual_seed(3)
        return made(plan, backend="simulate", model=Long())

    data = [of_length(8, 4), of_length(8, 150), of_length(8, 4)]
    want = trained(fresh("zero0+dp1"), data)
    step = fresh(plan)
    step(data[0])
    homes = dict(step.states[0].homes)
    other = fresh(plan)
    assert other.compile(data[1]).states[0].homes != homes  # by itself it would be cut elsewhere
    got = trained(step, data[1:])
    assert step.programs.compiled == 2 and step.states[0].homes == homes
    assert got[0] == pytest.approx(want[0][1:], rel=TOLERANCE, abs=0)
    assert max(float((got[1][key] - t).abs().max()) for key, t in want[1].items()) <= TOLERANCE
    stored = {i.name for i in step.program.inputs if i.role == "param"}
    for built in step.programs.cache:  # and no weight crosses: the cuts were made around them
        assert not [op for op in built.program.ops if op.target == "transfer" and op.refs[0].name in stored]


@pytest.mark.parametrize("plan", ["zero3+pp2+dp2", "zero1+pp4+dp1+zb", "zero2+pp2+dp2+interleaved2"])
@pytest.mark.parametrize("seed", range(3))
def test_any_homes_are_exact(plan: str, seed: int) -> None:
    """Where the forward cannot be cut around what is stored, weights cross to their users and gradients back."""
    step, rng = made(plan, backend="simulate"), random.Random(seed)
    stages = 2 if plan.startswith("zero3") else 4
    names = [("param", n) for n, _ in step.model.named_parameters()] + [("buffer", n) for n, _ in step.model.named_buffers()]
    asked = {key: rng.randrange(stages) for key in names}
    step.programs.homes.update(asked)
    _, _, _, values = checkpoint_of(PLANS[0])
    got = trained(step, batches())
    assert {key: step.states[0].homes[key] for key in names} == {key: stage % step.mesh.size("pp") for key, stage in asked.items()}
    assert any(op.target == "transfer" and op.part == "once.0" for op in step.program.ops)
    assert got[0][FIRST:] == pytest.approx(checkpoint_of(PLANS[0])[2], rel=TOLERANCE, abs=0)
    for key, t in values.items():
        assert (got[1][key] - t).abs().max() <= TOLERANCE * max(1.0, float(t.abs().max())), key


@pytest.mark.parametrize("plan", ["zero3+dp2+mb2", "zero3+pp2+dp2"])
def test_padding_is_checked_in_microbatches_and_on_stages(plan: str) -> None:
    """A model that takes a mean over the padded positions is refused; one that ignores them trains as without padding."""

    def padded(**model: Any) -> TrainStep:
        torch.manual_seed(3)
        return made(plan, backend="simulate", buckets=deepseed.Bucket(fill={"ids": 0, "labels": -100}, to=[8]), **model)

    with pytest.raises(CompileError, match="padding changes what this model computes: the loss is"):
        padded(model=Long())(batches(1)[0])  # its attention has no mask
    step, plain = padded(), made("zero0+dp1", backend="simulate")
    step.model.eval()
    plain.model.eval()
    assert [float(step(b)) for b in batches(2)] == pytest.approx([float(plain(b)) for b in batches(2)], rel=TOLERANCE, abs=0)
