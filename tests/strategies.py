"""Random meshes, shapes, layouts and programs for property tests. Well formed by construction, without a rule in sight."""

from __future__ import annotations

from hypothesis import strategies as st

from deepseed.ir.layout import Element, Layout, Partial, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import INPUT_ROLES, ITEMSIZE, PHASES, Arg, Input, Op, Output, Program, Ref, Type

AXES = ("dp", "tp", "sp", "ep")
SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 24, 36)
TARGETS = ("aten.mm", "aten.add.Tensor", "reshape", "sum", "reshard", "sdpa", "aten.nan_to_num")

words = st.from_regex(r"[a-z_][a-z0-9_]{0,7}", fullmatch=True)
names = st.lists(words, min_size=1, max_size=3).map(".".join)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts


@st.composite
def meshes(draw: st.DrawFn, max_axes: int = 3) -> Mesh:
    axes = draw(st.lists(st.sampled_from(AXES), unique=True, max_size=max_axes))
    return Mesh(tuple((axis, draw(st.sampled_from((1, 2, 2, 3, 4)))) for axis in axes))


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from(SIZES), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], mesh: Mesh) -> Layout:
    """Any layout that fits: each axis in turn replicates, is partial, or takes the next range of a dimension, blocks before it."""
    elements: dict[str, Element] = {}
    done = [1] * len(shape)
    for axis in draw(st.permutations(mesh.names)):
        n = mesh.size(axis)
        kind = draw(st.sampled_from(("replicate", "partial", "split", "split", "split")))
        if kind == "partial":
            elements[axis] = Partial(draw(st.sampled_from(("sum", "max"))))
        elif kind == "split" and shape:
            dim = draw(st.integers(0, len(shape) - 1))
            outer = done[dim] * draw(st.sampled_from((1, 1, 2, 3)))
            if shape[dim] % (outer * n) == 0:
                elements[axis] = Split(dim, outer)
                done[dim] = outer * n
    return Layout.of(**elements)


@st.composite
def types(draw: st.DrawFn, mesh: Mesh) -> Type:
    shape = draw(shapes())
    return Type(draw(st.sampled_from(sorted(ITEMSIZE))), shape, draw(layouts(shape, mesh)))


@st.composite
def programs(draw: st.DrawFn, max_ops: int = 5) -> Program:
    """Well-formed text, not meaningful arithmetic: any op on any operands, wants and origins among them."""
    mesh = draw(meshes())
    defined: dict[str, Type] = {}
    taken: set[str] = set()

    def fresh() -> str:
        name = draw(names.filter(lambda n: n not in taken))
        taken.add(name)
        return name

    def ref() -> Ref:
        name = draw(st.sampled_from(sorted(defined)))
        return Ref(name, draw(st.none() | layouts(defined[name].shape, mesh)))

    def arg(depth: int = 0) -> Arg:
        kind = draw(st.sampled_from(("ref", "ref", "scalar", "tuple") if depth < 2 else ("ref", "scalar")))
        if kind == "ref" and defined:
            return ref()
        if kind == "tuple":
            return tuple(arg(depth + 1) for _ in range(draw(st.integers(0, 3))))
        return draw(scalars)

    def op(origin: str = "") -> Op:
        args = tuple(arg() for _ in range(draw(st.integers(0, 3))))
        kwargs = tuple((key, arg()) for key in draw(st.lists(words, unique=True, max_size=2)))
        results = tuple(fresh() for _ in range(draw(st.sampled_from((1, 1, 1, 3)))))
        made = tuple(draw(types(mesh)) for _ in results)
        return Op(results, draw(st.sampled_from(TARGETS)), args, made, kwargs, draw(st.sampled_from(PHASES)), draw(texts), draw(texts), origin)

    inputs = []
    for i in range(draw(st.integers(0, 3))):
        inputs.append(Input(fresh(), draw(types(mesh)), draw(st.sampled_from(INPUT_ROLES)), f"{draw(texts)}{i}"))
        defined[inputs[-1].name] = inputs[-1].type
    origins = {key: op() for key in draw(st.lists(texts.filter(bool), unique=True, max_size=2))}
    ops = []
    for _ in range(draw(st.integers(0, max_ops))):
        ops.append(op(draw(st.sampled_from(["", *origins]))))
        defined.update(zip(ops[-1].results, ops[-1].types, strict=True))
    outputs = []
    if defined:
        outputs = [Output(ref(), role, draw(texts)) for role in draw(st.lists(st.sampled_from(("loss", "output", "grad", "norm")), max_size=2))]
    facts = draw(st.frozensets(st.sampled_from(("captured", "canonical", "placed"))))
    return Program(draw(words), mesh, tuple(inputs), tuple(ops), tuple(outputs), facts, tuple(origins.items()))
