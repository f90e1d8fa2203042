"""fuse: which ops one kernel computes, that the order stays legal, and that the numbers are those of the ungrouped program, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from placed import new_state
from strategies import batches, captured, plans

from deepseed import pipeline
from deepseed.codegen.inductor import python
from deepseed.codegen.kernels import kernels
from deepseed.codegen.python import generate
from deepseed.codegen.triton import launches
from deepseed.ir.contract import PassError
from deepseed.ir.fragment import fragment, groups
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program, ProgramError
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.ops import evaluate
from deepseed.passes.fuse import fuse
from deepseed.passes.fuse_alike import fuse_alike
from deepseed.passes.fuse_products import fuse_products
from deepseed.passes.group_kernels import group_kernels
from deepseed.passes.localize import localize
from deepseed.rules.strides import laid_out
from deepseed.runtime.executable import Executable
from deepseed.runtime.simulate import simulate

HEAD = "program p mesh({mesh}) facts(explicit, lowered, placed)\n"


def fused(text: str, mesh: str = "") -> Program:
    lines = [line if "phase=" in line or " = " not in line else f'{line} {{phase="forward"}}' for line in text.strip().splitlines()]
    return verify(fuse(verify(parse(HEAD.format(mesh=mesh) + "\n".join(lines)))))


def members(p: Program) -> list[list[str]]:
    return [[op.name for op in p.ops[g.first : g.last]] for g in groups(p)]


NORM = """
%x : f32[8, 16] batch "x"
%r : f32[8, 16] batch "r"
%w : f32[16] param "w"
%h = aten.add.Tensor(%x, %r) : f32[8, 16]
%sq = aten.mul.Tensor(%h, %h) : f32[8, 16]
%s = sum(%sq, dims=[1], keepdim=true) : f32[8, 1]
%e = aten.add.Tensor(%s, 1e-06) : f32[8, 1]
%i = aten.rsqrt(%e) : f32[8, 1]
%n = aten.mul.Tensor(%h, %i) : f32[8, 16]
%y = aten.mul.Tensor(%n, %w) : f32[8, 16]
"""


def test_a_norm_with_the_residual_before_it_is_one_kernel(golden: Callable[[object], None]) -> None:
    p = fused(NORM + 'return %y output "y"\nreturn %h output "h"\n')
    assert members(p) == [["h", "sq", "s", "e", "i", "n", "y"]]
    (g,) = groups(p)
    assert (g.reads, g.makes) == (("x", "r", "w"), ("h", "y"))
    golden(fragment(p, g))


def test_what_two_spaces_compute_is_two_kernels() -> None:
    p = fused(NORM + '%t = reshape(%y) : f32[16, 8]\n%m = amax(%t, dims=[1], keepdim=true) : f32[16, 1]\n%z = aten.sub.Tensor(%t, %m) : f32[16, 8]\nreturn %z output "z"\n')
    assert members(p) == [["h", "sq", "s", "e", "i", "n", "y"], ["m", "z"]]


def test_a_sum_over_rows_ends_a_kernel_of_its_own() -> None:
    p = fused("""
%g : f32[8, 16] batch "g"
%x : f32[8, 16] batch "x"
%a = aten.neg(%g) : f32[8, 16]
%b = aten.mul.Tensor(%a, %x) : f32[8, 16]
%c = aten.exp(%a) : f32[8, 16]
%s = sum(%b, dims=[0], keepdim=false) : f32[16]
return %c output "c"
return %s output "s"
""")
    assert members(p) == [["a", "c"], ["b", "s"]]


def test_an_op_that_must_run_in_between_keeps_two_apart() -> None:
    """%a and %c would be one kernel; %m reads %a, and %c reads %m."""
    p = fused("""
%x : f32[8, 8] batch "x"
%a = aten.exp(%x) : f32[8, 8]
%b = aten.neg(%a) : f32[8, 8]
%m = aten.mm(%b, %b) : f32[8, 8]
%c = aten.add.Tensor(%a, %m) : f32[8, 8]
%d = aten.neg(%c) : f32[8, 8]
return %d output "d"
""")
    assert members(p) == [["a", "b"], ["c", "d"]]


def test_ops_come_side_by_side_and_what_reads_them_follows() -> None:
    p = fused("""
%x : f32[8, 8] batch "x"
%y : f32[8, 8] batch "y"
%a = aten.exp(%x) : f32[8, 8]
%m = aten.mm(%x, %x) : f32[8, 8]
%k = aten.mm(%a, %y) : f32[8, 8]
%b = aten.mul.Tensor(%a, %m) : f32[8, 8]
return %b output "b"
return %k output "k"
""")
    assert [op.name for op in p.ops] == ["m", "a", "b", "k"]
    assert members(p) == [["a", "b"]]


def test_no_collective_and_nothing_that_waits_for_one_lies_inside() -> None:
    p = fused("""
