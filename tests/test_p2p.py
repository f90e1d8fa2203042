"""Messages between pipeline ranks: order, copies, and what is refused in one process; the same over gloo, and ranks that end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from gloo import pipeline
from gloo.launch import ranks as launched
from gloo.sleep import CLOSE, Case, predicted, timed
from test_runtime import launch, results
from torch import Tensor

from deepseed.check.collectives import perform
from deepseed.ir.collective import step
from deepseed.ir.layout import Layout, Partial, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.errors import RankError
from deepseed.runtime.simulate import simulate

PP2 = Mesh((("pp", 2),))
PP2DP2 = Mesh((("pp", 2), ("dp", 2)))
F32 = torch.float32
Body = Callable[[Runtime, list[Tensor]], tuple[Tensor, ...]]


def run(*bodies: Callable[[Runtime], object], mesh: Mesh = PP2) -> list[tuple[Tensor, ...]]:
    """A body a pipeline rank."""

    def step_of(body: Callable[[Runtime], object]) -> Body:
        def step(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
            out = body(rt)
            rt.flush()
            return tuple(out) if isinstance(out, list) else ()

        return step

    each = mesh.ranks // len(bodies)
    return simulate(mesh, [step_of(body) for body in bodies for _ in range(each)], [[] for _ in range(mesh.ranks)])


def receive(rt: Runtime, source: int, shape: Sequence[int] = (2,), dtype: torch.dtype = F32) -> Tensor:
    return rt.wait(rt.receive_start(shape, dtype, source))


def send(rt: Runtime, to: int, *xs: Tensor) -> None:
    for x in xs:
        rt.send(x, to)


# order and copies ---------------------------------------------------------------------------------------------------------


def test_messages_come_in_the_order_in_which_they_were_sent() -> None:
    """Receives take their numbers when they are posted, not when they are waited for; each mesh column is a pipeline of its own."""

    def first(rt: Runtime) -> list[Tensor]:
        handle = rt.receive_start((), torch.int64, 1)
        send(rt, 1, *(torch.full((2,), 10.0 * n + rt.coordinate["dp"]) for n in range(3)))
        return [rt.wait(handle)]

    def last(rt: Runtime) -> list[Tensor]:
        handles = [rt.receive_start((2,), F32, 0) for _ in range(3)]
        rt.send(torch.tensor(7 + rt.rank), 0)
        return [rt.wait(h) for h in reversed(handles)]

    got = run(first, last, mesh=PP2DP2)
    assert [int(got[rank][0]) for rank in (0, 1)] == [9, 10]
    assert [[x.tolist() for x in got[2 + dp]] for dp in (0, 1)] == [[[20.0 + dp] * 2, [10.0 + dp] * 2, [0.0 + dp] * 2] for dp in (0, 1)]


def test_all_send_before_any_receives() -> None:
    mesh = Mesh((("pp", 4),))

    def ring(rt: Runtime) -> list[Tensor]:
        here = rt.coordinate["pp"]
        for to in ((here + 1) % 4, (here - 1) % 4):
            rt.send(torch.tensor([here, to]), to)
        return [receive(rt, source, (2,), torch.int64) for source in ((here - 1) % 4, (here + 1) % 4)]

    for rank, (left, right) in enumerate(run(ring, ring, ring, ring, mesh=mesh)):
        assert left.tolist() == [(rank - 1) % 4, rank] and right.tolist() == [(rank + 1) % 4, rank]


def test_a_message_is_a_copy_of_its_own() -> None:
    kept: list[Tensor] = []

    def first(rt: Runtime) -> None:
        x = torch.arange(6.0).view(2, 3).T  # neither contiguous
        kept.append(x)
        rt.send(x, 1)
        receive(rt, 1)
        x.zero_()  # the receiver has answered

    def last(rt: Runtime) -> list[Tensor]:
        x = receive(rt, 0, (3, 2))
        assert x.is_contiguous() and x.untyped_storage().data_ptr() != kept[0].untyped_storage().data_ptr()
        rt.send(torch.ones(2), 0)
        rt.send(torch.ones(2), 0)
        return [x]

    def takes_the_rest(rt: Runtime) -> None:
        first(rt)
        receive(rt, 1)

    (x,) = run(takes_the_rest, last)[1]
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.int16, torch.complex64], ids=str)
def test_every_dtype_and_nan_travel(dtype: torch.dtype) -> None:
    xs = [torch.tensor([float("nan"), 1, 0]).to(dtype), torch.ones((), dtype=dtype), torch.ones(0, 3, dtype=dtype)]

    def last(rt: Runtime) -> list[Tensor]:
        return [receive(rt, 0, x.shape, dtype) for x in xs]

    for x, got in zip(xs, run(lambda rt: send(rt, 1, *xs), last)[1], strict=True):
        assert got.dtype == dtype and got.shape == x.shape and torch.equal(got.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8))


# what is refused ----------------------------------------------------------------------------------------------------------


def refused(first: Callable[[Runtime], object], last: Callable[[Runtime], object]) -> str:
    with pytest.raises(RankError) as caught:
        run(first, last)
    return str(caught.value)


def test_a_deadlock_says_who_waits_for_what_from_whom() -> None:
    said = refused(lambda rt: receive(rt, 1), lambda rt: [receive(rt, 0, (3,), torch.bool), send(rt, 0, torch.ones(2))])
    assert "rank 0 waits for rank 1 to send message 0, float32[2] (0 have come from it)" in said
    assert "rank 1 waits for rank 0 to send message 0, bool[3] (0 have come from it)" in said


def test_a_value_that_is_never_sent_is_an_error() -> None:
    said = refused(lambda rt: send(rt, 1, torch.ones(2)), lambda rt: [receive(rt, 0), receive(rt, 0)])
    assert "rank 0 has finished" in said and "rank 1 waits for rank 0 to send message 1, float32[2] (1 have come from it)" in said
    said = refused(lambda rt: None, lambda rt: rt.receive_start((2,), F32, 0))
    assert "message 0 from rank 0 to rank 1, float32[2], was expected and never sent" in said


def test_what_nobody_took_is_an_error() -> None:
    said = refused(lambda rt: send(rt, 1, torch.ones(2), torch.ones(4, 1)), lambda rt: receive(rt, 0))
    assert "rank 0 flushes, and waits for rank 1 to expect message 1, float32[4, 1]" in said and "rank 1 has finished" in said
    said = refused(lambda rt: send(rt, 1, torch.ones(2), torch.ones(4, 1)), lambda rt: [receive(rt, 0), rt.receive_start((4, 1), F32, 0)])
    assert "message 1 from rank 0 to rank 1, float32[4, 1], was sent and never taken" in said and "message 0" not in said


@pytest.mark.parametrize("sent", [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 1)], ids=str)
def test_a_shape_or_dtype_that_differs_is_an_error(sent: Tensor) -> None:
    said = refused(lambda rt: rt.send(sent, 1), lambda rt: receive(rt, 0))
    assert "message 0 from rank 0 to rank 1: rank 1 expects float32[2], rank 0 sent " + f"{str(sent.dtype)[6:]}{list(sent.shape)}" in said


def test_a_tensor_written_before_it_has_come_is_an_error() -> None:
    def first(rt: Runtime) -> None:
        x = torch.ones(2)
        rt.send(x, 1)
        x.zero_()
        written.append(x)

    written: list[Tensor] = []
    assert "rank 0 wrote the tensor before it had left" in refused(first, lambda rt: receive(rt, 0))


def test_after_a_flush_what_was_sent_may_be_written() -> None:
    def first(rt: Runtime) -> None:
        x = torch.ones(2)
        rt.send(x, 1)
        rt.flush()
        x.zero_()

    assert run(first, lambda rt: [receive(rt, 0)])[1][0].tolist() == [1, 1]


def test_a_flush_waits_for_the_receiver() -> None:
    """As over gloo: two ranks that flush what the other one expects later stand still."""

    def body(rt: Runtime) -> None:
        rt.send(torch.ones(2), 1 - rt.rank)
        rt.flush()
        receive(rt, 1 - rt.rank)

    assert "rank 0 flushes, and waits for rank 1 to expect message 0, float32[2]" in refused(body, body)


def test_a_step_that_does_not_flush_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 ended its step with 1 messages under way"):
        simulate(PP2, [lambda rt, _: rt.send(torch.ones(2), 1) or (), lambda rt, _: (receive(rt, 0),)], [[], []])


def test_a_message_to_oneself_or_beyond_the_pipeline_is_refused() -> None:
    for to in (0, 2, -1):
        assert f"rank 0 is pipeline rank 0 of 2: no message goes between it and pipeline rank {to}" in refused(lambda rt, to=to: rt.send(torch.ones(2), to), lambda rt: None)  # type: ignore[misc]


# broadcast ----------------------------------------------------------------------------------------------------------------


def test_broadcast_gives_every_pipeline_rank_the_value_of_one() -> None:
    def body(rt: Runtime) -> list[Tensor]:
        mine = torch.tensor([rt.rank, 5]) if rt.coordinate["pp"] == 1 else None
        return [rt.broadcast(mine, (2,), torch.int64, 1)]

    assert [x.tolist() for (x,) in run(body, body, mesh=PP2DP2)] == [[2, 5], [3, 5], [2, 5], [3, 5]]
    assert "float32[2] is expected, rank 1 has nothing" in refused(lambda rt: rt.broadcast(None, (2,), F32, 1), lambda rt: rt.broadcast(None, (2,), F32, 1))


# microbatches -------------------------------------------------------------------------------------------------------------


def local_runtime() -> Runtime:
    got: list[Runtime] = []
    simulate(Mesh(), [lambda rt, _: got.append(rt) or ()], [[]])
    return got[0]


@pytest.mark.parametrize(("op", "dtype"), [("sum", torch.float64), ("max", torch.float64), ("sum", torch.bool), ("sum", torch.int64), ("sum", torch.bfloat16)])
def test_accumulate_is_the_definition(op: str, dtype: torch.dtype) -> None:
    mesh = Mesh((("mb", 3),))
    parts = [(4 * torch.randn(2, 3, generator=torch.Generator().manual_seed(n))).to(dtype) for n in range(3)]
    source, target = Type("f64", (2, 3), Layout.of(mb=Partial(op))), Type("f64", (2, 3))
    expected = perform("accumulate", parts, source, target, "mb", mesh)[0]
    for own in (False, True):
        given, acc = [x.clone() for x in parts], None
        for n, x in enumerate(given):
            acc = local_runtime().accumulate(acc, x, op, own=own and n == 0)
        assert acc is not None and torch.equal(acc, expected) and (acc is given[0]) == own
        assert own or all(torch.equal(x, y) for x, y in zip(given, parts, strict=True))  # a copy: what came is not written


@pytest.mark.parametrize(
    "layout",
    [
        Layout.of(mb=Split(0)), Layout.of(dp=Split(0), mb=Split(0, 2)), Layout.of(dp=Split(0, 4), mb=Split(0)), Layout.of(mb=Split(1), dp=Split(0)),
        Layout.of(dp=Split(0), mb=Split(0, 4)), Layout.of(dp=Split(1), mb=Split(1, 2)), Layout.of(mb=Split(0, 4)), Layout.of(mb=Split(0, 1, 16)),
    ],
    ids=str,
)  # fmt: skip
def test_collect_is_the_definition(layout: Layout) -> None:
    from deepseed.runtime.state import shard

    shape, mesh = (16, 24), Mesh((("dp", 2), ("mb", 4)))
    if layout.on("mb") == Split(0, 1, 16):
        mesh = Mesh((("mb", 3),))  # 6, 6 and 4 rows
    target = layout.with_("mb", None)
    found = step(shape, layout, target, "mb", mesh)
    assert found.kind == "collect" and found.put is not None
    x = torch.arange(16.0 * 24).view(shape)
    parts = [shard(x, Type("f32", shape, layout), mesh, mesh.coordinate(r)) for r in range(mesh.ranks)]
    expected = perform("collect", parts, Type("f32", shape, layout), Type("f32", shape, target), "mb", mesh)
    for rank in range(mesh.ranks):
        got = local_runtime().collect([parts[r] for r in mesh.group("mb", rank)], found.put.numbers)
        assert torch.equal(got, expected[rank]) and torch.equal(got, shard(x, Type("f32", shape, target), mesh, mesh.coordinate(rank)))


# gloo ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_messages_on_gloo_are_the_simulation(tmp_path: Path, ranks: int) -> None:
    """``ranks`` of 8: four pipeline ranks for each of two data-parallel ones."""
    mesh = pipeline.mesh_of(ranks)
    got = results("messages", tmp_path, ranks)
    expected = simulate(mesh, [lambda rt, _: (*pipeline.traffic(rt), *pipeline.posted_first(rt))] * ranks, [[] for _ in range(ranks)])
    for rank in range(ranks):
        here = got[rank]
        for a, b in zip(here["out"], expected[rank], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        group = mesh.group("pp", rank)
        p, at = len(group), group.index(rank)
        before, after = group[at - 1], group[(at + 1) % p]
        if here["big"]:
            assert [x.tolist() for x in here["big"]] == [[source, (16 << 20) - 1 + source] for source in (before, after)]
        assert here["gone"] and here["groups"] == 2 * (p - 1)
        size = sum(dtype.itemsize * 7 for dtype in pipeline.DTYPES)  # of six numbers and one; an empty tensor is not sent
        assert here["sent"] == (2 * 2 * len(pipeline.DTYPES) + pipeline.MANY, 2 * size + 16 * pipeline.MANY)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("die", "rank 2 died"), ("raise", "rank 2 failed: ValueError: a page of the data is missing"), pytest.param("sleep", "rank 2 did not come to a message", marks=pytest.mark.wide)],
)
def test_a_pipeline_rank_that_ends_is_named_by_all_others(tmp_path: Path, kind: str, says: str) -> None:
    done = launch(f"pipeline.{kind}", tmp_path, 4, seconds=pipeline.AWAY / 2)  # the rest is killed, and has no exit code of its own
    for rank, process in enumerate(done):
        assert "not reached" not in process.stdout
        if rank != 2:
            assert process.returncode == 1, f"rank {rank} did not end: {process.returncode}"
            assert says in process.stderr and f"rank {rank} gave up after" in process.stderr, f"rank {rank}:\n{process.stderr}"
    assert "receiving from pipeline rank 2 (rank 2), message " in done[1].stderr and "receiving from pipeline rank 2 (rank 2), message 2" in done[3].stderr


# the clock ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cases",
    [
        [Case("1f1b", 2, 4), Case("zb", 2, 3, tilt=0.5), Case("interleaved", 2, 4, chunks=2)],
        pytest.param([Case("1f1b", 4, 8), Case("gpipe", 4, 4, tilt=0.5), Case("interleaved", 4, 8, chunks=2), Case("zb", 4, 8)], marks=pytest.mark.wide),
    ],
    ids=["2", "4"],
)
def test_real_ranks_keep_the_time_of_the_schedule(cases: list[Case]) -> None:
    """Parts sleep: of at most twelve steps one is within 5 % of simulated time, of the parts as they were, and none below that of the sleeps as they were told."""
    got = launched(cases[0].ranks, timed, cases, 3, 12)
    for case, (_, steps) in zip(cases, got[0], strict=True):
        assert all(took >= predicted(case, 0.0) for took, _ in steps)
        took, simulated = min(steps, key=lambda step: step[0] / step[1])
        assert took <= CLOSE * simulated, f"{case}: {took} s for {simulated} s in simulated time"
    assert all(each == got[0] for each in got)
