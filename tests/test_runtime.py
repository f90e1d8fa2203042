"""The runtime: all ranks in one process, real processes over gloo, agreement, failures, and state."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo.launch import forkserver
from gloo_worker import RESHARDS, child
from placed import MLP, lowered, random_inputs, random_reshard, run_parts, run_simulated
from torch import Tensor, nn

from deepseed.ir.layout import Layout, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Input, Type
from deepseed.runtime.collectives import Runtime, cut, join, own, widest
from deepseed.runtime.errors import RankError
from deepseed.runtime.simulate import simulate
from deepseed.runtime.state import State, StateError, gather, gather_states, layout_of, placements, shard, write_back

HERE = Path(__file__).parent
DP2 = Mesh((("dp", 2),))
DP2TP2 = Mesh((("dp", 2), ("tp", 2)))


@dataclass
class Done:
    returncode: int | None
    stdout: str
    stderr: str


def launch(mode: str, folder: Path, ranks: int, seconds: float = 120, fresh: bool = False, through: str = "memory") -> list[Done]:
    """Run the worker on ``ranks`` processes; each one's exit code and output. ``fresh``: new interpreters, as a launcher would
    start; else forked from a server that has torch loaded, which saves seconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "DEEPSEED_CMA": "0" if through == "gloo" else "1"}
    each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    until = time.monotonic() + seconds
    if fresh:
        command = [sys.executable, "-W", "ignore", str(HERE / "gloo_worker.py"), mode, str(folder)]
        running = [subprocess.Popen(command, env={**os.environ, **e}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for e in each]
        done = []
        try:
            for p in running:
                out, err = p.communicate(timeout=max(until - time.monotonic(), 0.1))
                done.append(Done(p.returncode, out, err))
        finally:
            for p in running:
                p.kill()
        return done
    forked = [forkserver().Process(target=child, args=(mode, str(folder), e), daemon=True) for e in each]
    for f in forked:
        f.start()
    for f in forked:
        f.join(max(until - time.monotonic(), 0.1))
    for f in forked:
        f.kill()
    return [Done(f.exitcode, (folder / f"{n}.out").read_text(), (folder / f"{n}.err").read_text()) for n, f in enumerate(forked)]


def results(mode: str, folder: Path, ranks: int, through: str = "memory") -> list[Any]:
    for rank, done in enumerate(launch(mode, folder, ranks, through=through)):
        assert done.returncode == 0, f"rank {rank}:\n{done.stderr}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


# gloo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "through"), [(2, "memory"), (2, "gloo"), (4, "memory"), (4, "gloo")])
def test_random_reshards_on_gloo_are_bitwise_the_simulation(tmp_path: Path, ranks: int, through: str) -> None:
    got = results("reshards", tmp_path, ranks, through)
    for seed in range(RESHARDS):
        text, _, parts = random_reshard(seed, ranks)
        for rank, expected in enumerate(run_parts(text, parts)):
            assert torch.equal(got[rank][seed], expected), f"seed {seed}, rank {rank}\n{text}"


@pytest.mark.parametrize("through", ["memory", "gloo"])
def test_training_steps_on_gloo_are_the_simulation(tmp_path: Path, through: str) -> None:
    p, full = lowered(MLP), random_inputs(lowered(MLP))
    first = run_simulated(p, full)
    again = run_simulated(p, {**full, **{key: t for (_, key), t in first.stored.items()}})
    got = results("step", tmp_path, 4, through)
    for rank, here in enumerate(got):
        for expected, outputs in zip((first, again), here["outputs"], strict=True):
            for a, b in zip(expected.ranks[rank], outputs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
        for key, whole in again.stored.items():
            torch.testing.assert_close(here["local"][key], again.states[rank].tensors[key], rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(here["whole"][key], whole, rtol=1e-13, atol=1e-14)
            assert torch.equal(here["dtensors"][key], here["whole"][key])


@pytest.mark.parametrize("through", ["memory", "gloo"])
def test_every_dtype_on_gloo_is_the_simulation(tmp_path: Path, through: str) -> None:
    got = results("dtypes", tmp_path, 2, through)

    def body(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
        out: list[Tensor] = []
        for name in got[0]:
            dtype = getattr(torch, name.removeprefix("torch."))
            x = (torch.arange(24).reshape(8, 3) % 7 - (0 if dtype is torch.uint8 else 2) + rt.rank).to(dtype)
            out += [
                rt.wait(rt.all_gather_start(x, "dp", (1, 1))), rt.wait(rt.all_reduce_start(x, "dp")),
                rt.wait(rt.reduce_scatter_start(x, "dp", (0, 2))), rt.wait(rt.all_to_all_start(x, "dp", (0, 4), (1, 3))),
                rt.wait(rt.all_reduce_start(x[0, 0], "dp")), rt.wait(rt.all_gather_start(x[:0], "dp", (0, 1))),
            ]  # fmt: skip
            if not dtype.is_complex:
                out.append(rt.wait(rt.all_reduce_start(x, "dp", "max")))
        return tuple(out)

    for rank, expected in enumerate(simulate(DP2, [body] * 2, [[], []])):
        flat = [t for tensors in got[rank].values() for t in tensors]
        for a, b in zip(flat, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_ranks_agree_on_text_and_values(tmp_path: Path) -> None:
    for said in results("agreement", tmp_path, 2):
        assert len(said) == 2
        assert "line 2:\n    rank 0: line two\n    rank 1: line two differs" in said[0]
        assert "batch = 4 on rank 0, batch = 5 on rank 1" in said[1]


@pytest.mark.parametrize("through", ["memory", "gloo"])
def test_a_late_rank_is_waited_for(tmp_path: Path, through: str) -> None:
    assert all(torch.equal(t, torch.full((3,), 2.0)) for t in results("slow", tmp_path, 2, through))


@pytest.mark.parametrize(
    ("kind", "culprit", "says", "through"),
    [
        ("raise", 3, "rank 3 failed: ValueError: the batch has a hole", "memory"),
        ("raise0", 0, "rank 0 failed: ValueError: the batch has a hole", "gloo"),
        ("die", 3, "rank 3 died", "gloo"),
        ("die", 3, "rank 3 died", "memory"),
        ("die0", 0, "rank 0, which keeps the store where ranks meet, is gone", "memory"),
        ("sleep", 3, "rank 3 did not come to a collective", "gloo"),
        ("sleep", 3, "rank 3 did not come to a collective", "memory"),
    ],
)
@pytest.mark.turn
def test_one_ranks_trouble_ends_all_and_is_named(tmp_path: Path, kind: str, culprit: int, says: str, through: str) -> None:
    began = time.monotonic()
    done = launch(f"trouble.{kind}", tmp_path, 4, fresh=kind == "die" and through == "gloo", through=through)
    for rank, process in enumerate(done):
        assert process.returncode not in (0, None) and "not reached" not in process.stdout
        if rank != culprit:
            assert says in process.stderr, f"rank {rank}:\n{process.stderr}"
    assert time.monotonic() - began < 110


# one process ----------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_ends_the_simulation_and_is_named() -> None:
    def body(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
        if rt.rank == 1:
            raise ValueError("a bad batch")
        return (rt.wait(rt.all_reduce_start(torch.ones(2), "dp")),)

    with pytest.raises(RankError, match=r"rank 1 .*ValueError: a bad batch") as caught:
        simulate(DP2, [body] * 2, [[], []])
    assert caught.value.rank == 1 and isinstance(caught.value.__cause__, ValueError)


def test_a_deadlock_is_an_error_that_says_who_waits_for_whom() -> None:
    def body(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
        return (rt.wait(rt.all_reduce_start(torch.ones(2), "dp")),) if rt.rank == 0 else ()

    with pytest.raises(RankError, match=r"rank 0 waits for \[1\] in all_reduce \(sum\) over dp of float32\[2\]"):
        simulate(DP2, [body] * 2, [[], []])


def test_collectives_that_do_not_match_are_named() -> None:
    def body(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
        return (rt.wait(rt.all_reduce_start(torch.ones(2 + rt.rank), "dp")),)

    with pytest.raises(RankError, match=r"rank 1 does .*\[3\], rank 0 .*\[2\]"):
        simulate(DP2, [body] * 2, [[], []])


def test_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="4 ranks, but 1 steps"):
        simulate(DP2TP2, [lambda rt, inputs: ()], [[]])


def test_an_operand_may_be_overwritten_after_the_own_wait() -> None:
    def body(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
        x = torch.full((2,), float(rt.rank + 1))
        total = rt.wait(rt.all_reduce_start(x, "dp"))
        x.zero_()
        return (total,)

    assert [r[0].tolist() for r in simulate(DP2, [body] * 2, [[], []])] == [[3, 3], [3, 3]]


def test_join_undoes_cut() -> None:
    x = torch.arange(48).reshape(2, 12, 2)
    for dim, outer, n in ((0, 1, 2), (1, 1, 3), (1, 2, 3), (1, 3, 2), (2, 2, 1)):
        assert torch.equal(join(cut(x, n, (dim, outer)), (dim, outer)), x)
    assert cut(x, 2, (0, 1)).data_ptr() == x.data_ptr()
    for place, n in (((1, 1, 12, 1), 5), ((1, 2, 3, 2), 2), ((1, 4, 3, 1), 4), ((0, 1, 2, 1), 3)):
        blocks = cut(x, n, place)
        assert blocks.shape[0] == n and torch.equal(join(blocks, place), x)
        parts = [own(block, n, i, place) for i, block in enumerate(blocks)]
        assert sum(part.numel() for part in parts) == x.numel()
        assert torch.equal(join(torch.stack([widest(part, n, place) for part in parts]), place), x)


# state ----------------------------------------------------------------------------------------------------------------


LAYOUTS = [
    Layout(), Layout.of(dp=Split(0)), Layout.of(tp=Split(0)), Layout.of(tp=Split(0), dp=Split(0, 2)), Layout.of(dp=Split(0), tp=Split(0, 2)),
    Layout.of(tp=Split(0, 3)), Layout.of(tp=Split(0, 3), dp=Split(0, 6)), Layout.of(dp=Split(1), tp=Split(0, 3)), Layout.of(dp=Split(0, 3)),
    Layout.of(dp=Split(0), tp=Split(0, 6)), Layout.of(tp=Split(0), dp=Split(0, 6)),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_placements_are_dtensors_own_parts(layout: Layout) -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    t = Type("f32", (24, 4), layout)
    full = torch.arange(96.0).reshape(24, 4)
    where = placements(t, DP2TP2)
    assert layout_of(where, t.shape, DP2TP2) == layout
    for rank in range(4):
        local = full
        for axis, placement in zip(DP2TP2.names, where, strict=True):  # DTensor's definition: cut in the order of the mesh
            if placement.is_replicate():
                continue
            assert isinstance(placement, _StridedShard) or placement.is_shard()
            pieces, _ = placement._split_tensor(local, 2, with_padding=False)  # type: ignore[attr-defined]
            local = pieces[DP2TP2.coordinate(rank)[axis]]
        assert torch.equal(local, shard(full, t, DP2TP2, DP2TP2.coordinate(rank)))
    assert torch.equal(gather([shard(full, t, DP2TP2, DP2TP2.coordinate(r)) for r in range(4)], t, DP2TP2), full)


def test_a_whole_parameter_is_the_modules_own_storage() -> None:
    module = nn.Linear(4, 4)
    state = State(DP2, {"dp": 0}, torch.device("cpu"))
    kept = state.put(Input("w", Type("f32", (4, 4)), "param", "weight"), module.weight)
    state.bind(module)
    kept.zero_()
    assert module.weight.abs().sum() == 0 and isinstance(module.weight, nn.Parameter)


def test_split_parameters_come_back_into_the_module() -> None:
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()
    entry = Input("w", Type("f32", (4, 4), Layout.of(dp=Split(0))), "param", "weight")
    states = [State(DP2, {"dp": i}, torch.device("cpu")) for i in range(2)]
    for s in states:
        s.put(entry, module.weight).mul_(2)
    assert torch.equal(gather_states(states)["param", "weight"], 2 * before)
    write_back(module, states)
    assert torch.equal(module.weight, 2 * before)
    with pytest.raises(StateError, match="needs a DeviceMesh"):
        states[0].bind(module)


def test_inputs_say_what_does_not_fit() -> None:
    p = lowered(MLP)
    full = random_inputs(p)
    state = State(p.mesh, p.mesh.coordinate(0), torch.device("cpu"))
    with pytest.raises(StateError, match="no value for param 'w1'"):
        state.inputs(p, {})
    with pytest.raises(StateError, match=r"batch 'x': float64\[3, 8\] for an input of f64\[8, 8\]"):
        state.inputs(p, {**full, "x": torch.zeros(3, 8, dtype=torch.float64)})


def test_freed_memory_is_kept_from_the_end_of_a_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, what a matrix library takes for good would lie among freed values of the first step, and later ones would not fit."""
    from deepseed.runtime import executable, pages

    seen: list[str] = []
    monkeypatch.setattr(pages, "_steps", itertools.count(1))
    monkeypatch.setattr(pages, "keep_freed_memory", lambda: seen.append("kept"))
    monkeypatch.setattr(pages, "huge_pages", lambda: seen.append("huge"))
    step = executable.Executable("def step(rt, inputs):\n    note('step')\n    return ()\n", "kept", kernels={"note": seen.append})
    rt: Any = Namespace(arena=None)
    step(rt, [])
    assert seen == ["step", "kept"]
    halves = executable.Executable("def forward(rt, inputs):\n    note('forward')\n    return (), ()\ndef backward(rt, kept, tangents):\n    note('backward')\n    return ()\n", "kept2", kernels={"note": seen.append}).halves()
    halves.forward(rt, [])
    halves.backward(rt, [])
    assert seen == ["step", "kept", "forward", "backward"]
    for _ in range(40):
        step(rt, [])
    assert [sum(w in ("step", "backward") for w in seen[:k]) for k, w in enumerate(seen) if w == "huge"] == [4, 32]
