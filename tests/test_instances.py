"""The check of every distinct instance: what it counts, remembers, shrinks and says; and the shards it is made of."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_typing import DOWN, GOOD, deep, program

from deepseed.check import collectives, instances
from deepseed.check.instances import InstanceError, check_instances, disagreement
from deepseed.check.shards import ShardsError, assemble, shards
from deepseed.check.shrink import Instance, shrink
from deepseed.check.typing import check_types, why_not
from deepseed.ir.layout import Layout, Partial, Split, valid
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Ref, Type
from deepseed.rules import RULES, Rule
from deepseed.rules import strategy as strategy_module

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "_passed", set())
    monkeypatch.setattr(instances, "_hashes", {})


@pytest.mark.parametrize("name", GOOD)
def test_true_programs_pass(name: str, tmp_path: Path) -> None:
    assert check_instances(program(GOOD[name]), cache_dir=tmp_path) > 0


def test_instances_do_not_grow_with_depth(tmp_path: Path) -> None:
    assert check_instances(deep(2), cache_dir=tmp_path) == check_instances(deep(50), cache_dir=tmp_path) == 5


def test_what_was_checked_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Instance] = []
    monkeypatch.setattr(instances, "disagreement", lambda i: runs.append(i))
    check_instances(deep(2), cache_dir=tmp_path)
    first = len(runs)
    check_instances(deep(2), cache_dir=tmp_path)
    assert first == len(runs) > 0
    monkeypatch.setattr(instances, "_passed", set())
    monkeypatch.setattr(instances, "_hashes", {})  # as in a new process
    check_instances(deep(2), cache_dir=tmp_path)
    assert first == len(runs)
    instances.source_hash.cache_clear()
    monkeypatch.setattr(instances, "source_hash", lambda: "another source")
    check_instances(deep(2), cache_dir=tmp_path / "elsewhere")
    monkeypatch.setattr(instances, "_passed", set())
    check_instances(deep(2), cache_dir=tmp_path)
    assert len(runs) > first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert check_instances(deep(1), cache_dir=blocked / "below") == 5


def test_a_wrong_rule_is_named_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"aten.add.Tensor": Rule(RULES["cast"].form, "0")}
    real = strategy_module.rule_of
    monkeypatch.setattr(strategy_module, "rule_of", lambda target: wrong.get(target) or real(target))
    monkeypatch.setattr(strategy_module, "_signatures", {})
    p = program(DOWN + '%y = aten.add.Tensor(%down, 1e-12) : f32[8@dp, 32] sum@tp {at="model.norm", line="train.py:9", phase="forward"}')
    check_types(p)  # the wrong rule allows it
    with pytest.raises(InstanceError) as error:
        check_instances(p, cache_dir=tmp_path)
    text = str(error.value)
    assert "%y = aten.add.Tensor(%down f32[8@dp, 32] sum@tp) : f32[8@dp, 32] sum@tp" in text
    assert "at model.norm (train.py:9)" in text and "put together from the shards" in text and "whole" in text
    monkeypatch.setattr(strategy_module, "_signatures", {})


@pytest.mark.parametrize("kind", ["all_gather", "all_reduce", "reduce_scatter", "all_to_all", "shard", "summand"])
def test_a_wrong_collective_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh((("dp", 2), ("tp", 2)))
    t = Type("f64", (8, 8))
    types = {
        "all_gather": ({"tp": Split(0, 2), "dp": Split(0)}, {"dp": Split(0)}),
        "all_reduce": ({"tp": Partial(), "dp": Split(0)}, {"dp": Split(0)}),
        "reduce_scatter": ({"tp": Partial()}, {"tp": Split(1, 2)}),
        "all_to_all": ({"tp": Split(0)}, {"tp": Split(1)}),
        "shard": ({}, {"tp": Split(0)}),
        "summand": ({}, {"tp": Partial()}),
    }[kind]
    source, target = (t.laid(Layout.of(**e)) for e in types)  # type: ignore[arg-type]
    name = kind if kind in ("shard", "summand") else kind + ".start"
    i = Instance(Op(("y",), name, (Ref("x"),), (target,), (("axis", "tp"),)), (source,), mesh)
    assert why_not(i.op, i.operands, mesh) is None and disagreement(i) is None
    real = collectives.perform

    def turned(*args: object) -> list[torch.Tensor]:
        return [x.roll(1, 0) if rank else x for rank, x in enumerate(real(*args))]  # type: ignore[arg-type]

    monkeypatch.setattr(instances, "perform", turned)
    assert disagreement(i) is not None
    monkeypatch.setattr(instances, "perform", lambda *args: real(*args)[::-1])
    assert (disagreement(i) is not None) == (kind != "summand")  # a summand may be anyone's


def layouts(shape: tuple[int, ...], mesh: Mesh) -> list[Layout]:
    elements = [None, Partial(), *(Split(d, o) for d in range(len(shape)) for o in (1, 2, 3, 4))]
    found = [Layout.of(**dict(zip(mesh.names, e, strict=True))) for e in itertools.product(elements, repeat=len(mesh.names))]
    return [layout for layout in found if valid(shape, layout, mesh)]


def test_shards_and_assemble_are_inverse() -> None:
    mesh = Mesh((("a", 2), ("b", 3)))
    shape = (12, 24)
    x = torch.arange(288, dtype=torch.float64).view(shape)
    for layout in layouts(shape, mesh):
        t = Type("f64", shape, layout)
        parts = shards(x, t, mesh)
        assert all(tuple(p.shape) == t.local(mesh) for p in parts)
        assert torch.allclose(assemble(parts, t, mesh), x, atol=1e-12)
    top = Type("f64", shape, Layout.of(a=Partial("max"), b=Split(0)))
    assert torch.equal(assemble(shards(x, top, mesh), top, mesh), x)


def test_replicas_that_differ_are_an_error() -> None:
    mesh = Mesh((("a", 2),))
    t = Type("f64", (4,))
    with pytest.raises(ShardsError, match=r"differ: 0\.0 and 1\.0 at element 2 \(at a=1\)"):
        assemble([torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 0, 1, 0], dtype=torch.float64)], t, mesh)
    with pytest.raises(ShardsError, match="rank 0 holds"):
        assemble([torch.zeros(3), torch.zeros(3)], t, mesh)


def test_every_collective_between_all_layouts() -> None:
    """All moves over one axis beside all layouts of another, in blocks and out of them."""
    mesh = Mesh((("a", 2), ("b", 3)))
    shape = (12, 24)
    found = layouts(shape, mesh)
    checked = 0
    for source, target in [(s, t) for s in found for t in found if s != t and s.on("b") == t.on("b")]:
        for kind in ("all_gather.start", "all_reduce.start", "reduce_scatter.start", "all_to_all.start", "shard", "summand"):
            op = Op(("y",), kind, (Ref("x"),), (Type("f64", shape, target),), (("axis", "a"),))
            i = Instance(op, (Type("f64", shape, source),), mesh)
            if why_not(op, i.operands, mesh) is None:
                small = shrink(i)
                assert why_not(small.op, small.operands, small.mesh) is None
                assert disagreement(small) is None, i
                checked += 1
    assert checked > 200


def test_large_instances_are_checked_small() -> None:
    mesh = Mesh((("dp", 64), ("pp", 4), ("tp", 8)))
    laid = Layout.of(dp=Split(0), tp=Split(1, 3))
    x, w, y = Type("bf16", (4096, 8192), Layout.of(dp=Split(0))), Type("bf16", (8192, 24576), Layout.of(tp=Split(1, 3))), Type("bf16", (4096, 24576), laid)
    i = Instance(Op(("y",), "aten.mm", (Ref("x"), Ref("w")), (y,), path="layers.0"), (x, w), mesh)
    small = shrink(i)
    assert small.mesh == Mesh((("dp", 2), ("tp", 2)))
    assert [t.shape for t in small.operands] == [(4, 3), (3, 8)] and small.op.type == Type("f64", (4, 8), Layout.of(dp=Split(0), tp=Split(1, 2)))
    assert disagreement(small) is None
    cut = Instance(Op(("q",), "slice", (Ref("y"),), (replace(y, shape=(4096, 8192), layout=Layout.of(tp=Split(1))),), (("dim", 1), ("start", 8192), ("step", 1))), (replace(y, layout=Layout.of(tp=Split(1, 3))),), mesh)
    small = shrink(cut)
    assert why_not(small.op, small.operands, small.mesh) is None and disagreement(small) is None
    assert small.operands[0].numel <= 100 and small.op.kw("start") == small.op.type.shape[1]
