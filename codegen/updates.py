"""What an optimizer's update does to one tensor, as a program: back ends write one kernel over all tensors of it (deepseed.codegen.cpp_updates, triton_updates).

    %w = aten.mul.Tensor(%param, %decay) ..  %m = aten.lerp.Scalar(%exp_avg, %g, 0.1) ..  return %w, %m, %v

An ``optim.pointwise`` has its own ops. The formulas of the others are torch.optim's: Adam (Kingma and Ba 2015, algorithm 1; AMSGrad: Reddi et al. 2018), AdamW (Loshchilov and Hutter 2019,
algorithm 2), SGD with momentum (Sutskever et al. 2013, with torch's dampening). A gradient may have fewer bits than its parameter: it is widened where it is read. Numbers are made in float64 once a tensor, elements in float32, of float64 tensors in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from deepseed.codegen.kernels import WORDS
from deepseed.codegen.pointwise import computed
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Arg, Input, Op, Output, Program, Ref, Type
from deepseed.ir.updates import POINTWISE, SIZE, operands_of, program_of

OPTIONS = ("betas", "eps", "weight_decay", "amsgrad", "momentum", "dampening", "nesterov", "maximize")


@dataclass(frozen=True)
class Formula:
    """``program`` reads ``each``, of which every tensor has its own (parameter, gradient, states), and ``shared`` (learning rate, ``skip``, ``scale``); its outputs are the new values of ``updated``."""

    name: str
    program: Program
    each: tuple[str, ...]
    shared: tuple[str, ...]
    updated: tuple[str, ...]
    kind: str
    options: tuple[tuple[str, Arg], ...]


def formula(p: Program, ops: Sequence[Op]) -> Formula:
    """Of updates of ``p`` that are one call (deepseed.codegen.optim.run_from)."""
    first, names = ops[0], operands_of(ops[0])
    dtypes = [p.types[r.name].dtype for r in first.refs]
    if first.target == POINTWISE:
        numbers = first.kw("numbers")
        assert isinstance(numbers, tuple)
        shared = tuple([name for n, name in enumerate(names) if name in numbers and all(op.args[n] == first.args[n] for op in ops)])
        return _pointwise(first.kwargs, tuple(dtypes), shared)
    more = [k for k, v in first.kwargs if k in ("skip", "scale") and isinstance(v, Ref)]
    return _formula(first.target.removeprefix("optim."), names[:-1], ("lr", *more), tuple(dtypes), tuple([(k, v) for k, v in first.kwargs if k in OPTIONS]))


def name_of(formulas: Sequence[Formula]) -> str:
    """Of the kernel that computes several."""
    return formulas[0].name if len(formulas) == 1 else _name("", " ".join(f.name for f in formulas))


def _name(words: str, text: str) -> str:
    return f"update_{words}{'_' if words else ''}{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@cache
def _pointwise(kwargs: tuple[tuple[str, Arg], ...], dtypes: tuple[str, ...], shared: tuple[str, ...]) -> Formula:
    p = program_of(dict(kwargs), dtypes)
    each = tuple([i.name for i in p.inputs if i.name not in shared])
    words = [op.target.removeprefix("aten.").partition(".")[0] for op in p.ops if op.type.shape and op.target != "cast"]
    return Formula(_name("_".join(list(dict.fromkeys(words))[:WORDS]), f"{p}{shared}"), p, each, shared, tuple([o.key for o in p.outputs]), "pointwise", kwargs)


@cache
def _formula(kind: str, each: tuple[str, ...], shared: tuple[str, ...], dtypes: tuple[str, ...], options: tuple[tuple[str, Arg], ...]) -> Formula:
    types = {name: Type(dtype, (SIZE,) if name in each and name != "step" else ()) for name, dtype in zip((*each, *shared), dtypes, strict=True)}
    made = _Written(dict(types), dict(options))
    new = made.sgd() if kind == "sgd" else made.adam(decoupled=kind == "adamw")
    updated = tuple(name for name in each if name in new)
    outputs = [made.stored(name, new[name]) for name in updated]
    p = Program("update", Mesh(()), tuple([Input(name, t, "batch", name) for name, t in types.items()]), tuple(made.ops), tuple([Output(o, "output", name) for o, name in zip(outputs, updated, strict=True)]))
    return Formula(_name(kind, str(p)), p, each, shared, updated, kind, options)


@dataclass
class _Written:
    types: dict[str, Type]
    options: dict[str, Arg]
    ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wide = computed(self.types["param"].dtype)

    # formulas ---------------------------------------------------------------------------------------------------------

    def adam(self, decoupled: bool) -> dict[str, Ref]:
        betas, decay, eps = self.options["betas"], self.number("weight_decay"), self.number("eps")
        assert isinstance(betas, tuple)
        first, second = (float(str(b)) for b in betas)
        w, g, m, v = self.read("param"), self.gradient(), self.read("exp_avg"), self.read("exp_avg_sq")
        count, rate = self.cast(Ref("step"), "f64"), self.cast(Ref("lr"), "f64")
        step = self.narrow(self.op("neg", self.op("div.Tensor", rate, self.op("rsub.Scalar", self.op("pow.Scalar", first, count), 1))))
        root = self.narrow(self.op("sqrt", self.op("rsub.Scalar", self.op("pow.Scalar", second, count), 1)))
        if decay and decoupled:
            w = self.op("mul.Tensor", w, self.narrow(self.op("rsub.Scalar", self.op("mul.Tensor", rate, decay), 1)))
        elif decay:
            g = self.op("add.Tensor", g, w, alpha=decay)
        m = self.op("lerp.Scalar", m, g, 1 - first)
        v = self.op("addcmul", self.op("mul.Tensor", v, second), g, g, value=1 - second)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if self.options.get("amsgrad"):
            new["max_exp_avg_sq"] = v = self.op("maximum", self.read("max_exp_avg_sq"), v)
        below = self.op("add.Tensor", self.op("div.Tensor", self.op("sqrt", v), root), eps)
        return {"param": self.op("add.Tensor", w, self.op("div.Tensor", self.op("mul.Tensor", m, step), below)), **new}

    def sgd(self) -> dict[str, Ref]:
        decay, momentum = self.number("weight_decay"), self.number("momentum")
        w, g, new = self.read("param"), self.gradient(), dict[str, Ref]()
        if decay:
            g = self.op("add.Tensor", g, w, alpha=decay)
        if "momentum_buffer" in self.types:
            buffer = self.op("add.Tensor", self.op("mul.Tensor", self.read("momentum_buffer"), momentum), g, alpha=1 - self.number("dampening"))
            g = self.op("add.Tensor", g, buffer, alpha=momentum) if self.options.get("nesterov") else buffer
            new["momentum_buffer"] = buffer
        return {"param": self.op("sub.Tensor", w, self.op("mul.Tensor", g, self.narrow(self.cast(Ref("lr"), "f64")))), **new}

    # parts ------------------------------------------------------------------------------------------------------------

    def gradient(self) -> Ref:
        g = self.read("grad")
        if "scale" in self.types:
            g = self.op("mul.Tensor", g, self.narrow(Ref("scale")))
        return self.op("neg", g) if self.options.get("maximize") else g

    def read(self, name: str) -> Ref:
        return self.cast(Ref(name), self.wide)

    def narrow(self, x: Ref) -> Ref:
        """A number as elements are computed."""
        return self.cast(x, self.wide)

    def stored(self, name: str, x: Ref) -> Ref:
        x = self.cast(x, self.types[name].dtype)
        return self.op("where.self", Ref("skip"), Ref(name), x) if "skip" in self.types else x

    def number(self, key: str) -> float:
        value = self.options.get(key, 0.0)
        assert isinstance(value, int | float)
        return float(value)

    def cast(self, x: Ref, dtype: str) -> Ref:
        t = self.types[x.name]
        return x if t.dtype == dtype else self.emit("cast", (x,), Type(dtype, t.shape))

    def op(self, target: str, *args: Arg, **kwargs: Arg) -> Ref:
        read: Sequence[Type] = [self.types[a.name] for a in args if isinstance(a, Ref)]
        return self.emit(f"aten.{target}", args, Type(read[-1].dtype, max([t.shape for t in read], key=len)), kwargs)

    def emit(self, target: str, args: tuple[Arg, ...], t: Type, kwargs: dict[str, Arg] | None = None) -> Ref:
        name = f"v{len(self.ops)}"
        self.types[name] = t
        self.ops.append(Op((name,), target, args, (t,), tuple((kwargs or {}).items())))
        return Ref(name)
