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


def fused(text: str, mesh: str = "", columns: bool = False) -> Program:
    lines = [line if "phase=" in line or " = " not in line else f'{line} {{phase="forward"}}' for line in text.strip().splitlines()]
    return verify(fuse(verify(parse(HEAD.format(mesh=mesh) + "\n".join(lines))), columns))


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


ROWS = """
%g : bf16[8, {width}] batch "g"
%x : bf16[8, {width}] batch "x"
%r : bf16[8, {width}] batch "r"
%g32 = cast(%g) : f32[8, {width}]
%x32 = cast(%x) : f32[8, {width}]
%gx = aten.mul.Tensor(%g32, %x32) : f32[8, {width}]
%s = sum(%gx, dims=[1], keepdim=true) : f32[8, 1]
%d32 = aten.mul.Tensor(%x32, %s) : f32[8, {width}]
%w32 = sum(%gx, dims=[0], keepdim=false) : f32[{width}]
%b32 = sum(%g32, dims=[0], keepdim=false) : f32[{width}]
%d = cast(%d32) : bf16[8, {width}]
%w = cast(%w32) : bf16[{width}]
%b = cast(%b32) : bf16[{width}]
%y = aten.add.Tensor(%d, %r) : bf16[8, {width}]
return %y output "y"
return %w output "w"
return %b output "b"
"""


def test_sums_across_rows_go_with_the_group_that_has_the_rows(golden: Callable[[object], None]) -> None:
    """And with them what is made of such a sum alone. Everything is read once; two kernels where programs leave parts of sums, one of C++."""
    p = fused(ROWS.format(width=16))
    (g,) = groups(p)
    assert (set(g.reads), set(g.makes), g.last - g.first) == ({"g", "x", "r"}, {"y", "w", "b"}, len(p.ops))
    assert launches(fragment(p, g)) == 2
    golden(fragment(p, g))


def test_an_operand_from_outside_is_added_up_by_the_group_that_reads_it() -> None:
    p = fused("""
%g : f32[8, 16] batch "g"
%x : f32[8, 16] batch "x"
%gx = aten.mul.Tensor(%g, %x) : f32[8, 16]
%s = sum(%gx, dims=[1], keepdim=true) : f32[8, 1]
%y = aten.mul.Tensor(%x, %s) : f32[8, 16]
%b = sum(%g, dims=[0], keepdim=false) : f32[16]
return %y output "y"
return %b output "b"
""")
    assert members(p) == [["gx", "s", "y", "b"]]


def test_a_sum_that_rows_wait_for_stays_before_them() -> None:
    """Columns are divided by their sums, then rows by theirs: a pass over the rows cannot begin before the first is complete."""
    p = fused("""
%x : f32[8, 16] batch "x"
%s = sum(%x, dims=[0], keepdim=false) : f32[16]
%y = aten.div.Tensor(%x, %s) : f32[8, 16]
%t = sum(%y, dims=[1], keepdim=true) : f32[8, 1]
%z = aten.div.Tensor(%y, %t) : f32[8, 16]
return %z output "z"
""")
    assert members(p) == [["y", "t", "z"]]


@pytest.mark.parametrize("late", ["sum", "cast"])
def test_no_group_moves_behind_a_wait_for_a_sum(late: str) -> None:
    """What %d is for would wait for the gathered weight too."""
    wait = "%w = wait(%w.start) : f32[16, 16]\n"
    p = fused(f"""
%g : bf16[8@dp, 16] batch "g"
%v : f32[16@dp, 16] param "v"
%x = cast(%g) : f32[8@dp, 16]
%s = sum(%x, dims=[1], keepdim=true) : f32[8@dp, 1]
%d = aten.mul.Tensor(%x, %s) : f32[8@dp, 16]
%w.start = all_gather.start(%v, axis="dp") : f32[16, 16]
%u = aten.relu(%d) : f32[8@dp, 16]
{wait if late == "sum" else ""}%b = sum(%x, dims=[0], keepdim=false) : f32[16] sum@dp
{wait if late == "cast" else ""}%c = cast(%b) : bf16[16] sum@dp
%h = aten.mm(%u, %w) : f32[8@dp, 16]
return %h output "h"
return %c output "c"
""", mesh="dp=2")
    order = [op.name for op in p.ops]
    assert order.index("u") < order.index("w")
    kernel_of = {op.name: op.kernel for op in p.ops}
    assert (kernel_of["b"] == kernel_of["d"]) == (late == "cast") and kernel_of["c"] != kernel_of["d"]


def test_what_columns_are_cast_to_goes_with_the_rows_of_a_device() -> None:
    text = NORM.replace('%w : f32[16] param "w"', '%v : f32[16] param "w"\n%u = cast(%v) : bf16[16]\n%w = cast(%u) : f32[16]') + 'return %y output "y"\n'
    rows = {"h", "sq", "s", "e", "i", "n", "y"}
    assert [set(ops) for ops in members(fused(text, columns=True))] == [{"u", "w"} | rows]
    assert [set(ops) for ops in members(fused(text))] == [{"u", "w"}, rows]


