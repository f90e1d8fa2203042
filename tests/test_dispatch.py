"""Rows that go to the ranks that own them, and back: by brute force, on real ranks, in models, and what they cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from rows import OF, ROWS, keys, there_and_back
from test_runtime import results
from torch import Tensor

from deepseed import cost
from deepseed.capture import capture
from deepseed.check.collectives import perform
from deepseed.check.equivalence import difference
from deepseed.check.instances import disagreement
from deepseed.check.shards import shards
from deepseed.check.shrink import Instance, shrink
from deepseed.check.translation import follow, number
from deepseed.check.typing import TypingError, check_types, why_not
from deepseed.ir.layout import Element, Layout, Owned, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Ref, Type
from deepseed.ir.text import format_op, parse
from deepseed.passes.canonicalize import canonicalize
from deepseed.passes.insert_reshards import insert_reshards
from deepseed.passes.localize import localize
from deepseed.passes.lower_reshards import lower_reshards
from deepseed.passes.schedule_collectives import schedule_collectives
from deepseed.passes.solve_placements import solve_placements
from deepseed.plan import parse_plan
from deepseed.runtime import collectives
from deepseed.runtime.collectives import Route, Runtime, route
from deepseed.runtime.simulate import SimulatedRuntime, simulate
from deepseed.target import load
from deepseed.verify import verify

# what a step means --------------------------------------------------------------------------------------------------


def instances(n: int) -> list[Instance]:
    """Both steps, of rows in dimension 0 and 1, beside axes that split the rows, the columns, or nothing."""
    mesh = Mesh((("dp", 2), ("ep", n), ("tp", 2)))
    out = []
    for dim, dp, tp in product((0, 1), (False, True), (False, True)):
        own, split = Owned("sum", dim, "ids", 4 * n), Split(dim, 2 if dp else 1)
        beside: dict[str, Element] = {"dp": Split(dim) if dp else None, "tp": Split(1 - dim) if tp else None}
        x = Type("f32", (48, 24) if dim == 0 else (24, 48))
        ids = Type("i64", (48,), Layout.of(dp=Split(0) if dp else None))
        here, there = x.laid(Layout.of(**beside, ep=split)), x.laid(Layout.of(**beside, ep=own))
        for target, a, b in (("dispatch.start", here, there), ("combine.start", there, here)):
            out.append(Instance(Op(("y",), target, (Ref("x"), Ref("ids")), (b,), (("axis", "ep"),)), (a, ids), mesh))
    return out


@pytest.mark.parametrize("n", [2, 3, 4])
def test_both_steps_are_what_typing_says(n: int) -> None:
    for i in instances(n):
        small = shrink(i)
        assert why_not(i.op, i.operands, i.mesh) is None
        assert why_not(small.op, small.operands, small.mesh) is None, small
        assert disagreement(small) is None, small


def test_a_row_at_the_wrong_rank_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a step sent each row to the rank after its owner."""
    from deepseed.check import collectives as meaning

    mine = meaning._mine
    monkeypatch.setattr(meaning, "_mine", lambda ids, element, n, i, dims: mine(ids, element, n, (i + 1) % n, dims))
    for i in instances(2):
        assert disagreement(shrink(i)) is not None