%x : f32[8@dp, 8] batch "x"
%a = aten.exp(%x) : f32[8@dp, 8]
%b = aten.neg(%a) : f32[8@dp, 8]
%s = all_gather.start(%b, axis="dp") : f32[8, 8]
%w = wait(%s) : f32[8, 8]
%c = aten.exp(%w) : f32[8, 8]
%d = aten.neg(%c) : f32[8, 8]
return %d output "d"
""", "dp=2")  # fmt: skip
    assert members(p) == [["a", "b"], ["c", "d"]]


def test_phases_are_borders() -> None:
    p = fused("""
%x : f32[8, 8] batch "x"
%a = aten.exp(%x) : f32[8, 8] {phase="forward"}
%b = aten.neg(%a) : f32[8, 8] {phase="forward"}
%c = aten.exp(%b) : f32[8, 8] {phase="backward"}
%d = aten.neg(%c) : f32[8, 8] {phase="backward"}
return %d output "d"
""")
    assert members(p) == [["a", "b"], ["c", "d"]]


def test_halves_of_a_head_are_read_as_one_tensor() -> None:
    """A rotation: the slices are views of what the kernel reads anyhow, so that it reads that alone; permute and reshape are where it writes."""
    p = fused("""
%q : f32[2, 4, 3, 8] batch "q"
%cos : f32[3, 8] batch "cos"
%a = aten.mul.Tensor(%q, %cos) : f32[2, 4, 3, 8]
%l = slice(%q, dim=3, start=0, step=1) : f32[2, 4, 3, 4]
%h = slice(%q, dim=3, start=4, step=1) : f32[2, 4, 3, 4]
%n = aten.neg(%h) : f32[2, 4, 3, 4]
%c = cat([%n, %l], dim=3) : f32[2, 4, 3, 8]
%y = aten.add.Tensor(%a, %c) : f32[2, 4, 3, 8]
%p = permute(%y, dims=[0, 2, 1, 3]) : f32[2, 3, 4, 8]
%r = reshape(%p) : f32[6, 32]
return %r output "r"
""")
    (g,) = groups(p)
    assert (g.reads, g.makes, len(p.ops)) == (("q", "cos"), ("r",), g.last - g.first)


def test_a_half_that_is_read_outside_is_no_part_of_a_kernel_of_wholes() -> None:
    p = fused("""
%q : f32[4, 8] batch "q"
%e = aten.exp(%q) : f32[4, 8]
%f = aten.neg(%e) : f32[4, 8]
%h = slice(%f, dim=1, start=4, step=1) : f32[4, 4]
%n = aten.neg(%h) : f32[4, 4]
%m = aten.exp(%n) : f32[4, 4]
return %m output "m"
""")
    assert members(p) == [["e", "f"], ["n", "m"]]


def test_one_op_alone_is_left_to_the_library() -> None:
    assert not members(fused('%x : f32[4] batch "x"\n%y = aten.exp(%x) : f32[4]\nreturn %y output "y"\n'))


def test_a_scalar_joins_no_kernel_of_many_rows() -> None:
    p = fused("""
%s : f32[] batch "s"
%x : f32[64, 512] batch "x"
%a = aten.sqrt(%s) : f32[]
%b = aten.reciprocal(%a) : f32[]
%y = aten.mul.Tensor(%x, %b) : f32[64, 512]
%z = aten.neg(%y) : f32[64, 512]
return %z output "z"
""")
    assert members(p) == [["a", "b"], ["y", "z"]]


def test_with_kernels_a_softmax_stays_apart_and_a_product_where_kernels_compute_it() -> None:
    text = HEAD.format(mesh="") + """%x : f32[8, 16] batch "x"
