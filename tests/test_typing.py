"""Programs that are well typed, and programs that are not: what the error says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

import deepseed.check.typing
from deepseed.check.typing import Typed, TypingError, check_types
from deepseed.ir.layout import Layout, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Type
from deepseed.ir.text import parse
from deepseed.ir.verify import verify

HEAD = """program t mesh(dp=2, tp=2) facts()
%x : f32[8@dp, 32] batch "x"
%w : f32[32, 64@tp] param "w"
%v : f32[64@tp, 32] param "v"
%ids : i64[8@dp] batch "ids"
%table : f32[48@tp, 32] param "table"
%qkv : f32[32, 3*16@tp] param "qkv"
"""
UP = "%up = aten.mm(%x, %w) : f32[8@dp, 64@tp] {at=\"mlp.up\", line=\"train.py:12\", phase=\"forward\"}\n"
DOWN = UP + "%down = aten.mm(%up, %v) : f32[8@dp, 32] sum@tp {phase=\"forward\"}\n"


def program(body: str) -> Program:
    result = body.strip().splitlines()[-1].split(" = ")[0].split(",")[0]
    return parse(HEAD + "\n".join(line if "{" in line else line + ' {phase="forward"}' for line in body.strip().splitlines()) + f'\nreturn {result} output "0"\n')


GOOD = {
    "megatron": DOWN + "%s = all_reduce.start(%down, axis=\"tp\") : f32[8@dp, 32]\n%y = wait(%s) : f32[8@dp, 32]",
    "sequence parallel": DOWN + "%s = reduce_scatter.start(%down, axis=\"tp\") : f32[8@(dp,tp), 32]\n%y = wait(%s) : f32[8@(dp,tp), 32]",
    "gather": "%s = all_gather.start(%table, axis=\"tp\") : f32[48, 32]\n%y = wait(%s) : f32[48, 32]",
    "all_to_all": "%s = all_to_all.start(%table, axis=\"tp\") : f32[48, 32@tp]\n%y = wait(%s) : f32[48, 32@tp]",
    "local moves": "%a = shard(%x, axis=\"tp\") : f32[8@dp, 32@tp]\n%b = summand(%x, axis=\"tp\") : f32[8@dp, 32] sum@tp",
    "reshard": "%a = reshard(%x) : f32[8, 32@(dp,tp)]",
    "vocabulary split": "%e = embedding(%table, %ids) : f32[8@dp, 32] sum@tp",
    "fused blocks": "%y = aten.mm(%x, %qkv) : f32[8@dp, 3*16@tp]\n%q = slice(%y, dim=1, start=16, step=1) : f32[8@dp, 16@tp]",
    "wanted otherwise": "%y = aten.mm(%x, %w as [32, 64]) : f32[8@dp, 64]",
    "no rule, whole": "%y = aten.linalg_inv(%table as [48, 32]) : f32[48, 32]",
}

BAD = {
    "contraction declared whole": (UP + "%y = aten.mm(%up, %v) : f32[8@dp, 32]", r"tp splits k of .*then result 1 is sum, not whole"),
    "operand not split": (UP + "%y = aten.mm(%up, %v as [64, 32]) : f32[8@dp, 32] sum@tp", r"operand 2 is split\(dim 0\), not whole"),
    "wrong dimension": ("%y = aten.mm(%x, %w) : f32[8@dp, 64] ", r"tp splits n of .*result 1 is split\(dim 1\), not whole"),
    "another axis": ("%y = aten.relu(%x) : f32[8@tp, 32]", r"dp splits d0 .*not whole"),
    "not linear": (DOWN + "%y = aten.relu(%down) : f32[8@dp, 32] sum@tp", r"partial over tp: operands sum, results sum; the op passes no partial values"),
    "partial and whole added": (DOWN + "%y = aten.add.Tensor(%down, %x) : f32[8@dp, 32] sum@tp", r"partial together may be sum in operand 1\+2"),
    "epsilon added to partial": (DOWN + "%y = aten.add.Tensor(%down, 1e-12) : f32[8@dp, 32] sum@tp", "passes no partial values"),
    "partial product of partials": (DOWN + "%y = aten.mul.Tensor(%down, %down) : f32[8@dp, 32] sum@tp", "sum in operand 1 or sum in operand 2"),
    "wrong block": ("%y = aten.mm(%x, %qkv) : f32[8@dp, 3*16@tp]\n%q = slice(%y, dim=1, start=8, step=1) : f32[8@dp, 16@tp]", "across the factors|needs whole"),
    "plain split of fused blocks": ("%q = slice(%qkv as [32, 48@tp], dim=1, start=16, step=1) : f32[32, 16@tp]", "across the factors|needs whole|not split"),
    "vocabulary in blocks": ("%e = embedding(%table as [3*16@tp, 32], %ids) : f32[8@dp, 32] sum@tp", "one contiguous range"),
    "no rule, split": ("%y = aten.linalg_inv(%table) : f32[48@tp, 32]", "has no rule"),
    "softmax over a split dimension": (UP + "%y = aten._softmax(%up, 1, false) : f32[8@dp, 64@tp]", "tp splits w, which every rank needs whole"),
    "random summands": ("%k = full(value=7) : i64[2]\n%y = bernoulli(%k, p=0.5, site=\"s\") : f32[8, 32] sum@tp", "passes no partial values"),
    "gather of another axis": ("%s = all_gather.start(%table, axis=\"dp\") : f32[48, 32]", "changes tp from .* it may change dp only"),
    "gather of a partial": (DOWN + "%s = all_gather.start(%down, axis=\"tp\") : f32[8@dp, 32]", "makes whole of split over tp; here it makes whole of sum"),
    "reduce to split": (DOWN + "%s = all_reduce.start(%down, axis=\"tp\") : f32[8@dp, 32@tp]", "makes whole of partial"),
    "a move that casts": ("%s = reshard(%table) : f64[48, 32]", "changes f32"),
    "wait that moves": ("%s = all_gather.start(%table, axis=\"tp\") : f32[48, 32]\n%y = wait(%s) : f32[48@dp, 32]", "wait changes the layout"),
    "all_to_all of nothing": ("%s = all_to_all.start(%table, axis=\"tp\") : f32[48@tp, 32]", "changes nothing"),
    "shapes": ("%y = aten.mm(%x, %v) : f32[8@dp, 32]", r"dimension of 64, the rule 'm k, k n -> m n' makes it 32"),
    "sum and max": ("%a = reshard(%x) : f32[8, 32] sum@dp max@tp", "sum over one axis and a maximum over another"),
}


@pytest.mark.parametrize("name", GOOD)
def test_well_typed(name: str) -> None:
    check_types(verify(program(GOOD[name])))


@pytest.mark.parametrize("name", BAD)
def test_ill_typed(name: str) -> None:
    body, message = BAD[name]
    with pytest.raises(TypingError, match=message):
        check_types(program(body))


def test_error_names_node_path_line_and_layouts() -> None:
    with pytest.raises(TypingError) as error:
        check_types(program(UP.replace("64@tp]", "64]")))
    assert str(error.value) == (
        "%up = aten.mm(%x f32[8@dp, 32], %w f32[32, 64@tp]) : f32[8@dp, 64]\n"
        "  at mlp.up (train.py:12), forward, mesh(dp=2, tp=2)\n"
        "  tp splits n of m=8 k=32, k=32 n=64 -> m=8 n=64: then result 1 is split(dim 1), not whole"
    )


def deep(layers: int) -> Program:
    body = []
    x = "x"
    for i in range(layers):
        body += [
            f'%u{i} = aten.mm(%{x}, %w) : f32[8@dp, 64@tp] {{at="layers.{i}", phase="forward"}}',
            f"%a{i} = aten.silu(%u{i}) : f32[8@dp, 64@tp]",
            f"%d{i} = aten.mm(%a{i}, %v) : f32[8@dp, 32] sum@tp",
            f'%s{i} = all_reduce.start(%d{i}, axis="tp") : f32[8@dp, 32]',
            f"%y{i} = wait(%s{i}) : f32[8@dp, 32]",
        ]
        x = f"y{i}"
    return program("\n".join(body))


def test_five_thousand_ops_are_typed_in_a_moment() -> None:
    p, took = deep(1000), []
    for _ in range(3):  # a collection of garbage may fall into one
        start = time.process_time()
        check_types(p)
        took.append(time.process_time() - start)
    assert min(took) < 0.3


def test_what_a_pass_left_alone_is_typed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    key = deepseed.check.typing.instance_key

    def watched(op: Op, operands: Sequence[Type]) -> tuple[object, ...]:
        looked_at.append(op.name)
        return key(op, operands)

    monkeypatch.setattr(deepseed.check.typing, "instance_key", watched)
    p, known = program(GOOD["megatron"]), Typed()
    check_types(p, known)
    assert looked_at == ["up", "down", "s", "y"]
    again = replace(p, ops=(*p.ops[:3], replace(p.ops[3])))  # equal, and another object
    check_types(again, known)
    assert looked_at[4:] == ["y"]
    check_types(replace(p, mesh=Mesh((("tp", 2), ("dp", 2)))), known)  # axis sizes decide what divides: all once more
    assert looked_at[5:] == ["up", "down", "s", "y"]


def test_what_changed_around_an_op_is_seen() -> None:
    """The same op object is ill typed once its operand has another layout."""
    p, known = program(GOOD["megatron"]), Typed()
    check_types(p, known)
    x, w, v = p.inputs[:3]
    whole = replace(v, type=v.type.laid(Layout()))
    with pytest.raises(TypingError, match=r"(?s)^%down = .*then operand 2 is split\(dim 0\), not whole"):
        check_types(replace(p, inputs=(x, w, whole, *p.inputs[3:])), known)
    check_types(p, known)
    up = replace(p.ops[0], types=(p.ops[0].type.laid(Layout.of(dp=Split(0))),))
    with pytest.raises(TypingError, match=r"(?s)^%up = .*result 1"):
        check_types(replace(p, ops=(up, *p.ops[1:])), known)
    check_types(p, known)