def due(n: int, rank: int, ids: Tensor, place: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the definition says of ``there_and_back``."""
    mesh, (dim, outer) = Mesh((("ep", n),)), place
    whole = torch.arange(ROWS * 5).reshape(ROWS, 5).to(dtype)
    whole = whole if dim == 0 else whole.t().contiguous()
    split, own = (Type("f64", tuple(whole.shape), Layout.of(ep=e)) for e in (Split(dim, outer), Owned("sum", dim, "ids", OF)))
    parts = shards(whole, split, mesh)
    there = perform("dispatch.start", parts, split, own, "ep", mesh, [ids] * n)
    return there[rank], perform("combine.start", there, own, split, "ep", mesh, [ids] * n)[rank]


def check_rows(n: int, got: list[tuple[Tensor, ...]], dtype: torch.dtype = torch.float64) -> None:
    cases = list(product(keys(), ((0, 1), (0, 2), (1, 1), (1, 2))))
    for rank, mine in enumerate(got):
        assert len(mine) == 2 * len(cases)
        for k, (ids, place) in enumerate(cases):
            for a, b in zip(mine[2 * k : 2 * k + 2], due(n, rank, ids, place, dtype), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b), (rank, ids, place)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_runtime_does_what_is_defined(n: int) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.complex64):
        check_rows(n, simulate(Mesh((("ep", n),)), [lambda rt, _: there_and_back(rt, "ep", dtype)] * n, [[] for _ in range(n)]), dtype)  # noqa: B023


def test_two_gloo_ranks_do_it_too(tmp_path: Path) -> None:
    check_rows(2, results("rows", tmp_path, 2))


WRONG_ROUTES = {
    "returned rows in another order": lambda r: Route(r.held, r.holds, r.owned.flip(0), r.owns),
    "sent rows in another order": lambda r: Route(r.held.flip(0), r.holds, r.owned, r.owns),
}


@pytest.mark.parametrize("wrong", WRONG_ROUTES.values(), ids=WRONG_ROUTES.keys())
def test_rows_in_another_order_are_caught(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(wrong)
    monkeypatch.setattr(collectives, "route", lambda *args: wrong(route(*args)))
    mesh = Mesh((("ep", 2),))

    def body(rt: Runtime, _: list[Tensor]) -> tuple[Tensor, ...]:
        part = rt.shard(torch.arange(ROWS * 5.0, dtype=torch.float64).reshape(ROWS, 5), "ep", (0, 1))
        return (rt.wait(rt.dispatch_start(part, keys()[0], "ep", (0, 1), OF)),)

    got = simulate(mesh, [body] * 2, [[], []])
    assert any(not torch.equal(got[rank][0], due(2, rank, keys()[0], (0, 1), torch.float64)[0]) for rank in range(2))
    with pytest.raises(AssertionError):
        check_rows(2, [got[0] * 40, got[1] * 40])


def test_an_id_that_no_rank_has() -> None:
    with pytest.raises(IndexError, match="a row id of 12, but there are 12"):
        route(torch.tensor([0, 12, 3, 4]), 2, 0, 1, 12)


# programs ------------------------------------------------------------------------------------------------------------

PLACED = """program p mesh(dp=2, ep=2) facts(canonical, placed)
%x : f64[8@(dp,ep), 4] batch "x"
%ids : i64[8@dp] batch "ids"
%more : i64[8@dp] batch "more"
%w : f64[6@ep, 4, 4] param "w"
%y = routed_mm(%x as [8@dp, 4] owned(ids,0,6)@ep, %w, %ids) : f64[8@dp, 4] owned(ids,0,6)@ep {phase="forward"}
%s = aten.silu(%y) : f64[8@dp, 4] owned(ids,0,6)@ep {phase="forward"}
%z = aten.exp(%s as [8@(dp,ep), 4]) : f64[8@(dp,ep), 4] {phase="forward"}
return %z output "z"
"""
LOWERED = """%x.owned_ep.start = dispatch.start(%x, %ids, axis="ep") : f64[8@dp, 4] owned(ids,0,6)@ep {phase="forward"}
%x.owned_ep = wait(%x.owned_ep.start) : f64[8@dp, 4] owned(ids,0,6)@ep {phase="forward"}
%y = routed_mm(%x.owned_ep, %w, %ids) : f64[8@dp, 4] owned(ids,0,6)@ep {phase="forward"}
%s = aten.silu(%y) : f64[8@dp, 4] owned(ids,0,6)@ep {phase="forward"}
%s.ep0.start = combine.start(%s, %ids, axis="ep") : f64[8@(dp,ep), 4] {phase="forward"}
%s.ep0 = wait(%s.ep0.start) : f64[8@(dp,ep), 4] {phase="forward"}
%z = aten.exp(%s.ep0) : f64[8@(dp,ep), 4] {phase="forward"}"""


def lowered(text: str = PLACED) -> Program:
    return lower_reshards(insert_reshards(parse(text)))


def test_rows_travel_with_the_ids_that_own_them() -> None:
    p = lowered()
    assert "\n".join(format_op(op, p.types, p.mesh) for op in p.ops) == LOWERED
    assert parse(str(p)) == p


def test_every_pass_keeps_the_meaning() -> None:
    """Ids lie as the rows do: split over ep they are gathered, whole over dp they are cut."""
    for ids in ("8@dp", "8@(dp,ep)", "8"):
        want = "%ids" if ids == "8@dp" else "%ids as [8@dp]"
        p = parse(PLACED.replace("%ids : i64[8@dp]", f"%ids : i64[{ids}]").replace("%w, %ids)", f"%w, {want})"))
        inputs = {"x": torch.randn(8, 4, dtype=torch.float64), "ids": torch.tensor([5, 0, 3, 3, 1, 4, 2, 0]), "more": torch.arange(8) % 6, "w": torch.randn(6, 4, 4, dtype=torch.float64)}
        check_types(p)
        before = number(p)
        for after in (explicit := insert_reshards(p), low := lower_reshards(explicit), schedule_collectives(low)):
            check_types(after)
            follow(before, after)
            assert difference(p, after, inputs) is None
        ranks = [localize(schedule_collectives(low), coordinate=p.mesh.coordinate(r)) for r in range(4)]
        assert difference(p, ranks[0], inputs, after_ranks=ranks) is None


def test_rows_that_move_on_another_axis_too() -> None:
    """First on the other axis, then to their owners: the ids lie as the rows do."""
    p = lowered(PLACED.replace("%s as [8@(dp,ep), 4]", "%s as [8@ep, 4]").replace("%s as [8@ep, 4]) : f64[8@(dp,ep), 4]", "%s as [8@ep, 4]) : f64[8@ep, 4]"))
    check_types(p)
    assert [op.target for op in p.ops if op.target.endswith(".start")] == ["dispatch.start", "all_gather.start", "all_gather.start", "combine.start"]


WRONG = {
    "ids of another layer": ("dispatch.start(%x, %ids", "dispatch.start(%x, %more", r"rows are owned by %ids, they travel by %more"),
    "ids of another layer on the way back": ("combine.start(%s, %ids", "combine.start(%s, %more", r"rows are owned by %ids, they travel by %more"),
    "another owner": ("%x.owned_ep.start = dispatch.start(%x, %ids, axis=\"ep\") : f64[8@dp, 4] owned(ids,0,6)", "%x.owned_ep.start = dispatch.start(%x, %ids, axis=\"ep\") : f64[8@dp, 4] owned(ids,0,12)", "wait changes the layout"),
    "owners that the ranks do not divide": ("owned(ids,0,6)", "owned(ids,0,5)", "2 ranks of ep cannot share 5 ids evenly"),
    "columns": ("owned(ids,0,6)", "owned(ids,1,6)", "moves no rows between their split and their owners"),
    "ids that lie as no rows do": ("%ids : i64[8@dp]", "%ids : i64[8@(dp,ep)]", "ids lie as .*, the rows as .*they differ"),
    "another axis": ("dispatch.start(%x, %ids, axis=\"ep\")", "dispatch.start(%x, %ids, axis=\"dp\")", "dispatch.start over dp changes ep"),
    "no ids": ("dispatch.start(%x, %ids", "dispatch.start(%x", "it takes the rows and their ids"),
}  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_refused(good: str, bad: str, message: str) -> None:
    text = str(lowered())
    assert good in text
    with pytest.raises(TypingError, match=message):
        check_types(parse(text.replace(good, bad)))


def test_ids_that_a_pass_made_others_are_caught() -> None:
    """The name stays, the value is another: what travels by it is the same by name, the value is not the same."""
    p = parse(PLACED.replace("%y =", '%k = aten.clone(%ids) : i64[8@dp] {phase="forward"}\n%y =').replace("owned(ids", "owned(k").replace("%w, %ids", "%w, %k"))
    q = lower_reshards(insert_reshards(p))
    follow(number(p), q)
    bad = replace(q, ops=tuple(replace(op, args=(Ref("more"),)) if op.name == "k" else op for op in q.ops))
    check_types(bad)
    with pytest.raises(ValueError, match="%k"):
        follow(number(p), bad)


# models --------------------------------------------------------------------------------------------------------------

REAL = "hf:MixtralForCausalLM(num_hidden_layers=2,hidden_size=512,intermediate_size=1024,num_local_experts=8,num_experts_per_tok={k},sequence_length=512)"


@cache
def captured(target: str) -> Program:
    t = load(target, meta=True)
    return canonicalize(capture(t.model, t.batch).program)


def placed(plan: str, k: int = 2) -> Program:
    parsed = parse_plan(plan)
    return lower_reshards(insert_reshards(solve_placements(captured(REAL.format(k=k)), mesh=parsed.mesh(), zero=parsed.stage)))


def tokens_moved(p: Program) -> Counter[str]:
    """The collectives over ep of rows of the hidden size."""
    return Counter(op.target for op in p.ops for t in op.types if op.target.endswith(".start") and op.kw("axis") == "ep" and t.shape[-1:] == (512,) and t.shape[0] >= 4096)


@pytest.mark.parametrize("plan", ["ep4", "ep8", "zero3+dp2+ep4"])
def test_the_solver_sends_4096_tokens_to_their_experts(plan: str) -> None:
    p = placed(plan)
    check_types(p)
    assert tokens_moved(p) == {"dispatch.start": 4, "combine.start": 4}  # 2 layers, once a direction
    n, share = parse_plan(plan).mesh().size("ep"), 2 if "dp2" in plan else 1
    moves = [op for op in p.ops if op.target in ("dispatch.start", "combine.start")]
    sent = sum(cost.sent_bytes(op.target.removesuffix(".start"), p.types[op.refs[0].name], op.type, "ep", p.mesh) for op in moves)
    assert sent == 8 * (4096 * 512 * 4) * 2 * (n - 1) // (n * n * share)


@pytest.mark.parametrize(("plan", "k"), [("ep2", 4), ("ep4", 8)])
def test_the_solver_gathers_where_that_sends_less(plan: str, k: int) -> None:
    moved = tokens_moved(placed(plan, k))
    assert moved["all_gather.start"] == moved["reduce_scatter.start"] == 4 and not moved["dispatch.start"] and not moved["combine.start"]


def test_bytes_are_those_of_the_ids() -> None:
    """Ids that are uniform send exactly B (N - 1) / N^2, others what each rank holds of rows that others own."""
    n, width = 4, 8
    sent: list[int] = [0] * n
    ids = torch.arange(64) // 4 % 4 * 3  # each quarter has four rows of each rank

    class Counting(SimulatedRuntime):
        def exchange_rows(self, x: Tensor, sends, receives, axis):  # type: ignore[no-untyped-def]
            sent[self.rank] += (sum(sends) - sends[self.coordinate[axis]]) * x[0].numel() * x.element_size()
            return super().exchange_rows(x, sends, receives, axis)

    def body(rt: Runtime, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        rt.__class__ = Counting
        part = rt.shard(torch.ones(64, width), "ep", (0, 1))
        owned = rt.wait(rt.dispatch_start(part, inputs[0], "ep", (0, 1), 12))
        return (rt.wait(rt.combine_start(owned, inputs[0], "ep", (0, 1), 12)),)

    mesh = Mesh((("ep", n),))
    here, there = (Type("f32", (64, width), Layout.of(ep=e)) for e in (Split(0), Owned("sum", 0, "ids", 12)))
    expected = cost.sent_bytes("dispatch", here, there, "ep", mesh) + cost.sent_bytes("combine", there, here, "ep", mesh)
    simulate(mesh, [body] * n, [[ids] for _ in range(n)])
    assert sent == [expected] * n == [2 * 64 * width * 4 * (n - 1) // n**2] * n
    drawn = torch.randint(0, 12, (64,), generator=torch.Generator().manual_seed(1))
    sent[:] = [0] * n
    simulate(mesh, [body] * n, [[drawn] for _ in range(n)])
    owner, holder = drawn // 3, torch.arange(64) // 16
    exact = [int((((holder == i) | (owner == i)) & (holder != owner)).sum()) * width * 4 for i in range(n)]
    assert sent == exact and sent != [expected] * n
    assert abs(sum(sent) - n * expected) < 0.15 * n * expected


@pytest.mark.parametrize("plan", ["ep4", "dp2+ep2"])
def test_equal_to_eager(plan: str) -> None:
    t = load("hf:MixtralForCausalLM")
    report = verify(t.model, t.batch, plan, steps=2)
    assert report.ok, str(report)


@pytest.mark.wide
@pytest.mark.parametrize("plan", ["ep2", "ep4", "dp2+ep4", "zero3+ep4", "ep4+tp2"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_models_are_equal_to_eager(name: str, plan: str) -> None:
    t = load(f"hf:{name}ForCausalLM")
    report = verify(t.model, t.batch, plan, steps=2)
    assert report.ok, str(report)
