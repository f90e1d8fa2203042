"""One pointwise op as one Triton expression on registers.

16-bit floats are computed in float32; the rounding of a value to 16 bits happens where it is stored, where the model casts it, and where it is compared. The formulas are those of PyTorch's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.pointwise import Write as Write
from deepseed.codegen.pointwise import added, compared, lerp, number, rsub
from deepseed.codegen.pointwise import computed as computed
from deepseed.ir.kernels import COMPARE
from deepseed.ir.program import FLOATS, Op, Program, Ref

TYPES = {
    "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16", "i64": "tl.int64", "i32": "tl.int32", "i16": "tl.int16",
    "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1",
}  # fmt: skip

LIBRARY = {
    "tanh": '''@triton.jit
def tanh(x):
    y = tl.abs(x)
    e = tl.exp(-2.0 * y)
    z = x * x
    near = x * (1.0 + z * (-0.3333333333333333 + z * (0.13333333333333333 + z * (-0.05396825396825397 + z * 0.021869488536155203))))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.0625, near, tl.where(x < 0, -far, far))''',
    "sigmoid": '''@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))''',
    "as_bf16": '''@triton.jit
def as_bf16(x):  # to the nearest, ties to even, as a float32: in the interpreter too
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x != x, x, ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True))''',
    "as_f16": '''@triton.jit
def as_f16(x):
    return x.to(tl.float16).to(tl.float32)''',
    "amax": '''@triton.jit
def amax(x, axis: tl.constexpr):
    nan = tl.max((x != x).to(tl.int32), axis, keep_dims=True)
    return tl.where(nan > 0, float("nan"), tl.max(x, axis, keep_dims=True))''',
    "product": '''INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter multiplies the bits of bfloat16


@triton.jit
def product(a, b, c):
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee", out_dtype=c.dtype)''',
    "mix": '''@triton.jit
def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)''',
    "lane": '''@triton.jit
def lane(seed, step, site: tl.constexpr, element):
    key = mix(mix(seed * 0x9E3779B97F4A7C15 + site) + step * 0x9E3779B97F4A7C15)
    word = mix(((element >> 1) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key)
    return (word >> ((element & 1) * 32).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)''',
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A value in the kernel: its name, the dtype it is computed in, the axes of the block that it varies along, and how deep in loops it is made."""

    name: str
    dtype: str
    axes: frozenset[str] = frozenset()
    level: int = 0


def literal(value: object, dtype: str) -> str:
    if isinstance(value, bool) or dtype == "bool":
        return str(bool(value))
    if not isinstance(value, int | float):
        raise CodegenError(f"{value!r} is no number")
    if dtype in FLOATS:
        value = float(value)
        text = repr(value) if math.isfinite(value) else f'float("{value}")'
        return f"tl.full([], {text}, tl.float64)" if dtype == "f64" else text
    return repr(int(value))


def converted(r: Register, dtype: str) -> str:
    if r.dtype == dtype:
        return r.name
    if dtype == "bool":
        return f"({r.name} != 0)"
    return f"{r.name}.to({TYPES[dtype]})"