%w : f32[16, 16] param "w"
%b : f32[16] param "b"
origin "y" %y = aten._softmax(%x, -1, false) : f32[8, 16] {phase="forward"}
origin "z" %z = aten.addmm(%b, %y, %w) : f32[8, 16] {phase="forward"}
%y.amax = amax(%x, dims=[1], keepdim=true) : f32[8, 1] {phase="forward", origin="y"}
%y.sub = aten.sub.Tensor(%x, %y.amax) : f32[8, 16] {phase="forward", origin="y"}
%y.exp = aten.exp(%y.sub) : f32[8, 16] {phase="forward", origin="y"}
%y.sum = sum(%y.exp, dims=[1], keepdim=true) : f32[8, 1] {phase="forward", origin="y"}
%y = aten.div.Tensor(%y.exp, %y.sum) : f32[8, 16] {phase="forward", origin="y"}
%z.mm = aten.mm(%y, %w) : f32[8, 16] {phase="forward", origin="z"}
%z = aten.add.Tensor(%z.mm, %b) : f32[8, 16] {phase="forward", origin="z"}
return %z output "z"
"""
    p = verify(group_kernels(verify(parse(text)), kernels=True))
    assert [op.target for op in p.ops if not op.kernel] == ["aten.addmm"]
    assert members(p) == [["y.amax", "y.sub", "y.exp", "y.sum", "y"]] and not p.origins
    p = verify(group_kernels(verify(parse(text)), kernels=True, products="joined"))
    assert members(p) == [["y.amax", "y.sub", "y.exp", "y.sum", "y"], ["z.mm", "z"]] and not p.origins
    p = verify(group_kernels(verify(parse(text.replace("f32[", "i32["))), kernels=True, products="joined"))
    assert [op.target for op in p.ops if not op.kernel] == ["aten.addmm"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda ops: (ops[0], replace(ops[1], kernel=""), *ops[2:]), "goes on behind %sq"),
        (lambda ops: (*ops[:-1], replace(ops[-1], phase="backward")), "which is forward"),
        (lambda ops: (*ops[:-1], replace(ops[-1], target="aten.neg", args=ops[-1].args[:1], types=(ops[-1].type.on(True),))), "reach the host"),
        (lambda ops: (*ops[:-1], replace(ops[-1], target="share", args=ops[-1].args[:1])), "move values"),
    ],
)  # fmt: skip
def test_the_verifier_names_a_broken_group(edit: Callable[..., tuple[object, ...]], said: str) -> None:
    p = fused(NORM + 'return %y output "y"\n')
    with pytest.raises(ProgramError, match=said):
        verify(replace(p, ops=edit(p.ops)))  # type: ignore[arg-type]


# numbers ------------------------------------------------------------------------------------------------------------


def run(p: Program, inputs: dict[str, torch.Tensor], grouped: bool) -> list[torch.Tensor]:
    """What ranks return and store, from source with a line an op, or a line a group."""
    sources, states = [], [new_state(p, inputs, rank) for rank in range(p.mesh.ranks)]
    for rank in range(p.mesh.ranks):
        mine = localize(p, p.mesh.coordinate(rank))
        found = kernels(mine, *laid_out(mine)) if grouped else {}
        names = {mark: k.name for mark, k in found.items()}
        sources.append(Executable(generate(mine, kernels=names), kernels={k.name: python(k) for k in found.values()}, codegen="functions" if grouped else ""))
    returned = simulate(p.mesh, sources, [s.inputs(p, inputs) for s in states])
    return [t for r in returned for t in r] + [t for s in states for t in s.tensors.values()]


@given(captured(max_layers=5), plans(), st.integers(0, 99))
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_grouped_programs_compute_the_same_bits(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    same_bits(p, plan, seed)


@pytest.mark.wide
@given(captured(max_layers=8, uneven=True), plans(uneven=True), st.integers(0, 99))
@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_grouped_programs_compute_the_same_bits_wide(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    same_bits(p, plan, seed)


def same_bits(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    """Every check of the pipeline passes over the grouped program; and its numbers are those of the same ops without groups."""
    mesh, zero = plan
    try:
        done = pipeline.run(p, pipeline.arguments(mesh, zero, {}, kernels=True), pipeline.SHARED)
    except PassError:
        raise UnsatisfiedAssumption from None
    inputs, before, after = batches(p, seed), done[-2].program, done[-1].program
    apart = all(op.name in before.producers and before.producers[op.name].target == op.target for op in after.ops)  # else whole ops stand for what was taken apart
    if apart:
        whole, grouped = evaluate(before, inputs), evaluate(after, inputs)
        assert all(torch.equal(torch.nan_to_num(whole[name]), torch.nan_to_num(grouped[name])) for name in whole)
    for a, b in zip(run(before if apart else after, inputs, False), run(after, inputs, True), strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


# matrix products ------------------------------------------------------------------------------------------------------

PRODUCTS = """program p mesh() facts(explicit, lowered, placed)
%x : f32[6, 8] batch "x"
%w : f32[8, 10] param "w"
%b : f32[10] param "b"
%h = aten.mm(%x, %w) : f32[6, 10] {phase="forward"}
%o = aten.exp(%x) : f32[6, 8] {phase="forward"}
%r = reshape(%h) : f32[2, 3, 10] {phase="forward"}
BETWEEN%a = aten.add.Tensor(%r, %b) : f32[2, 3, 10] {phase="forward"}
%y = aten.gelu(%a) : f32[2, 3, 10] {phase="forward"}
AFTERreturn %y output "y"
return %o output "o"
return %LAST output "last"
"""


def with_products(between: str = "", after: str = "", last: str = "y") -> Program:
    p = verify(parse(PRODUCTS.replace("BETWEEN", between).replace("AFTER", after).replace("LAST", last)))
    return verify(fuse_products(fuse(p)))


def mark(p: Program, name: str) -> str:
    return p.producers[name].kernel


def test_a_product_joins_the_group_behind_it() -> None:
    p = with_products()
    assert mark(p, "h") == mark(p, "r") == mark(p, "a") == mark(p, "y") == "y"
    (g,) = groups(p)
    assert g.reads == ("x", "w", "b") and g.makes == ("y",)
    assert [op.name for op in p.ops].index("o") < g.first  # what stood in between


def test_a_product_that_is_read_later_is_made_by_the_group_too() -> None:
    """The reshape has another reader: the group has one of its own."""
    p = with_products(after='%z = permute(%r, dims=[1, 0, 2]) : f32[3, 2, 10] {phase="forward"}\n', last="z")
    assert mark(p, "h") == "y" and mark(p, "r") == ""
    g = next(g for g in groups(p) if g.kernel == "y")
    assert set(g.makes) == {"h", "y"} and [op.name for op in p.ops].index("r") >= g.last


MANY = """program p mesh() facts(explicit, lowered, placed)
%a : f32[6, 8] param "a"
%b : f32[8] param "b"
%c : f32[3, 2] param "c"
%d : f32[7] param "d"
%s : f32[] param "s"
%t : f32[] param "t"
%a.n = cast(%a) : bf16[6, 8] {phase="forward"}
%s.n = aten.add.Tensor(%s, 1) : f32[] {phase="forward"}
%b.n = cast(%b) : bf16[8] {phase="forward"}
%d.w = cast(%d) : f64[7] {phase="forward"}
%t.n = aten.add.Tensor(%t, 1) : f32[] {phase="forward"}
%c.n = cast(%c) : bf16[3, 2] {phase="forward"}
%c.w = cast(%c.n) : f64[3, 2] {phase="forward"}
%d.n = cast(%d) : bf16[7] {phase="forward"}
""" + "".join(f'return %{v} output "{v}"\n' for v in ("a.n", "b.n", "d.w", "c.w", "d.n", "s.n", "t.n"))


def test_what_does_the_same_to_many_tensors_is_one_kernel() -> None:
    """What casts to something else does not join, nor what reads one of them and what stands behind that; step counts between them are another kernel."""
    p = verify(fuse_alike(verify(parse(MANY))))
    casts, counts = groups(p)
    assert (casts.makes, casts.reads) == (("a.n", "b.n", "c.n"), ("a", "b", "c")) and (counts.makes, counts.reads) == (("s.n", "t.n"), ("s", "t"))
    assert all(mark(p, name) == "" for name in ("d.w", "c.w", "d.n"))
    assert [launches(fragment(p, g)) for g in (casts, counts)] == [1, 1]


def test_operands_that_were_made_for_a_kernel_of_many_are_few() -> None:
    """They would live until it ends: 3 casts of 16 bytes each read what was made, of 40 bytes at once two."""
    made = "".join(f'%m{n} = aten.mm(%a, %a) : f32[2, 2] {{phase="forward"}}\n' for n in range(3)) + "".join(f'%c{n} = cast(%m{n}) : bf16[2, 2] {{phase="forward"}}\n' for n in range(3))
    p = verify(fuse_alike(verify(parse('program p mesh() facts(explicit, lowered, placed)\n%a : f32[2, 2] param "a"\n' + made + "".join(f'return %c{n} output "{n}"\n' for n in range(3)))), held=40))
    assert [g.makes for g in groups(p)] == [("c0", "c1")] and mark(p, "c2") == ""


def test_sums_of_squares_are_one_kernel_where_a_back_end_has_it() -> None:
    text = 'program p mesh() facts(explicit, lowered, placed)\n%a : f32[6, 8] param "a"\n%b : f32[9] param "b"\n' + "".join(
        f'%{v}.s = sum_of_squares(%{v}) : f32[] {{phase="update"}}\n' for v in "ab") + 'return %a.s output "a"\nreturn %b.s output "b"\n'  # fmt: skip
    p = verify(parse(text))
    (g,) = groups(fuse_alike(p, sums=True))
    assert g.makes == ("a.s", "b.s") and not list(groups(fuse_alike(p)))


def test_a_product_that_is_read_before_the_group_stays_alone() -> None:
    p = with_products(between='%n = permute(%h, dims=[1, 0]) : f32[10, 6] {phase="forward"}\n%m = aten.mm(%w, %n) : f32[8, 6] {phase="forward"}\n', last="m")
    assert mark(p, "h") == "h" and mark(p, "m") == "m" and mark(p, "y") == "y"