def test_sums_of_rows_that_are_long_are_kernels_of_their_own() -> None:
    """They would not fit into a program beside the row."""
    kernel_of = {op.name: op.kernel for op in fused(ROWS.format(width=10_000)).ops}
    assert kernel_of["y"] == kernel_of["s"] and not kernel_of["w32"] and not kernel_of["b32"]


def test_a_sum_that_more_is_made_of_takes_nothing_along() -> None:
    p = fused(ROWS.format(width=16) + 'return %w32 output "w32"\n')
    kernel_of = {op.name: op.kernel for op in p.ops}
    assert kernel_of["w32"] == kernel_of["b"] and not kernel_of["w"]


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


NORM_BACKWARD = HEAD.format(mesh="") + """%g : bf16[8, {width}] batch "g"
%x : bf16[8, {width}] batch "x"
%m : bf16[8, 1] batch "m"
%r : bf16[8, 1] batch "r"
%w : bf16[{width}] param "w"
%b : bf16[{width}] param "b"
origin "y" %y, %dw, %db = aten.native_layer_norm_backward(%g, %x, [{width}], %m, %r, %w, %b, [true, true, true]) : bf16[8, {width}], bf16[{width}], bf16[{width}] {{phase="backward"}}
%y.g = cast(%g) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.x = cast(%x) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.m = cast(%m) : f32[8, 1] {{phase="backward", origin="y"}}
%y.r = cast(%r) : f32[8, 1] {{phase="backward", origin="y"}}
%y.w = cast(%w) : f32[{width}] {{phase="backward", origin="y"}}
%y.sub = aten.sub.Tensor(%y.x, %y.m) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.n = aten.mul.Tensor(%y.sub, %y.r) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.gw = aten.mul.Tensor(%y.g, %y.w) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.p = aten.mul.Tensor(%y.gw, %y.n) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.s = sum(%y.p, dims=[1], keepdim=true) : f32[8, 1] {{phase="backward", origin="y"}}
%y.a = aten.div.Tensor(%y.s, {width}) : f32[8, 1] {{phase="backward", origin="y"}}
%y.t = sum(%y.gw, dims=[1], keepdim=true) : f32[8, 1] {{phase="backward", origin="y"}}
%y.c = aten.div.Tensor(%y.t, {width}) : f32[8, 1] {{phase="backward", origin="y"}}
%y.d = aten.sub.Tensor(%y.gw, %y.c) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.e = aten.mul.Tensor(%y.n, %y.a) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.f = aten.sub.Tensor(%y.d, %y.e) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.h = aten.mul.Tensor(%y.r, %y.f) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.q = aten.mul.Tensor(%y.g, %y.n) : f32[8, {width}] {{phase="backward", origin="y"}}
%y.u = sum(%y.q, dims=[0], keepdim=false) : f32[{width}] {{phase="backward", origin="y"}}
%y.v = sum(%y.g, dims=[0], keepdim=false) : f32[{width}] {{phase="backward", origin="y"}}
%y = cast(%y.h) : bf16[8, {width}] {{phase="backward", origin="y"}}
%dw = cast(%y.u) : bf16[{width}] {{phase="backward", origin="y"}}
%db = cast(%y.v) : bf16[{width}] {{phase="backward", origin="y"}}
return %y output "y"
return %dw output "dw"
return %db output "db"
"""


@pytest.mark.parametrize(("width", "apart"), [(16, True), (8192, True), (8193, False)])
def test_a_norm_s_backward_is_one_kernel_in_16_bits_too(width: int, apart: bool) -> None:
    """Its sums are cast behind, as the whole op rounds them once; rows whose sums would be kernels of their own are torch's."""
    p = verify(group_kernels(verify(parse(NORM_BACKWARD.format(width=width))), kernels=True, products="joined"))
    if not apart:
        assert [op.target for op in p.ops] == ["aten.native_layer_norm_backward"]
        return
    (g,) = groups(p)
    assert g.last - g.first == len(p.ops) and (g.reads, set(g.makes)) == (("g", "x", "m", "r", "w"), {"y", "dw", "db"})
    whole = verify(group_kernels(verify(parse(NORM_BACKWARD.format(width=width)))))
    generator = torch.Generator().manual_seed(0)
    inputs = {i.name: torch.randn(i.type.shape, generator=generator).bfloat16() for i in p.inputs}
    for a, b in zip(run(p, inputs, True), run(whole, inputs, False), strict=True):
        assert float((a.float() - b.float()).abs().max()) <= 2**-7 * float(b.float().abs().max())  # a unit of bfloat16 of the largest: numbers cancel


def test_a_sum_that_is_read_further_keeps_the_op_whole() -> None:
    text = NORM_BACKWARD.format(width=16).replace("%db = cast(%y.v)", '%y.k = aten.neg(%y.v) : f32[16] {phase="backward", origin="y"}\n%db = cast(%y.k)')
    assert [op.target for op in group_kernels(verify(parse(text)), kernels=True).ops] == ["aten.native_layer_norm_backward"]


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
