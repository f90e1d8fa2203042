"""Random meshes, shapes, layouts, plans, batches and programs: what every property test draws from.

``programs`` are well-formed text, without a rule in sight; ``captured`` are programs that run, and that the whole pipeline takes. A
failure of theirs is printed (``printed``) as the text that ``deepseed opt`` accepts, behind the command that runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import torch
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from rule_examples import EXAMPLES, example
from torch import Tensor

from deepseed.check.instances import _indexed
from deepseed.check.shrink import Instance
from deepseed.ir.contract import PassError
from deepseed.ir.layout import Element, Layout, Partial, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import FLOATS, INPUT_ROLES, ITEMSIZE, PHASES, Arg, Input, Op, Output, Program, Ref, Type
from deepseed.ops import torch_dtype

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
    """Any layout that fits: each axis in turn replicates, is partial, or takes the next range of a dimension, blocks before it; unevenly where it
    does not divide what is left."""
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
            rest = shape[dim] // outer
            if shape[dim] % (outer * n) == 0:
                elements[axis] = Split(dim, outer)
                done[dim] = outer * n
            elif shape[dim] % outer == 0 and n > 1:
                of = draw(st.sampled_from([k for k in range(2, rest + 1) if rest % k == 0 and k % n] or [0]))
                if of:
                    elements[axis] = Split(dim, outer, of)
                    done[dim] = outer * of
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


# programs that mean something ----------------------------------------------------------------------------------------

EVEN, UNEVEN = (4, 8, 12, 24), (3, 5, 7, 9, 10, 13)
NEW = 0.5  # how often an operand is a new input though a value of its type exists
DISCONTINUOUS = ("argm", "topk", "sort", "median", "kthvalue", "round", "floor", "ceil", "sign", "trunc", "fmod", "remainder", "nextafter")


@st.composite
def plans(draw: st.DrawFn, uneven: bool = False) -> tuple[Mesh, int]:
    """A mesh and a ZeRO stage: dp and tp of 1 to 4, at times sp or ep, 8 ranks at the most. ``uneven``: 3 and 5 ranks too."""
    some = (1, 2, 3, 4, 5) if uneven else (1, 2, 2, 4)
    rarely = (1, 1, 1, 1, 1, 2, 3) if uneven else (1, 1, 1, 1, 1, 2)
    sizes: dict[str, int] = {}
    for axis, choices in (("dp", some), ("tp", some), ("ep", rarely), ("sp", rarely)):
        sizes[axis] = draw(st.sampled_from([n for n in choices if n * prod(sizes.values()) <= 8]))
    return Mesh(tuple((axis, sizes[axis]) for axis in ("dp", "ep", "sp", "tp") if sizes[axis] > 1)), draw(st.integers(0, 3))


class _Writer:
    """Writes a program: draws operands from the values that there are, or new inputs."""

    def __init__(self, draw: st.DrawFn, uneven: bool) -> None:
        self.draw = draw
        self.sizes = UNEVEN if uneven else EVEN
        self.rows = draw(st.sampled_from((5, 7, 9) if uneven else (8, 12, 24)))
        self.inputs: list[Input] = []
        self.ops: list[Op] = []
        self.values: dict[str, Type] = {}  # floating ones, by name
        self.bounds: dict[str, int] = {}  # of integer inputs

    def size(self) -> int:
        return self.draw(st.sampled_from(self.sizes))

    def input(self, t: Type, role: str, bound: int = 0) -> Ref:
        name = f"{'w' if role == 'param' else 's' if role == 'state' else 'x'}{len(self.inputs)}"
        self.inputs.append(Input(name, t, role, name))
        self.bounds[name] = bound
        if t.dtype == "f64" and role != "state":
            self.values[name] = t
        return Ref(name)

    def emit(self, target: str, args: tuple[Arg, ...], shape: tuple[int, ...], phase: str = "forward", dtype: str = "f64", **kwargs: Arg) -> Ref:
        name = f"v{len(self.ops)}"
        self.ops.append(Op((name,), target, args, (Type(dtype, shape),), tuple(kwargs.items()), phase, f"layer{len(self.ops)}"))
        if dtype == "f64" and phase == "forward":
            self.values[name] = Type(dtype, shape)
        return Ref(name)

    def value(self, t: Type, role: str = "") -> Ref:
        """A value of type ``t``: one that there is, or a new input."""
        found = [name for name, has in self.values.items() if has == t]
        if found and (not role or self.draw(st.booleans())):
            return Ref(self.draw(st.sampled_from(found[::-1])))
        return self.input(t, role or ("batch" if t.shape[:1] == (self.rows,) else "param"))

    def some(self, rank: int) -> tuple[Ref, tuple[int, ...]]:
        """A value of ``rank`` dimensions, with its shape; at the first time the batch."""
        found = [name for name, t in self.values.items() if len(t.shape) == rank and all(t.shape)]
        if found:
            name = self.draw(st.sampled_from(found[::-1]))
            return Ref(name), self.values[name].shape
        shape = (self.rows, *(self.size() for _ in range(rank - 1)))
        return self.input(Type("f64", shape), "batch"), shape


def _linear(w: _Writer) -> None:
    x, (m, k) = w.some(2)
    n = w.size()
    w.emit("aten.mm", (x, w.value(Type("f64", (k, n)), "param")), (m, n))


def _head(w: _Writer) -> None:
    """x @ transpose(w), as torch writes a linear layer."""
    x, (m, k) = w.some(2)
    n = w.size()
    turned = w.emit("permute", (w.input(Type("f64", (n, k)), "param"),), (k, n), dims=(1, 0))
    w.emit("aten.addmm", (w.input(Type("f64", (n,)), "param"), x, turned), (m, n))


def _pointwise(w: _Writer) -> None:
    x, shape = w.some(w.draw(st.sampled_from((2, 2, 3))))
    w.emit(w.draw(st.sampled_from(("aten.relu", "aten.gelu", "aten.tanh", "aten.sigmoid", "aten.neg", "aten.exp"))), (x,), shape)


def _residual(w: _Writer) -> None:
    x, shape = w.some(w.draw(st.sampled_from((2, 2, 3))))
    y = w.value(Type("f64", shape))
    w.emit(w.draw(st.sampled_from(("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor"))), (x, y), shape)


def _norm(w: _Writer) -> None:
    x, shape = w.some(w.draw(st.sampled_from((2, 3))))
    d = shape[-1]
    name = f"v{len(w.ops)}"
    stats = Type("f64", (*shape[:-1], 1))
    args = (x, (d,), w.input(Type("f64", (d,)), "param"), w.input(Type("f64", (d,)), "param"), 1e-5)
    w.ops.append(Op((name, f"{name}.mean", f"{name}.rstd"), "aten.native_layer_norm", args, (Type("f64", shape), stats, stats), (), "forward", f"layer{len(w.ops)}"))
    w.values[name] = Type("f64", shape)


def _softmax(w: _Writer) -> None:
    x, shape = w.some(w.draw(st.sampled_from((2, 3))))
    w.emit(w.draw(st.sampled_from(("aten._softmax", "aten._log_softmax"))), (x, w.draw(st.sampled_from((-1, len(shape) - 2))), False), shape)


def _reduce(w: _Writer) -> None:
    x, shape = w.some(3)
    d = w.draw(st.integers(1, 2))
    kind = w.draw(st.sampled_from(("sum", "amax", "mean")))
    left = tuple(n for k, n in enumerate(shape) if k != d)
    if kind == "mean":
        w.emit("aten.mean.dim", (x, (d,)), left)
    else:
        w.emit(kind, (x,), left, dims=(d,), keepdim=False)


def _heads(w: _Writer) -> None:
    x, (m, n) = w.some(2)
    few = w.draw(st.sampled_from([k for k in (2, 3, 4) if n % k == 0] or [1]))
    w.emit("reshape", (x,), (m, few, n // few))


def _flat(w: _Writer) -> None:
    x, (a, b, c) = w.some(3)
    w.emit("reshape", (x,), (a, b * c))


def _turn(w: _Writer) -> None:
    x, (a, b, c) = w.some(3)
    w.emit("permute", (x,), (a, c, b), dims=(0, 2, 1))


def _lookup(w: _Writer) -> None:
    n, d = w.size(), w.size()
    ids = w.input(Type("i64", (w.rows,)), "batch", n)
    w.emit("embedding", (w.input(Type("f64", (n, d)), "param"), ids), (w.rows, d))


def _parts(w: _Writer) -> None:
    x, (m, n) = w.some(2)
    if n % 2 == 0:
        a, b = (w.emit("slice", (x,), (m, n // 2), dim=1, start=k * n // 2, step=1) for k in (0, 1))
        w.emit("cat", ((b, a),), (m, n), dim=1)


def _dropout(w: _Writer) -> None:
    x, shape = w.some(2)
    rng = next((i.name for i in w.inputs if i.role == "rng"), None)
    if rng is None:
        w.inputs.append(Input("rng", Type("i64", (2,)), "rng", "rng"))
        rng = "rng"
    mask = w.emit("bernoulli", (Ref(rng),), shape, p=0.75, site=f"site{len(w.ops)}")
    w.emit("aten.mul.Tensor", (x, w.emit("aten.div.Scalar", (mask, 0.75), shape)), shape)


LAYERS = (_linear, _head, _pointwise, _residual, _norm, _softmax, _reduce, _heads, _flat, _turn, _lookup, _parts, _dropout)


def _from_table(w: _Writer) -> None:
    """One example of the table of rules; its operands are values that there are, or new inputs."""
    text = w.draw(st.sampled_from([t for t in EXAMPLES if not t.startswith(("optim.", "bernoulli", "uniform", "normal"))]))
    op, operands = example(text)
    kinds = [Type("f64" if t.dtype in FLOATS else t.dtype, t.shape) for t in operands]
    left = iter(range(len(kinds)))

    def given(_: Ref) -> Ref:
        k = next(left)
        t = kinds[k]
        if t.dtype == "f64":
            return w.value(t)
        return w.input(t, "batch" if t.shape[:1] == (w.rows,) else "buffer", pointed_into(op, kinds, k) or 2)

    results = tuple(f"v{len(w.ops)}.{k}" for k in range(len(op.types)))
    made = tuple(Type("f64" if t.dtype in FLOATS else t.dtype, t.shape) for t in op.types)
    wide = replace(
        op, args=tuple("f64" if isinstance(a, str) and a in FLOATS else a for a in op.args),
        kwargs=tuple((k, "f64" if isinstance(v, str) and v in FLOATS else v) for k, v in op.kwargs),
    )  # fmt: skip
    w.ops.append(replace(wide.map_refs(given), results=results, types=made, phase="forward", path=f"layer{len(w.ops)}"))
    w.values.update((r, t) for r, t in zip(results, made, strict=True) if t.dtype == "f64")


@st.composite
def captured(draw: st.DrawFn, max_layers: int = 6, *, table: bool = True, training: bool | None = None, uneven: bool = False) -> Program:
    """A small program as capture would give it, in float64, that runs and that every pass takes: layers, and (``table``) examples of
    the table of rules, over a batch and parameters. ``training`` (None: either): with loss, gradients that have the form of such,
    their norm and a momentum update; else with an output. ``uneven``: sizes that nothing divides."""
    w = _Writer(draw, uneven)
    choices = st.sampled_from((*LAYERS, *((_from_table,) * 6 if table and not uneven else ())))
    for _ in range(draw(st.integers(1, max_layers))):
        draw(choices)(w)
    if not any(i.role == "batch" for i in w.inputs):
        _linear(w)
    read = {r.name for op in w.ops for r in op.refs}
    last = [(r, t) for op in w.ops for r, t in zip(op.results, op.types, strict=True) if r not in read]
    outputs: list[Output] = []
    if draw(st.booleans()) if training is None else training:
        parts = [w.emit("sum_of_squares", (Ref(r),), ()) for r, t in last if t.dtype == "f64"]
        loss = parts[0] if parts else w.emit("full", (), (), value=0.0)
        for other in parts[1:]:
            loss = w.emit("aten.add.Tensor", (loss, other), ())
        outputs.append(Output(loss, "loss", "loss"))
        outputs += _update(w)
    else:
        outputs = [Output(Ref(r), "output", str(n)) for n, (r, _) in enumerate(last)]
    return Program("drawn", Mesh(), tuple(w.inputs), tuple(w.ops), tuple(outputs), frozenset({"captured"}))


def _update(w: _Writer) -> list[Output]:
    """For each parameter of a product its gradient's form, ``transpose(x) @ y``; for others the parameter times a scalar; then the
    norm of all, clipping, and momentum."""
    products = {op.refs[1].name: op for op in w.ops if op.target == "aten.mm"}
    grads: dict[str, Ref] = {}
    for i in [i for i in w.inputs if i.role == "param"]:
        op = products.get(i.name)
        if op is not None:
            x, (m, k) = op.refs[0], next(t.shape for t in _types(w, op.refs[0].name))
            turned = w.emit("permute", (x,), (k, m), "backward", dims=(1, 0))
            grads[i.name] = w.emit("aten.mm", (turned, Ref(op.name)), i.type.shape, "backward")
        else:
            grads[i.name] = w.emit("aten.mul.Tensor", (Ref(i.name), 0.5), i.type.shape, "backward")
    outputs = [Output(g, "grad", name) for name, g in grads.items()]
    squares = [w.emit("sum_of_squares", (g,), (), "update") for g in grads.values()]
    if not squares:
        return outputs
    total = squares[0]
    for each in squares[1:]:
        total = w.emit("aten.add.Tensor", (total, each), (), "update")
    norm = w.emit("aten.sqrt", (total,), (), "update")
    outputs.append(Output(norm, "norm", "grad_norm"))
    factor = w.emit("aten.clamp", (w.emit("aten.reciprocal", (w.emit("aten.add.Tensor", (norm, 1e-6), (), "update"),), (), "update"), None, 1.0), (), "update")
    for name, g in grads.items():
        t = next(i.type for i in w.inputs if i.name == name)
        clipped = w.emit("aten.mul.Tensor", (g, factor), t.shape, "update")
        old = w.input(t, "state")
        moment = w.emit("aten.add.Tensor", (w.emit("aten.mul.Tensor", (old, 0.9), t.shape, "update"), clipped), t.shape, "update")
        new = w.emit("aten.sub.Tensor", (Ref(name), w.emit("aten.mul.Tensor", (moment, 0.01), t.shape, "update")), t.shape, "update")
        outputs += [Output(new, "param", name), Output(moment, "state", old.name)]
    return outputs


def _types(w: _Writer, name: str) -> list[Type]:
    return [i.type for i in w.inputs if i.name == name] + [t for op in w.ops for r, t in zip(op.results, op.types, strict=True) if r == name]


def pointed_into(op: Op, kinds: Sequence[Type], k: int) -> int | None:
    """The size of the dimension that integer operand ``k`` of ``op`` indexes."""
    return _indexed(Instance(replace(op, types=tuple(op.types)), tuple(kinds), Mesh()), k)


def batches(p: Program, seed: int = 0) -> dict[str, Tensor]:
    """Whole inputs by value name: numbers of (0.1, 0.9), so that roots and logarithms exist; indices inside what they index."""
    generator = torch.Generator().manual_seed(seed)
    bounds: dict[str, int] = {}
    for op in p.ops:
        kinds = [p.types[r.name] for r in op.refs]
        for k, r in enumerate(op.refs):
            size = pointed_into(op, kinds, k)
            if size is not None:
                bounds[r.name] = min(size, bounds.get(r.name, size))
    out: dict[str, Tensor] = {}
    for i in p.inputs:
        if i.role == "rng":
            out[i.name] = torch.tensor([3, seed])
        elif i.type.dtype == "bool":
            out[i.name] = torch.rand(i.type.shape, generator=generator) < 0.7
        elif i.type.dtype in FLOATS:
            out[i.name] = torch.rand(i.type.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        else:
            out[i.name] = torch.randint(0, bounds.get(i.name, 2), i.type.shape, generator=generator).to(torch_dtype(i.type.dtype))
    return out


# what failed --------------------------------------------------------------------------------------------------------


def command(p: Program, passes: Sequence[str], mesh: Mesh, zero: int) -> str:
    """The command line that runs ``passes`` on the program: paste it into a shell."""
    words = ["python -m deepseed opt - --passes", ",".join(passes)]
    plan = [f"{a}{n}" for a, n in mesh.axes] + ([f"zero{zero}"] if zero else [])
    words += ["--plan", "+".join(plan)] if plan else []
    return f"{' '.join(words)} << 'END'\n{p}END\n"


@contextmanager
def printed(p: Program, passes: Sequence[str], mesh: Mesh, zero: int) -> Iterator[None]:
    """Whatever fails inside is said with the program's text and the command that runs it."""
    try:
        yield
    except (UnsatisfiedAssumption, PassError):
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n\n{command(p, passes, mesh, zero)}") from error