_TEMPLATES = {
    "mul.Tensor": "{0} * {1}", "mul.Scalar": "{0} * {1}", "div.Tensor": "{0} / {1}", "div.Scalar": "{0} / {1}", "neg": "-{0}", "exp": "tl.exp({0})",
    "log": "tl.log({0})", "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "abs": "tl.abs({0})",
    "erf": "tl.erf({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})", "reciprocal": "1.0 / {0}", "square": "{0} * {0}", "sigmoid": "sigmoid({0})",
    "tanh": "tanh({0})", "relu": "tl.where({0} <= 0, 0, {0})", "silu": "{0} * sigmoid({0})", "clone": "{0}", "alias": "{0}", "detach": "{0}", "positive": "{0}",
    "silu_backward": "{0} * sigmoid({1}) * (1.0 + {1} * (1.0 - sigmoid({1})))", "tanh_backward": "{0} * (1.0 - {1} * {1})",
    "sigmoid_backward": "{0} * (1.0 - {1}) * {1}", "threshold_backward": "tl.where({1} <= {2}, 0, {0})",
    "where.self": "tl.where({0}, {1}, {2})", "masked_fill.Scalar": "tl.where({1}, {2}, {0})", "masked_fill.Tensor": "tl.where({1}, {2}, {0})",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "bitwise_and.Tensor": "{0} & {1}", "bitwise_or.Tensor": "{0} | {1}", "bitwise_xor.Tensor": "{0} ^ {1}",
    "lerp.Tensor": "tl.where(tl.abs({2}) < 0.5, {0} + {2} * ({1} - {0}), {1} - ({1} - {0}) * (1 - {2}))", "sign": "({0} > 0).to({0}.dtype) - ({0} < 0).to({0}.dtype)",
}  # fmt: skip
_WHOLE = ("floor", "ceil")  # what integers are already
_INTEGER_MAXIMUM = {"maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})"}
_BOOLEAN = {"logical_and": "{0} & {1}", "logical_or": "{0} | {1}", "logical_not": "{0} == 0", "logical_xor": "{0} ^ {1}", "bitwise_not": "{0} == 0", "isnan": "{0} != {0}"}
_CONDITIONS = {"where.self": 0, "masked_fill.Scalar": 1, "masked_fill.Tensor": 1}  # the operand that is a mask


