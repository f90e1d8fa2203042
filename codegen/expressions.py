"""One op as one Python expression on local tensors, calling torch's C bindings."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from deepseed.codegen.donation import Donation
from deepseed.ir.collective import COLLECTIVES, KEYED, MEMORIES, step
from deepseed.ir.kernels import CONTIGUOUS, MASKED
from deepseed.ir.mesh import TIME
from deepseed.ir.program import Arg, Op, Program, Ref, Type

DTYPES = {
    "f64": "torch.float64", "f32": "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16", "i64": "torch.int64",
    "i32": "torch.int32", "i16": "torch.int16", "i8": "torch.int8", "u8": "torch.uint8", "bool": "torch.bool",
    "c64": "torch.complex64", "c128": "torch.complex128",
}  # fmt: skip

# aten ops whose C binding ``torch.<name>`` takes the overload's arguments in the overload's order
_BINDINGS = frozenset(["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "neg", "rsqrt", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid", "relu", "erf", "abs", "sign", "floor", "ceil", "round", "reciprocal", "square", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "where.self", "maximum", "minimum", "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor", "eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar", "logical_and", "logical_or", "logical_not", "bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor", "bitwise_not", "masked_fill.Scalar", "masked_fill.Tensor", "addcmul", "addcdiv", "lerp.Scalar", "lerp.Tensor", "convolution", "clone", "native_layer_norm", "cumsum", "topk", "index_select", "_softmax", "_log_softmax"])
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})  # the runtime has a way of its own for some dtypes
_NN_BINDINGS = frozenset({"silu", "gelu"})  # in torch._C._nn
_RESERVED = {"rt", "inputs", "torch", "ops", "device", "step", "chain", "given", "made", "_"}
UNSHOWN = ("send", "accumulate", "collect")  # what leaves no tensor of its own name
_IN_PARTS = {"v", "m", "mb", "part", "LANE"}  # of a scheduled program


class CodegenError(ValueError):
    """An op for which no source can be written: names the op and its place."""


@dataclass
class Source:
    """The source under construction: identifiers and lines."""

    p: Program
    lines: list[str] = field(default_factory=list)
    looked: bool = False  # whether each value is shown to the runtime
    names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def donation(self) -> Donation:
        return Donation(self.p)

    def __post_init__(self) -> None:
        self._taken = _RESERVED | (_IN_PARTS if self.p.schedule is not None else set())

    def name(self, value: str) -> str:
        """The identifier of a value: ``layers.0.mlp.mm`` -> ``layers_0_mlp_mm``."""
        if value not in self.names:
            word = re.sub(r"\W", "_", value)
            if not word.isidentifier() or keyword.iskeyword(word):
                word = f"_{word}"
            new, n = word, 0
            while new in self._taken:
                n += 1
                new = f"{word}_{n}"
            self._taken.add(new)
            self.names[value] = new
        return self.names[value]

    def arg(self, a: Arg) -> str:
        """An argument as a literal; names of dtypes become torch's."""
        if isinstance(a, Ref):
            return self.name(a.name)
        if isinstance(a, tuple):
            return "[" + ", ".join(map(self.arg, a)) + "]"
        if isinstance(a, str) and a in DTYPES:
            return DTYPES[a]
        if isinstance(a, float) and (a != a or a in (float("inf"), float("-inf"))):
            return f'float("{a}")'
        return repr(a)

    def args(self, op: Op) -> str:
        rows = {op.refs[n] for n in CONTIGUOUS.get(op.target, ()) if n < len(op.refs)}
        given = [f"{self.arg(a)}.contiguous()" if isinstance(a, Ref) and a in rows else self.arg(a) for a in op.args]
        return ", ".join(given + [f"{k}={self.arg(v)}" for k, v in op.kwargs])

    def given(self, op: Op, keyword: str) -> str | None:
        """A keyword's literal, or this microbatch's of those listed for each; None where the op has no such keyword."""
        each = op.kw(f"{keyword}.{TIME}")
        if each is not None:
            return f"{self.arg(each)}[{TIME}]"
        value = op.kw(keyword)
        return None if value is None else self.arg(value)

    def shape(self, t: Type) -> str:
        return listed(t.local(self.p.mesh))

    def look(self, values: Iterable[str], mb: str = "") -> None:
        """Show values to ``rt.look``, where that is asked for; of what is under way its handle."""
        for value in values if self.looked else ():
            made = self.p.producers.get(value)
            if made is None or made.target not in UNSHOWN:
                self.emit(f"rt.look({value!r}, {self.name(value)}{mb})")

    def emit(self, line: str, comment: str = "") -> None:
        self.lines.append(f"    {line}" + (f"  # {comment}" if comment else ""))


