"""Mesh, layout, program and text: properties over random programs, and a test for each thing that the verifier refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import AXES, layouts, meshes, programs, shapes

from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.layout import REPLICATED, Layout, LayoutError, Partial, Split, check, factors, local_indices, local_shape, valid
from deepseed.ir.mesh import Mesh, MeshError
from deepseed.ir.program import Builder, Op, Program, ProgramError, Ref, Type
from deepseed.ir.text import ParseError, format_type, parse
from deepseed.ir.verify import verify

MESH = Mesh((("dp", 2), ("tp", 4)))


# mesh -------------------------------------------------------------------------------------------------------------


@given(meshes())
def test_ranks_are_the_points_of_the_mesh(mesh: Mesh) -> None:
    points = [mesh.coordinate(r) for r in range(mesh.ranks)]
    assert [mesh.rank(c) for c in points] == list(range(mesh.ranks))
    assert points == [dict(zip(mesh.names, c, strict=True)) for c in product(*(range(n) for _, n in mesh.axes))]  # major first


@given(meshes())
def test_the_groups_of_an_axis_divide_the_ranks(mesh: Mesh) -> None:
    for axis in mesh.names:
        groups = {mesh.group(axis, r) for r in range(mesh.ranks)}
        assert sorted(r for g in groups for r in g) == list(range(mesh.ranks))
        assert all(len(g) == mesh.size(axis) and r in mesh.group(axis, r) for g in groups for r in g)
        assert all(mesh.coordinate(r)[axis] == i for g in groups for i, r in enumerate(g))


def test_mesh_refusals() -> None:
    with pytest.raises(MeshError, match="named twice"):
        Mesh((("dp", 2), ("dp", 2)))
    with pytest.raises(MeshError, match="tp=0"):
        Mesh((("tp", 0),))
    with pytest.raises(MeshError, match=r"rank 8 is not in mesh\(dp=2, tp=4\) \(8 ranks\)"):
        MESH.coordinate(8)
    with pytest.raises(MeshError, match="no axis 'sp'"):
        MESH.size("sp")


# layout -----------------------------------------------------------------------------------------------------------


@given(st.data(), meshes(), shapes())
def test_the_parts_of_a_dimension_partition_it(data: st.DataObject, mesh: Mesh, shape: tuple[int, ...]) -> None:
    layout = data.draw(layouts(shape, mesh))
    check(shape, layout, mesh)
    for dim, size in enumerate(shape):
        here = {axis for axis, _ in layout.splits(dim)}
        parts: dict[tuple[int, ...], list[int]] = {}
        for rank in range(mesh.ranks):
            where = mesh.coordinate(rank)
            indices = local_indices(size, dim, layout, mesh, where)
            assert len(indices) == local_shape(shape, layout, mesh.seen_from(where))[dim] <= local_shape(shape, layout, mesh)[dim]
            assert parts.setdefault(tuple(where[a] for a in sorted(here)), indices) == indices  # other axes do not matter
        assert sorted(i for part in parts.values() for i in part) == list(range(size))
        assert prod(n for n, _ in factors(size, dim, layout, mesh)) == size


@given(st.data(), meshes(), shapes())
def test_local_bytes_are_the_bytes_over_the_ranks_that_split(data: st.DataObject, mesh: Mesh, shape: tuple[int, ...]) -> None:
    layout = data.draw(layouts(shape, mesh))
    copies = mesh.ranks // prod(mesh.size(a) for a, e in layout.elements if isinstance(e, Split))
    t = Type("f32", shape, layout)
    each = [t.local_bytes(mesh.seen_from(mesh.coordinate(rank))) for rank in range(mesh.ranks)]
    assert sum(each) == copies * t.nbytes == copies * 4 * prod(shape) and max(each) <= t.local_bytes(mesh)


@pytest.mark.parametrize(
    ("shape", "layout", "text"),
    [
        ((64, 32), Layout.of(tp=Split(0)), "f32[64@tp, 32]"),
        ((64, 32), Layout.of(tp=Split(0), dp=Split(0, 4)), "f32[64@(tp,dp), 32]"),
        ((64, 32), Layout.of(dp=Split(0), tp=Split(0, 2)), "f32[64@(dp,tp), 32]"),
        ((2304,), Layout.of(tp=Split(0, 3)), "f32[3*768@tp]"),
        ((16,), Layout.of(dp=Split(0), tp=Split(0, 4)), "f32[4@dp*4@tp]"),
        ((16, 4), Layout.of(dp=Partial("max"), tp=Partial()), "f32[16, 4] max@dp sum@tp"),
        ((), Layout.of(dp=Partial()), "f32[] sum@dp"),
        ((0, 4), Layout.of(dp=Split(0)), "f32[0@dp, 4]"),
    ],
)
def test_text_of_a_layout(shape: tuple[int, ...], layout: Layout, text: str) -> None:
    assert format_type(Type("f32", shape, layout), MESH) == text
    assert parse(f'program p {MESH} facts()\n%x : {text} batch "x"\n').inputs[0].type == Type("f32", shape, layout)


def test_fused_blocks_are_each_split() -> None:
    assert local_indices(12, 0, Layout.of(dp=Split(0, 3)), MESH, {"dp": 1, "tp": 0}) == [2, 3, 6, 7, 10, 11]
    assert local_indices(16, 0, Layout.of(tp=Split(0), dp=Split(0, 4)), MESH, {"dp": 1, "tp": 2}) == [10, 11]


def test_an_axis_of_one_rank_never_overlaps_another() -> None:
    for one, two in (("dp", "tp"), ("tp", "dp")):
        assert local_shape((4,), Layout.of(dp=Split(0), tp=Split(0)), Mesh(((one, 1), (two, 2)))) == (2,)


@pytest.mark.parametrize(
    ("shape", "layout", "says"),
    [
        ((6,), Layout.of(tp=Split(0)), r"6 is not a multiple of 4 \(tp=4; 6 = 4 \* 1 \+ 2\)"),
        ((30,), Layout.of(tp=Split(0, 3)), r"30 is not a multiple of 12 \(tp=4, 3 blocks; 30 = 12 \* 2 \+ 6\)"),
        ((64,), Layout.of(dp=Split(0), tp=Split(0)), "inside another axis's range"),
        ((64,), Layout.of(dp=Split(0), tp=Split(0, 3)), "inside another axis's range"),
        ((64,), Layout.of(sp=Split(0)), r"mesh\(dp=2, tp=4\) has no axis 'sp'"),
        ((64,), Layout.of(dp=Split(1)), "splits dimension 1 .* of a tensor of 1 dimensions"),
        ((64,), Layout.of(dp=Split(0, 0)), r"outer 0"),
        ((64,), Layout.of(dp=Partial("min")), "unknown reduction 'min'"),
    ],
)
def test_layouts_that_do_not_fit(shape: tuple[int, ...], layout: Layout, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        check(shape, layout, MESH)
    assert not valid(shape, layout, MESH)


def test_layout_values() -> None:
    a = Layout.of(tp=Split(1), dp=Partial())
    assert a == Layout.of(dp=Partial(), tp=Split(1), sp=None) and hash(a) == hash(Layout.of(dp=Partial(), tp=Split(1)))
    assert a.on("tp") == Split(1) and a.on("dp") == Partial("sum") and a.on("sp") is None
    assert a.with_("dp", None) == Layout.of(tp=Split(1)) and a.with_("tp", Split(0)) == Layout.of(dp=Partial(), tp=Split(0))
    assert Layout.of() == REPLICATED


# text -------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(programs())
def test_a_program_parses_back_from_its_text(p: Program) -> None:
    assert parse(str(p)) == p
    assert str(parse(str(p))) == str(p)


@settings(deadline=None)
@given(programs())
def test_blank_lines_and_comments_are_skipped(p: Program) -> None:
    lines = str(p).split("\n")
    assert parse("# made by hand\n\n" + "\n  # more\n\n".join(lines)) == p


@settings(deadline=None)
@given(programs())
def test_uses_and_producers_agree(p: Program) -> None:
    assert sum(len(u) for u in p.uses.values()) == sum(len(op.refs) for op in p.ops) + len(p.outputs)
    assert all(name in p.producers[name].results for name in p.producers)
    assert all(op.map_refs(lambda r: Ref(r.name, r.want)) is op for op in p.ops)
    for op in p.ops:
        moved = op.map_refs(lambda r: Ref(r.name + ".new", r.want))
        fresh = Op(moved.results, moved.target, moved.args, moved.types, moved.kwargs)
        assert [r.name for r in moved.refs] == [r.name + ".new" for r in op.refs]
        assert (moved.refs, moved.form) == (fresh.refs, fresh.form) and moved.form == op.form
        typed = op.typed(tuple(t.laid(REPLICATED) for t in op.types))
        assert (typed.refs, typed.form) == (op.refs, op.form) and all(t.layout == REPLICATED for t in typed.types)


def test_a_type_from_another_process_is_the_same_key() -> None:
    """Hashes of strings differ from process to process: they must not travel."""
    made = "import pickle, sys; from deepseed.ir.program import Type; from deepseed.ir.layout import Layout, Split; "
    made += "t = Type('f32', (4, 6), Layout.of(dp=Split(0))); hash(t); sys.stdout.buffer.write(pickle.dumps(t))"
    text = subprocess.run([sys.executable, "-c", made], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True).stdout
    assert {pickle.loads(text): 1}[Type("f32", (4, 6), Layout.of(dp=Split(0)))] == 1


def test_numbers_and_names_that_are_easy_to_misread() -> None:
    text = (
        "program p mesh() facts()\n"
        '%x : f32[4] batch "a\\"b\\n\\u2028"\n'
        '%l.0.mm@bwd.dW = aten.nan_to_num(%x, nan=0.0, posinf=inf, neginf=-inf) : f32[4] {at="l.0", phase="backward"}\n'
        '%y = aten.f(%x, nan, 1e-05, 1e+22, -0.0, -3, true, none, [[], [%x, 2]], "sum@dp") : f32[4], i64[] {phase="forward"}\n'
    ).replace("%y =", "%y, %z =")
    p = parse(text)
    assert str(parse(str(p))) == str(p)
    assert p.ops[0].kw("nan") == 0.0 and p.ops[0].kw("neginf") == float("-inf") and p.ops[0].name == "l.0.mm@bwd.dW"
    assert p.ops[1].args[2:8] == (1e-05, 1e22, -0.0, -3, True, None) and isinstance(p.ops[1].args[5], int)
    assert p.ops[1].refs == (Ref("x"), Ref("x"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%y = aten.mm(%x", "line 3: ends where"),
        ("%y = aten.relu(%x) : f32[4]", "line 3: ends where {"),
        ('%y = aten.relu(%x) : f32[4] {colour="red"}', "unknown attribute 'colour'"),
        ("%y = aten.relu(&) : f32[4] {}", "cannot read"),
        ('%y, %z = aten.f(%x) : f32[4] {phase="forward"}', "2 results but 1 types"),
        ("return 3 output", "return needs a value"),
        ('%y : f32[4] batch "y" "z"', "unexpected '\"z\"'"),
        ('%y : f32[four] batch "y"', "'four' where a dimension is expected"),
    ],
)
def test_text_that_is_not_a_program(line: str, says: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse(f'program p mesh(tp=2) facts()\n%x : f32[4] batch "x"\n{line}\n')
    assert says in str(caught.value) and line.strip() in str(caught.value)
    with pytest.raises(ParseError, match="empty text"):
        parse("\n")


# builder and contract ---------------------------------------------------------------------------------------------


def test_builder_names_and_closes() -> None:
    base = parse('program p mesh(tp=2) facts(placed)\n%x : f32[4] batch "x"\n%y = aten.relu(%x) : f32[4] {phase="forward"}\nreturn %y output "0"\n')
    out = Builder(base)
    for op in base.ops:
        first = out.emit(Op((out.fresh("x"),), "aten.neg", (Ref("x"),), (op.type,)))
        out.emit(op.map_refs(lambda _, first=first: Ref(first.name)))
    p = verify(out.program(add={"explicit"}))
    assert [op.name for op in p.ops] == ["x.1", "y"] and p.ops[1].args == (Ref("x.1"),) and p.facts == {"placed", "explicit"}
    assert len(base.ops) == 1  # the base is as it was


def test_a_pass_checks_what_it_needs_and_adds_what_it_gives() -> None:
    @program_pass(requires={"placed"}, provides={"explicit"})
    def nothing(p: Program) -> Program:
        """Change nothing."""
        return p

    bare = parse("program p mesh() facts()\n")
    with pytest.raises(PassError, match="pass nothing needs a program that is placed; this one is bare"):
        nothing(bare)
    assert nothing(parse("program p mesh() facts(placed)\n")).facts == {"placed", "explicit"}


# verifier ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(programs())
def test_well_formed_programs_are_accepted(p: Program) -> None:
    assert verify(p) is p


X = '%x : f32[8@dp, 4] batch "x"\n%w : f32[4, 8] param "w"\n'


@pytest.mark.parametrize(
    ("facts", "body", "says"),
    [
        ("", '%x : f32[4] batch "x2"\n', "input batch 'x2': %x is defined twice"),
        ("", '%w = aten.relu(%x) : f32[8@dp, 4] {at="mlp", phase="forward", line="m.py:3"}\n', "%w = aten.relu at mlp (m.py:3): %w is defined twice"),
        ("", '%y = aten.relu(%z) : f32[8, 4] {phase="forward"}\n', "%y = aten.relu: uses %z before its definition"),
        ("", '%y = aten.f(%x, scale=%y) : f32[8, 4] {phase="forward"}\n', "uses %y before its definition"),
        ("", 'return %z output "0"\n', "output output '0': uses %z before its definition"),
        ("", '%y = aten.relu(%x) : f32[4@(tp,dp), 4] {phase="forward"}\n', "%y: dimension 0: 4 is not a multiple of 8"),
        ("", '%y : f32[8@sp] batch "y"\n', "%y: mesh(dp=2, tp=4) has no axis 'sp'"),
        ("", '%y = aten.relu(%x as [8@sp, 4]) : f32[8, 4] {phase="forward"}\n', "wants %x: mesh(dp=2, tp=4) has no axis 'sp'"),
        ("", '%y : f31[8] batch "y"\n', "%y has unknown dtype 'f31'"),
        ("", '%y : f32[8] weight "y"\n', "%y: unknown role 'weight'"),
        ("", 'return %x logits "0"\n', "output logits '0': unknown role 'logits'"),
        ("", '%y = aten.relu(%x) : f32[8, 4] {phase="sideways"}\n', "unknown phase 'sideways'"),
        ("", '%y = aten.relu(%x) : f32[8, 4] {}\n', "unknown phase ''"),
        ("", 'return %w param "v"\n', "output param 'v': no input with this role and key"),
        ("", 'return %x param "w"\n', "output param 'w', %x: f32[8, 4] for an input of f32[4, 8]"),
        ("explicit", '%y = aten.relu(%x as [8, 4]) : f32[8, 4] {phase="forward"}\n', "wants %x in another layout than it has, in an explicit program"),
        ("explicit", '%y = aten.neg(%w) : f32[4, 8@tp] {phase="update"}\nreturn %y param "w"\n', "output param 'w', %y = aten.neg: comes back as"),
        ("explicit, lowered", '%y = reshard(%x) : f32[8, 4] {phase="forward"}\n', "%y = reshard: a reshard in a lowered program"),
        (
            "",
            '%y = all_gather.start(%x, axis="dp") : f32[8, 4] {phase="forward"}\n%z = aten.relu(%y) : f32[8, 4] {phase="forward"}\n',
            "%z = aten.relu: uses %y, a collective that was started but not waited for",
        ),
        (
            "",
            '%y = all_gather.start(%x, axis="dp") : f32[8, 4] {phase="forward"}\nreturn %y output "0"\n',
            "output output '0': returns %y, a collective that was started but not waited for",
        ),
    ],
)
def test_the_verifier_refuses(facts: str, body: str, says: str) -> None:
    try:
        p = parse(f"program p {MESH} facts({facts})\n{X}{body}")
    except ParseError:
        pytest.fail("the text should parse")
    with pytest.raises(ProgramError) as caught:
        verify(p)
    assert says in str(caught.value)


def test_the_verifier_counts_results() -> None:
    f32 = Type("f32", ())
    for op, says in ((Op((), "aten.f", (), ()), "no result = aten.f: 0 results"), (Op(("y", "z"), "aten.f", (), (f32,), path="m"), "%y, %z = aten.f at m: 2 results but 1 types")):
        with pytest.raises(ProgramError, match=says):
            verify(Program("p", MESH, (), (op,), ()))


def test_a_collective_that_is_waited_for_is_accepted() -> None:
    wait = '%y = all_gather.start(%x, axis="dp") : f32[8, 4] {phase="forward"}\n%z = wait(%y) : f32[8, 4] {phase="forward"}\nreturn %z output "0"\n'
    verify(parse(f"program p {MESH} facts(explicit, lowered)\n{X}{wait}"))
    assert set(AXES) >= set(MESH.names)
