"""remake: what the backward makes again rather than read, and that the numbers stay, bit for bit."""

from __future__ import annotations

import torch

from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.memory import memory
from deepseed.ops import evaluate
from deepseed.passes.fuse import fuse
from deepseed.passes.remake import remade

HEAD = "program p mesh() facts(explicit, lowered, placed)\n"

SOFTMAX = """
%h : bf16[8, 16] batch "h"
%w : bf16[16, 64] param "w"
%g : f32[8, 1] batch "g"
%x = aten.mm(%h, %w) : bf16[8, 64] {phase="forward"}
%c = cast(%x) : f32[8, 64] {phase="forward"}
%m = amax(%c, dims=[1], keepdim=true) : f32[8, 1] {phase="forward"}
%y = aten.sub.Tensor(%c, %m) : f32[8, 64] {phase="forward"}
%e = aten.exp(%y) : f32[8, 64] {phase="forward"}
%s = sum(%e, dims=[1], keepdim=true) : f32[8, 1] {phase="forward"}
%b = aten.exp(%y) : f32[8, 64] {phase="backward"}
%d = aten.mul.Tensor(%b, %g) : f32[8, 64] {phase="backward"}
return %s output "s"
return %d output "d"
"""


def done(text: str) -> tuple[Program, Program]:
    p = verify(parse(HEAD + text.strip()))
    return p, verify(remade(p))


def same(p: Program, q: Program, *xs: torch.Tensor) -> None:
    given = dict(zip((i.name for i in p.inputs), xs, strict=True))
    a, b = evaluate(p, given), evaluate(q, given)
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_a_wide_value_is_made_again_of_the_narrow_one_and_rows() -> None:
    p, q = done(SOFTMAX)
    assert [(op.name, [r.name for r in op.refs]) for op in q.ops if op.phase == "backward"] == [
        ("c.again", ["x"]), ("y.again", ["c.again", "m"]), ("b", ["y.again"]), ("d", ["b", "g"]),
    ]  # fmt: skip
    assert not any(ref.name in ("c", "y") for op in q.ops if op.phase == "backward" for ref in op.refs)
    torch.manual_seed(0)
    same(p, q, torch.randn(8, 16).bfloat16(), torch.randn(16, 64).bfloat16(), torch.randn(8, 1))


def test_what_is_as_wide_is_kept_in_the_place_of_what_is_made_of_it() -> None:
    """The kernel of the forward stores nothing that wide, and no more is held."""
    p, q = done(SOFTMAX.replace("bf16", "f32"))
    assert [op.name for op in q.ops if op.phase == "backward"][:2] == ["c.again", "y.again"]
    assert memory(fuse(q)).peak_bytes <= memory(fuse(p)).peak_bytes + 8 * 4  # %m of each row
    torch.manual_seed(0)
    same(p, q, torch.randn(8, 16), torch.randn(16, 64), torch.randn(8, 1))


def test_what_the_forward_stores_in_any_case_is_not_made_of_what_is_as_wide() -> None:
    stored = '%t = permute(%h, dims=[1, 0]) : f32[16, 8] {phase="forward"}\n%k = aten.mm(%t, %y) : f32[16, 64] {phase="forward"}\nreturn %k output "k"\nreturn %s'
    p, q = done(SOFTMAX.replace("bf16", "f32").replace("return %s", stored))
    assert p.ops == q.ops


def test_what_views_read_later_is_there_anyway() -> None:
    text = SOFTMAX.replace("bf16", "f32").replace("%c = cast(%x) : f32[8, 64]", "%x8 = reshape(%x) : f32[2, 4, 64] {phase=\"forward\"}\n%c = reshape(%x8) : f32[8, 64]")
    text = text.replace("%d = aten.mul.Tensor(%b, %g)", "%l = reshape(%x8) : f32[8, 64] {phase=\"backward\"}\n%k = aten.mul.Tensor(%b, %l) : f32[8, 64] {phase=\"backward\"}\n%d = aten.mul.Tensor(%k, %g)")
    stored = '%t = permute(%h, dims=[1, 0]) : f32[16, 8] {phase="forward"}\n%n = aten.mm(%t, %y) : f32[16, 64] {phase="forward"}\n%b = '
    _, q = done(text.replace("%b = ", stored) + 'return %n output "n"\n')
    assert "y.again" in [op.name for op in q.ops if op.phase == "backward"]


def test_what_is_there_anyway_costs_nothing() -> None:
    text = SOFTMAX.replace("bf16", "f32").replace("%d = aten.mul.Tensor(%b, %g)", "%k = aten.mul.Tensor(%b, %x) : f32[8, 64] {phase=\"backward\"}\n%d = aten.mul.Tensor(%k, %g)")
    p, q = done(text)
    assert [op.name for op in q.ops if op.phase == "backward"][:2] == ["c.again", "y.again"]
    torch.manual_seed(0)
    same(p, q, torch.randn(8, 16), torch.randn(16, 64), torch.randn(8, 1))