# expressions --------------------------------------------------------------------------------------------------------


def expression(out: Source, op: Op) -> str:
    local = [t.local(out.p.mesh) for t in op.types]
    if all(0 in shape for shape in local) and not op.target.endswith(".start") and op.target not in ("wait", "shard", "summand", "share", "transfer"):
        empty = [f"torch.empty({listed(shape)}, dtype={DTYPES[t.dtype]}, device={_device(op)})" for shape, t in zip(local, op.types, strict=True)]
        return ", ".join(empty)  # kernels differ in whether they accept a shard without elements
    if op.target in OWN:
        return OWN[op.target](out, op)
    if op.target.startswith("sized."):
        return f"ops.sized({op.target.partition('.')[2]!r}, [{_x(out, op)}], {out.arg(op.kw('given'))}, {out.shape(op.type)})"
    if op.target in MEMORIES:
        return f"rt.{op.target.replace('.', '_')}({_x(out, op)})"
    if op.target.endswith(".start") or op.target in ("shard", "summand"):
        return _communication(out, op)
    namespace, _, rest = op.target.partition(".")
    name, _, overload = rest.partition(".")
    if not rest:
        raise CodegenError(f"%{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + ": no such op in docs/ir.md")
    if namespace == "aten" and (rest in _BINDINGS or rest in _PRODUCTS):
        own = rest in _PRODUCTS and op.type.dtype in ("bf16", "f16")
        return f"{'ops' if own else 'torch'}.{name}({out.args(op)})"
    if namespace == "aten" and rest in _NN_BINDINGS:
        return f"torch._C._nn.{name}({out.args(op)})"
    called = f"torch.ops.{namespace}.{name}.{overload or 'default'}({out.args(op)})"
    if any(isinstance(a, tuple) and any(b is False for b in a) for a in op.args):  # an output mask: what is not asked for is left out
        called = f"ops.present({called}, {out.arg(op.args[MASKED[op.target]])})" if op.target in MASKED else f"ops.present({called})"
    return called


def assignment(out: Source, op: Op) -> str:
    """``results = expression``; what is made on the host of no operands says so."""
    line = f"{', '.join(map(out.name, op.results))} = {expression(out, op)}"
    return f"with rt.on_host: {line}" if op.type.host and not op.refs else line


def _device(op: Op) -> str:
    return "rt.host" if op.type.host else "device"


def _communication(out: Source, op: Op) -> str:
    axis = str(op.kw("axis"))
    keyed = op.target.removesuffix(".start") in KEYED
    done = [step(out.p.types[r.name].shape, out.p.types[r.name].layout, t.layout, axis, out.p.mesh, keyed) for r, t in zip(op.refs, op.types, strict=not keyed)]
    kind, xs = done[0].kind, [out.name(r.name) for r in op.refs]
    if keyed and (place := done[0].take or done[0].put) is not None:
        return f"rt.{kind}_start({xs[0]}, {xs[1]}, {axis!r}, {place.numbers}, {done[0].of})"
    if len(xs) > 1:
        found = {"take": [s.take for s in done if s.take is not None], "put": [s.put for s in done if s.put is not None]}
        where = "".join(f", {name}=[{', '.join(str(p.numbers) for p in places)}]" for name, places in found.items() if places)
        reduced = f", reduce={done[0].reduce!r}" if kind in ("all_reduce", "reduce_scatter") else ""
        return f"rt.bucket_start({kind!r}, [{', '.join(xs)}], {axis!r}{where}{reduced})"
    places = "".join(f", {place.numbers}" for place in (done[0].take, done[0].put) if place is not None)
    if axis == TIME:
        return f"{xs[0]} if {TIME} == 0 else torch.zeros_like({xs[0]})" if kind == "summand" else f"rt.microbatch({xs[0]}, {TIME}, {out.p.mesh.size(TIME)}{places})"
    reduce = f", {done[0].reduce!r}" if kind in ("all_reduce", "reduce_scatter") else ""
    return f"rt.{f'{kind}_start' if kind in COLLECTIVES else kind}({xs[0]}, {axis!r}{places}{reduce})"


Expression = Callable[[Source, Op], str]


def _x(out: Source, op: Op, i: int = 0) -> str:
    return out.name(op.refs[i].name)


def _dtype(op: Op) -> str:
    return DTYPES[op.type.dtype]


def listed(items: tuple[int, ...] | list[str]) -> str:
    return "(" + ", ".join(map(str, items)) + (",)" if len(items) == 1 else ")")


def _reshape(out: Source, op: Op) -> str:
    return f"{_x(out, op)}.reshape({out.shape(op.type)})"


def _permute(out: Source, op: Op) -> str:
    dims = _ints(op, "dims")
    return f"{_x(out, op)}.t()" if dims == (1, 0) else f"{_x(out, op)}.permute({listed(dims)})"


def _expand(out: Source, op: Op) -> str:
    return f"{_x(out, op)}.expand({out.shape(op.type)})"


def _cast(out: Source, op: Op) -> str:
    return f"{_x(out, op)}.to({_dtype(op)})"


def _full(out: Source, op: Op) -> str:
    return f"torch.full({out.shape(op.type)}, {out.arg(op.kw('value'))}, dtype={_dtype(op)}, device={_device(op)})"


def _iota(out: Source, op: Op) -> str:
    (n,) = op.type.local(out.p.mesh)
    index = "" if (given := out.given(op, "index")) is None else f", {given}"
    return f"ops.iota({n}, {out.arg(op.kw('start', 0))}, {out.arg(op.kw('step', 1))}, {_dtype(op)}{index}, device={_device(op)})"


def _slice(out: Source, op: Op) -> str:
    (dim,), (start,), (by,) = _ints(op, "dim"), _ints(op, "start", 0), _ints(op, "step", 1)
    n = op.type.local(out.p.mesh)[dim]
    stop = start + (n - 1) * by + 1 if n else start
    return f"{_x(out, op)}[{':, ' * dim}{start}:{stop}{f':{by}' if by != 1 else ''}]"


def _unslice(out: Source, op: Op) -> str:
    (dim,), (start,), (by,) = _ints(op, "dim"), _ints(op, "start", 0), _ints(op, "step", 1)
    return f"ops.unslice({_x(out, op)}, {out.shape(op.type)}, {dim}, {start}, {by})"


def _sum(out: Source, op: Op) -> str:
    dims = _ints(op, "dims")
    same = out.p.types[op.refs[0].name].dtype == op.type.dtype and (op.type.dtype[0] in "fc" or op.type.dtype == "i64")  # torch adds other integers up in 64 bits, unless it is told
    if not dims:
        return f"{_x(out, op)}.to({_dtype(op)})"
    return f"torch.sum({_x(out, op)}, {listed(dims)}, {bool(op.kw('keepdim', False))}{'' if same else f', dtype={_dtype(op)}'})"


def _amax(out: Source, op: Op) -> str:
    dims = _ints(op, "dims")
    local = out.p.types[op.refs[0].name].local(out.p.mesh)
    call = "ops.amax" if any(local[d] == 0 for d in dims) else "torch.amax"  # an uneven split leaves some ranks without elements
    return f"{call}({_x(out, op)}, {listed(dims)}, {bool(op.kw('keepdim', False))})" if dims else _x(out, op)


def _called(function: str, *keywords: str) -> Expression:
    """``ops.function(operands, keywords that are there)``."""

    def write(out: Source, op: Op) -> str:
        given = [f"{k}={value}" for k in keywords if (value := out.given(op, k)) is not None]
        return f"{function}({', '.join([out.arg(a) for a in op.args] + given)})"

    return write


def _embedding(out: Source, op: Op) -> str:
    return _called("torch.embedding" if out.given(op, "start") is None else "ops.embedding", "start")(out, op)


def _embedding_backward(out: Source, op: Op) -> str:
    start = "" if (given := out.given(op, "start")) is None else f", {given}"
    return f"ops.embedding_backward({_x(out, op)}, {_x(out, op, 1)}, {op.type.local(out.p.mesh)[0]}{start})"


def _routed_outer(out: Source, op: Op) -> str:
    start = "" if (given := out.given(op, "start")) is None else f", {given}"
    return f"ops.routed_outer({', '.join(map(out.arg, op.args))}, {op.type.local(out.p.mesh)[0]}{start})"


def _attention(out: Source, op: Op, operands: int) -> str:
    args = [out.arg(a) for a in op.args]
    if len(args) == operands - 1:
        args.insert(operands - 1 if operands == 4 else 4, "None")
    return f"ops.{op.target}({', '.join(args)}, {bool(op.kw('causal', False))}, {out.arg(op.kw('scale'))})"


def _random(*keywords: str) -> Expression:
    def write(out: Source, op: Op) -> str:
        given = ", ".join(out.arg(op.kw(k)) for k in keywords)
        index = "" if (here := out.given(op, "index")) is None else f", {here}"
        return f"ops.{op.target}({_x(out, op)}, {out.shape(op.type)}, {given}, {_dtype(op)}{index})"

    return write


def _ints(op: Op, name: str, default: int | None = None) -> tuple[int, ...]:
    value = op.kw(name, default)
    items = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(i, int) for i in items):
        raise CodegenError(f"%{op.name} = {op.target}: {name} is {value!r}, integers are needed")
    return tuple(int(i) for i in items)  # type: ignore[arg-type]