def expression(p: Program, op: Op, registers: Sequence[Register]) -> tuple[str, frozenset[str]]:
    """The op on its operands, and the functions of ``LIBRARY`` that it calls. Raises CodegenError."""
    name = op.target.removeprefix("aten.")
    base = name.partition(".")[0]
    dtype = computed(op.type.dtype)
    given = iter(registers)
    compares = base in COMPARE and name.partition(".")[2] in ("Scalar", "Tensor")
    common = compared(p, op) if compares or name in _BOOLEAN else op.type.dtype
    within = computed(common)
    if name.startswith("logical"):
        within = "bool"
    texts = []
    for n, a in enumerate(op.args):
        want = "bool" if _CONDITIONS.get(name) == n else within
        if isinstance(a, Ref):
            texts.append(converted(next(given), want))
        elif isinstance(a, bool | int | float):
            texts.append(literal(a, want))
        else:
            texts.append("" if a is None else str(a))
        if compares and common in ("bf16", "f16") and not (isinstance(a, Ref) and p.types[a.name].dtype == common):
            texts[-1] = f"as_{common}({texts[-1] if isinstance(a, Ref) else f'tl.full([], {texts[-1]}, tl.float32)'})"  # 0.3 is no number of 16 bits
    if compares:
        return f"{texts[0]} {COMPARE[base]} {texts[1]}", frozenset(f for f in LIBRARY if any(text.startswith(f"{f}(") for text in texts))
    if name in _BOOLEAN and not (name == "bitwise_not" and op.type.dtype != "bool"):
        return _BOOLEAN[name].format(*texts), frozenset()
    if name in _FUNCTIONS:
        text = _FUNCTIONS[name](texts, op)
    elif name in _WHOLE and dtype not in FLOATS:
        text = texts[0]
    elif name in _INTEGER_MAXIMUM and dtype not in FLOATS:
        text = _INTEGER_MAXIMUM[name].format(*texts)
    elif name in _TEMPLATES and op.target.startswith("aten."):
        text = _TEMPLATES[name].format(*texts)
    else:
        raise CodegenError(f"%{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + ": no Triton expression for this op\n  fix: none is needed, the group runs as Python")
    return text, frozenset(f for f in LIBRARY if f"{f}(" in text.replace(f"tl.{f}(", ""))


def supported(op: Op) -> bool:
    """Whether a pointwise op has an expression."""
    name = op.target.removeprefix("aten.")
    compares = name.partition(".")[0] in COMPARE and name.partition(".")[2] in ("Scalar", "Tensor")
    known = compares or name in _TEMPLATES or name in _FUNCTIONS or name in _BOOLEAN
    return op.target.startswith("aten.") and known and all(t.dtype in TYPES for t in op.types)


def _power(x: Sequence[str], op: Op) -> str:
    n = op.args[1]
    known = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", 1: "{0}", -1: "1.0 / {0}", -2: "1.0 / ({0} * {0})", 4: "({0} * {0}) * ({0} * {0})"}
    if isinstance(n, int | float) and n in known:
        return known[n].format(x[0])
    if isinstance(n, int | float) and n != int(n) and op.type.dtype in FLOATS:
        return f"tl.exp({x[1]} * tl.log({x[0]}))"
    raise CodegenError(f"%{op.name} = {op.target}: no Triton expression for the power {n!r}\n  fix: none is needed, the group runs as Python")


def _exponential(x: Sequence[str], op: Op) -> str:
    base = op.args[0]
    if not isinstance(base, int | float) or base <= 0 or op.type.dtype not in FLOATS:
        raise CodegenError(f"%{op.name} = {op.target}: no Triton expression for powers of {base!r}\n  fix: none is needed, the group runs as Python")
    return f"tl.exp({x[1]} * {literal(math.log(base), computed(op.type.dtype))})"


def _clamp(x: Sequence[str], op: Op) -> str:
    bounds = [*op.args[1:], None, None][:2]
    low, high = (op.kw("min", bounds[0]), op.kw("max", bounds[1]))
    text, dtype = x[0], computed(op.type.dtype)
    if low is not None:
        text = f"tl.where({text} < {literal(low, dtype)}, {literal(low, dtype)}, {text})"
    return text if high is None else f"tl.where({text} > {literal(high, dtype)}, {literal(high, dtype)}, {text})"


_GELU = "tanh({c} * ({x} + 0.044715 * {x} * {x} * {x}))"


def _gelu(x: Sequence[str], op: Op) -> str:
    y = x[0]
    if op.kw("approximate", "none") == "tanh":
        return f"0.5 * {y} * (1.0 + {_GELU.format(x=y, c=math.sqrt(2 / math.pi))})"
    return f"0.5 * {y} * (1.0 + tl.erf({y} * {math.sqrt(0.5)}))"


def _gelu_backward(x: Sequence[str], op: Op) -> str:
    g, y = x[:2]
    if op.kw("approximate", "none") == "tanh":
        c = math.sqrt(2 / math.pi)
        t = _GELU.format(x=y, c=c)
        return f"{g} * (0.5 * (1.0 + {t}) + 0.5 * {y} * (1.0 - {t} * {t}) * {c} * (1.0 + {3 * 0.044715} * {y} * {y}))"
    return f"{g} * (0.5 * (1.0 + tl.erf({y} * {math.sqrt(0.5)})) + {y} * tl.exp(-0.5 * {y} * {y}) * {1 / math.sqrt(2 * math.pi)})"


def _multiplied(sign: str) -> Write:
    def write(x: Sequence[str], op: Op) -> str:
        value = number(op, "value")
        return f"{x[0]} + " + ("" if value == 1 else f"{literal(value, computed(op.type.dtype))} * ") + f"({x[1]} {sign} {x[2]})"

    return write


_FUNCTIONS: Mapping[str, Write] = {
    "add.Tensor": added("+", "|", literal), "add.Scalar": added("+", "|", literal), "sub.Tensor": added("-", "|", literal), "sub.Scalar": added("-", "|", literal), "rsub.Scalar": rsub(literal),
    "pow.Tensor_Scalar": _power, "pow.Scalar": _exponential, "clamp": _clamp, "gelu": _gelu, "gelu_backward": _gelu_backward, "lerp.Scalar": lerp(literal),
    "addcmul": _multiplied("*"), "addcdiv": _multiplied("/"),
}  # fmt: skip