def test_what_no_kernel_reads_is_there_in_any_case() -> None:
    text = SOFTMAX + 'return %y output "y"\n'
    p, q = done(text)
    assert p.ops == q.ops
    p, q = done(SOFTMAX.replace("return %s", '%t = permute(%y, dims=[1, 0]) : f32[64, 8] {phase="backward"}\n%k = aten.mm(%y, %t) : f32[8, 8] {phase="backward"}\nreturn %k output "k"\nreturn %s'))
    assert p.ops == q.ops


PICK = """
%i : i64[8, 1] batch "i"
%v : f32[8, 1] batch "v"
%z = full(value={value}) : f32[8, 64] {{phase="backward"}}
%u = scatter_add(%z, %i, %v, dim=1) : f32[8, 64] {{phase="backward"}}
%s = sum(%u, dims=[1], keepdim=true) : f32[8, 1] {{phase="backward"}}
%d = aten.sub.Tensor(%u, %s) : f32[8, 64] {{phase="backward"}}
return %d output "d"
"""


def test_a_row_with_one_element_sums_up_to_it() -> None:
    p, q = done(PICK.format(value="0.0"))
    assert [op.name for op in q.ops] == ["z", "u", "d"] and [r.name for r in q.ops[-1].refs] == ["u", "v"]
    torch.manual_seed(0)
    same(p, q, torch.randint(0, 64, (8, 1)), torch.randn(8, 1))
    p, q = done(PICK.format(value="1.0"))
    assert p.ops == q.ops


def test_the_part_of_a_microbatch_makes_again_what_its_own_forward_made() -> None:
    """On one stage. What runs once, or on another stage, is read."""
    looped = SOFTMAX.replace('phase="forward"', 'phase="forward", part="forward.1"').replace('phase="backward"', 'phase="backward", part="backward.1"')
    p, q = done(looped)
    backward = [op for op in q.ops if op.phase == "backward"]
    assert [(op.name, [r.name for r in op.refs], op.part) for op in backward] == [
        ("c.again", ["x"], "backward.1"), ("y.again", ["c.again", "m"], "backward.1"), ("b", ["y.again"], "backward.1"), ("d", ["b", "g"], "backward.1"),
    ]  # fmt: skip
    torch.manual_seed(0)
    same(p, q, torch.randn(8, 16).bfloat16(), torch.randn(16, 64).bfloat16(), torch.randn(8, 1))
    for other in (looped.replace('part="backward.1"', 'part="backward.2"'), looped.replace('part="forward.1"', 'part="once.0"'), looped.replace('part="backward.1"', 'part="once.1"'), looped.replace('part="backward.1"', 'part="backward.1", stage=1')):
        p = parse(HEAD + other.strip())
        assert remade(p).ops == p.ops


COMPARED = """
%x : f32[8, 64] batch "x"
%g : f32[8, 64] batch "g"
%w : bf16[8, 64] batch "w"
%c = cast(%w) : f32[8, 64] {phase="forward"}
%y = aten.exp(%c) : f32[8, 64] {phase="forward"}
%m = amax(%y, dims=[1], keepdim=true) : f32[8, 1] {phase="forward"}
%e = aten.eq.Tensor(%y, %m) : bool[8, 64] {phase="backward"}
%d = aten.where.self(%e, %g, %x) : f32[8, 64] {phase="backward"}
%f = aten.mul.Tensor(%y, %d) : f32[8, 64] {phase="backward"}
return %f output "f"
return %m output "m"
"""


def test_what_is_compared_is_not_made_again() -> None:
    """Nor is it where another op of the backward would have it again; without the comparison it is."""
    _, q = done(COMPARED)
    assert not any(op.name.endswith(".again") for op in q.ops)
    _, q = done(COMPARED.replace("aten.eq.Tensor(%y, %m)", "aten.gt.Tensor(%x, %m)"))
    assert [op.name for op in q.ops if op.name.endswith(".again")] == ["c.again", "y.again"]


def test_a_comparison_that_is_made_again_reads_what_the_forward_made() -> None:
    _, q = done(COMPARED.replace('%e = aten.eq.Tensor(%y, %m) : bool[8, 64] {phase="backward"}', '%e = aten.ge.Tensor(%y, %m) : bool[8, 64] {phase="forward"}').replace("aten.mul.Tensor(%y, %d)", "aten.mul.Tensor(%x, %d)"))
    assert all("y" in [r.name for r in op.refs] for op in q.ops if op.target == "aten.ge.Tensor")