def _paged(out: Source, op: Op) -> str:
    """The runtime has the caches, and which tokens are whose."""
    sinks = _x(out, op, 3) if len(op.refs) > 3 else "None"
    said = ", ".join(f"{k}={out.arg(op.kw(k))}" for k in ("layer", "scale", "window", "softcap"))
    return f"rt.paged_attention({_x(out, op)}, {_x(out, op, 1)}, {_x(out, op, 2)}, {sinks}, {said})"


OWN: dict[str, Expression] = {
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "cast": _cast,
    "share": lambda out, op: f"rt.share({_x(out, op)}, {op.kw('axis')!r})",
    "full": _full,
    "iota": _iota,
    "slice": _slice,
    "unslice": _unslice,
    "pad": _called("ops.pad", "pads", "value"),
    "cat": lambda out, op: f"torch.cat({out.arg(op.args[0] if isinstance(op.args[0], tuple) else op.args)}, {op.kw('dim', 0)})",
    "sum": _sum,
    "add_into": lambda out, op: f"{_x(out, op)}.add_({_x(out, op, 1)})" if out.donation.taken(op) else f"torch.add({_x(out, op)}, {_x(out, op, 1)})",
    "sum_of_squares": lambda out, op: f"ops.sum_of_squares({_x(out, op)}, {_dtype(op)})",
    "amax": _amax,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "gather": _called("ops.gather", "dim", "start"),
    "scatter_add": _called("ops.scatter_add", "dim", "start"),
    "routed_mm": _called("ops.routed_mm", "start"),
    "routed_outer": _routed_outer,
    "sdpa": lambda out, op: _attention(out, op, 4),
    "sdpa_backward": lambda out, op: _attention(out, op, 7),
    "paged_attention": _paged,
    "bernoulli": _random("p", "site"),
    "uniform": _random("low", "high", "site"),
    "normal": _random("mean", "std", "site"),
    "transfer": _x,
    "wait": lambda out, op: f"rt.wait({_x(out, op)})",
}
ADDED: dict[str, Callable[[Source, Op, str, str], str | None]] = {  # ops whose result can be added to a total as it is made, by a kernel of their own where one is named; None: not this one
    "aten.mm": lambda out, op, total, kernel: None if kernel and op.args[0] == op.args[1] else f"rt.accumulate_mm({total}, {_x(out, op)}, {_x(out, op, 1)}{', ' * bool(kernel)}{kernel})",
    "embedding_backward": lambda out, op, total, kernel: None if kernel or out.given(op, "start") is not None else f"rt.accumulate_rows({total}, {_x(out, op)}, {_x(out, op, 1)}, {op.type.local(out.p.mesh)[0]})",
}
