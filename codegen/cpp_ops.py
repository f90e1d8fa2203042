"""One pointwise op as one C++ expression. 16-bit floats are computed in float; the formulas are those of PyTorch's kernels.

``LIBRARY`` is what expressions call, written so that a compiler vectorizes loops over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.pointwise import Write as Write
from deepseed.codegen.pointwise import added, compared, lerp, number, rsub
from deepseed.codegen.pointwise import computed as computed
from deepseed.ir.kernels import COMPARE
from deepseed.ir.program import FLOATS, Op, Program, Ref

TYPES = {"f64": "double", "f32": "float", "f16": "half", "bf16": "bfloat", "i64": "int64_t", "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "bool": "bool"}  # in memory

LIBRARY = r"""
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

enum class bfloat : uint16_t {};  // numbers, for a struct keeps compilers from vectors; conversions of _Float16 do too
enum class half : uint16_t {};
template <class T> static inline T up(T x) { return x; }
static inline float up(bfloat x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
static inline float up(half x) {
    uint32_t bits = uint32_t(x), exponent = bits & 0x7c00, high = (bits & 0x7fff) << 13;
    uint32_t low = __builtin_bit_cast(uint32_t, float(int32_t(bits & 0x3ff)) * 0x1p-24f);  // of a subnormal
    uint32_t made = exponent == 0 ? low : high + (exponent == 0x7c00 ? 224u << 23 : 112u << 23);
    return __builtin_bit_cast(float, made | (bits & 0x8000) << 16);
}
template <class S> struct down { template <class T> static S of(T x) { return S(x); } };
template <> struct down<half> {
    static half of(float x) {  // the same; below 2**-14 by a sum whose last place is a half's, 2**-24
        uint32_t bits = __builtin_bit_cast(uint32_t, x), size = bits & 0x7fffffff, high = size - (112u << 23);
        uint32_t low = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f);
        uint32_t made = size < 0x38800000 ? low : (high + 0xfff + ((high >> 13) & 1)) >> 13;
        made = size >= 0x47800000 ? 0x7c00 : made;
        return half(uint16_t((size > 0x7f800000 ? 0x7e00 : made) | (bits & 0x80000000) >> 16));
    }
};
template <> struct down<bfloat> {
    static bfloat of(float x) {  // to the nearest, ties to even
        uint32_t bits = __builtin_bit_cast(uint32_t, x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return bfloat(uint16_t(x != x ? 0x7fc0 : rounded));
    }
};

static inline float fma_(float a, float b, float c) {  // rounded once where the processor does that; elsewhere the compiler is told not to (deepseed.codegen.cpp_files)
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
static inline double fma_(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}
static inline double exp_(double x) { return std::exp(x); }
static inline float exp_(float x) {  // of all that a float holds: 2**n in two factors, the last of which rounds once to what is below 2**-126
    float bounded = x > 89.0f ? 89.0f : x;
    bounded = bounded < -104.0f ? -104.0f : bounded;
    float shifted = fma_(bounded, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f, r = fma_(n, 2.12194440e-4f, fma_(n, -0.693359375f, bounded));
    int32_t whole = __builtin_bit_cast(int32_t, shifted) - 0x4b400000, half_of = whole >> 1;  // the low bits of ``shifted`` are n
    float p = 1.9875691500e-4f;
    p = fma_(p, r, 1.3981999507e-3f); p = fma_(p, r, 8.3334519073e-3f); p = fma_(p, r, 4.1665795894e-2f); p = fma_(p, r, 1.6666665459e-1f); p = fma_(p, r, 5.0000001201e-1f);
    p = fma_(p * r, r, r) + 1.0f;
    return p * __builtin_bit_cast(float, uint32_t(half_of + 127) << 23) * __builtin_bit_cast(float, uint32_t(whole - half_of + 127) << 23);
}
template <class T> static inline T sigmoid(T x) { return T(1) / (T(1) + exp_(-x)); }
static inline double tanh_(double x) { return std::tanh(x); }
static inline float tanh_(float x) {
    float y = x < 0 ? -x : x, e = exp_(-2.0f * y), z = x * x;
    float near = x * fma_(z, fma_(z, fma_(z, fma_(z, 0.0218694885f, -0.0539682540f), 0.1333333333f), -0.3333333333f), 1.0f), far = (1.0f - e) / (1.0f + e);
    return y < 0.0625f ? near : x < 0 ? -far : far;
}
template <class T> static inline T most(T a, T b) { return a > b || a != a ? a : b; }
#pragma omp declare reduction(highest : float, double, int64_t, int32_t, int16_t, int8_t, uint8_t, bool : omp_out = most(omp_out, omp_in)) initializer(omp_priv = omp_orig)
template <class T> static inline T least(T a, T b) { return a < b || a != a ? a : b; }
template <class T> static inline T higher(T a, T b) { return a != a ? b : b != b ? a : a > b ? a : b; }  // of a number and none the number
template <class T> static inline T lower(T a, T b) { return a != a ? b : b != b ? a : a < b ? a : b; }
template <class T> static inline T floored(T x, T y) { T r = std::fmod(x, y); return r != 0 && (r < 0) != (y < 0) ? r + y : r; }  // the remainder, with the sign of y
template <class T> static inline T power(T x, T n) {  // of integers, exact
    if constexpr (!std::is_integral_v<T>) return std::pow(x, n);
    else {
        if (n < 0) return x == 1 ? T(1) : x == T(-1) ? (n & 1 ? T(-1) : T(1)) : T(0);
        uint64_t made = 1, square = uint64_t(x);
        for (uint64_t left = uint64_t(n); left; left >>= 1, square *= square) made *= left & 1 ? square : 1;
        return T(made);
    }
}
template <class T> static inline T whole(T x, T rounded) { return std::is_integral_v<T> ? x : rounded; }
template <class T> static inline T sign(T x) { return T(x > 0) - T(x < 0); }
"""


def type_of(dtype: str) -> str:
    return TYPES[computed(dtype)]


def wrapping(kind: str) -> str:
    """The C++ type that numbers of one are added up in: an overflow means nothing in C++ but of what has no sign. What is narrower than an int is added as ints."""
    return {"int64_t": "uint64_t", "int32_t": "uint32_t"}.get(kind, kind)


def squared(text: str, kind: str) -> str:
    return f"{text} * {text}" if wrapping(kind) == kind else f"{wrapping(kind)}({text}) * {wrapping(kind)}({text})"


def literal(value: object, dtype: str) -> str:
    if not isinstance(value, bool | int | float):
        raise CodegenError(f"{value!r} is no number")
    if dtype == "bool":
        return "true" if value else "false"
    if dtype not in FLOATS:
        return f"{TYPES[dtype]}({int(value)})"
    kind = type_of(dtype)
    value = float(value)
    if math.isnan(value):
        return f"std::numeric_limits<{kind}>::quiet_NaN()"
    return f"{'-' if value < 0 else ''}std::numeric_limits<{kind}>::infinity()" if math.isinf(value) else f"{kind}({value!r})"


def converted(text: str, have: str, want: str) -> str:
    """``have`` and ``want``: dtypes of values as they are computed."""
    if have == want:
        return text
    return f"({text} != 0)" if want == "bool" else f"{TYPES[want]}({text})"


_TEMPLATES = {
    "mul.Tensor": "{0} * {1}", "mul.Scalar": "{0} * {1}", "div.Tensor": "{0} / {1}", "div.Scalar": "{0} / {1}", "neg": "-{0}", "exp": "exp_({0})", "log": "std::log({0})",
    "log1p": "std::log1p({0})", "expm1": "std::expm1({0})", "sqrt": "std::sqrt({0})", "rsqrt": "{1t}(1) / std::sqrt({0})", "sin": "std::sin({0})", "cos": "std::cos({0})", "abs": "std::abs({0})",
    "erf": "std::erf({0})", "floor": "whole<{1t}>({0}, std::floor({0}))", "ceil": "whole<{1t}>({0}, std::ceil({0}))", "reciprocal": "{1t}(1) / {0}", "square": "{0} * {0}", "sigmoid": "sigmoid({0})", "tanh": "tanh_({0})",
    "relu": "({0} <= 0 ? {1t}(0) : {0})", "silu": "{0} * sigmoid({0})", "clone": "{0}", "alias": "{0}", "detach": "{0}", "positive": "{0}", "where.self": "({0} ? {1} : {2})",
    "masked_fill.Scalar": "({1} ? {2} : {0})", "masked_fill.Tensor": "({1} ? {2} : {0})", "maximum": "most({0}, {1})", "minimum": "least({0}, {1})", "sign": "sign({0})",
    "bitwise_and.Tensor": "{0} & {1}", "bitwise_or.Tensor": "{0} | {1}", "bitwise_xor.Tensor": "{0} ^ {1}", "lerp.Tensor": "(std::abs({2}) < {1t}(0.5) ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * ({1t}(1) - {2}))", "pow.Tensor_Tensor": "power<{1t}>({0}, {1})",
    "silu_backward": "{0} * sigmoid({1}) * ({1t}(1) + {1} * ({1t}(1) - sigmoid({1})))", "tanh_backward": "{0} * ({1t}(1) - {1} * {1})", "sigmoid_backward": "{0} * ({1t}(1) - {1}) * {1}",
    "threshold_backward": "({1} <= {2} ? {1t}(0) : {0})", "softplus": "({0} > 20 ? {0} : std::log1p(std::exp({0})))", "log2": "std::log2({0})", "exp2": "std::exp2({0})", "trunc": "whole<{1t}>({0}, std::trunc({0}))",
    "fmax": "higher<{1t}>({0}, {1})", "fmin": "lower<{1t}>({0}, {1})", "atan2": "std::atan2({0}, {1})", "fmod.Tensor": "std::fmod({0}, {1})", "fmod.Scalar": "std::fmod({0}, {1})",
    "remainder.Tensor": "floored<{1t}>({0}, {1})", "remainder.Scalar": "floored<{1t}>({0}, {1})", "bitwise_and.Scalar": "{0} & {1}", "clamp_min": "({0} < {1} ? {1} : {0})", "clamp_max": "({0} > {1} ? {1} : {0})",
    "hardsigmoid": "least(most({0} + 3, {1t}(0)), {1t}(6)) / {1t}(6)", "hardswish": "{0} * least(most({0} + 3, {1t}(0)), {1t}(6)) / {1t}(6)", "round": "whole<{1t}>({0}, std::nearbyint({0}))",
}  # fmt: skip
_BOOLEAN = {"logical_and": "{0} && {1}", "logical_or": "{0} || {1}", "logical_not": "!{0}", "logical_xor": "{0} != {1}", "bitwise_not": "!{0}", "isnan": "{0} != {0}", "isinf": "{0} == {0} && {0} - {0} != {0} - {0}", "isfinite": "{0} - {0} == {0} - {0}"}
_WRAPS = ("add", "sub", "rsub", "mul", "neg", "abs", "square", "pow", "addcmul")
_CONDITIONS = {"where.self": 0, "masked_fill.Scalar": 1, "masked_fill.Tensor": 1}  # the operand that is a mask
_FLOAT_ONLY = ("div.", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "reciprocal", "sigmoid", "tanh", "silu", "softplus", "gelu", "lerp", "fmod", "remainder", "atan2", "hardsigmoid", "hardswish", "leaky_relu", "elu")


def expression(p: Program, op: Op, operands: Sequence[str]) -> str:
    """The op on its operands, texts of values as they are computed. Raises CodegenError."""
    name = op.target.removeprefix("aten.")
    base, _, overload = name.partition(".")
    dtype = computed(op.type.dtype)
    compares = base in COMPARE and overload in ("Scalar", "Tensor")
    boolean = name in _BOOLEAN and not (name == "bitwise_not" and op.type.dtype != "bool")
    common = compared(p, op)
    within = "bool" if name.startswith("logical") else computed(common) if compares or boolean else dtype
    if not op.target.startswith("aten.") or (base.startswith(_FLOAT_ONLY) and not compares and not boolean and dtype not in FLOATS):
        raise _unknown(op)
    given = iter(operands)
    texts = []
    for n, a in enumerate(op.args):
        want = "bool" if _CONDITIONS.get(name) == n else within
        if isinstance(a, Ref):
            texts.append(f"({converted(next(given), computed(p.types[a.name].dtype), want)})")
        elif a is None or isinstance(a, str):
            texts.append("")
        else:
            texts.append(literal(a, want))
        if compares and common in ("bf16", "f16") and not (isinstance(a, Ref) and p.types[a.name].dtype == common):
            texts[-1] = f"up(down<{TYPES[common]}>::of({texts[-1]}))"  # 0.3 is no number of 16 bits
    if compares:
        return f"{texts[0]} {COMPARE[base]} {texts[1]}"
    if boolean:
        return _BOOLEAN[name].format(*texts)
    if dtype not in (*FLOATS, "bool") and base in _WRAPS:  # an overflow means nothing in C++ but of what has no sign
        if base == "abs":
            return f"({texts[0]} < 0 ? {TYPES[dtype]}(-uint64_t({texts[0]})) : {texts[0]})"
        return f"{TYPES[dtype]}({_written(name, [f'uint64_t({text})' for text in texts], op, dtype)})"
    return _written(name, texts, op, dtype)


def _written(name: str, texts: Sequence[str], op: Op, dtype: str) -> str:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](texts, op)
    if name not in _TEMPLATES or (name == "softplus" and len(op.args) > 1):
        raise _unknown(op)
    return _TEMPLATES[name].replace("{1t}", type_of(dtype)).format(*texts)


def _unknown(op: Op) -> CodegenError:
    return CodegenError(f"%{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + f" on {op.type.dtype}: no C++ expression for it\n  fix: none is needed, the group runs as Python")


def _power(x: Sequence[str], op: Op) -> str:
    n, one = op.args[1], literal(1, computed(op.type.dtype))
    known = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", 4: "({0} * {0}) * ({0} * {0})", 0.5: "std::sqrt({0})", -0.5: "{1} / std::sqrt({0})", -1: "{1} / {0}", -2: "{1} / ({0} * {0})"}
    if isinstance(n, int | float) and n in known and (op.type.dtype in FLOATS or n >= 1):
        return known[n].format(x[0], one)
    if op.type.dtype in FLOATS or (isinstance(n, int) and n >= 0):
        return f"power<{type_of(op.type.dtype)}>({x[0]}, {x[1]})"
    raise _unknown(op)


def _clamp(x: Sequence[str], op: Op) -> str:
    bounds = [*op.args[1:], None, None][:2]
    text, dtype = x[0], computed(op.type.dtype)
    for bound, better in ((op.kw("min", bounds[0]), "<"), (op.kw("max", bounds[1]), ">")):
        if bound is not None:
            if isinstance(bound, Ref):
                raise _unknown(op)
            text = f"({text} {better} {literal(bound, dtype)} ? {literal(bound, dtype)} : {text})"
    return text


def _gelu(x: Sequence[str], op: Op) -> str:
    y, kind = x[0], type_of(op.type.dtype)
    if op.kw("approximate", "none") == "tanh":
        return f"{kind}(0.5) * {y} * ({kind}(1) + tanh_({kind}({math.sqrt(2 / math.pi)!r}) * ({y} + {kind}(0.044715) * {y} * {y} * {y})))"
    return f"{kind}(0.5) * {y} * ({kind}(1) + std::erf({y} * {kind}({math.sqrt(0.5)!r})))"


def _gelu_backward(x: Sequence[str], op: Op) -> str:
    g, y, kind = x[0], x[1], type_of(op.type.dtype)
    if op.kw("approximate", "none") == "tanh":
        c = math.sqrt(2 / math.pi)
        t = f"tanh_({kind}({c!r}) * ({y} + {kind}(0.044715) * {y} * {y} * {y}))"
        return f"{g} * ({kind}(0.5) * ({kind}(1) + {t}) + {kind}(0.5) * {y} * ({kind}(1) - {t} * {t}) * {kind}({c!r}) * ({kind}(1) + {kind}({3 * 0.044715!r}) * {y} * {y}))"
    return f"{g} * ({kind}(0.5) * ({kind}(1) + std::erf({y} * {kind}({math.sqrt(0.5)!r}))) + {y} * exp_({kind}(-0.5) * {y} * {y}) * {kind}({1 / math.sqrt(2 * math.pi)!r}))"


def _exponential(x: Sequence[str], op: Op) -> str:
    base = op.args[0]
    if not isinstance(base, int | float):
        raise _unknown(op)
    return f"power<{type_of(op.type.dtype)}>({x[0]}, {x[1]})"


def _argument(op: Op, n: int, name: str, default: float) -> str:
    value = op.args[n] if len(op.args) > n else op.kw(name, default)
    return literal(value, computed(op.type.dtype))


def _leaky(x: Sequence[str], op: Op) -> str:
    return f"({x[0]} > 0 ? {x[0]} : {x[0]} * {_argument(op, 1, 'negative_slope', 0.01)})"


def _elu(x: Sequence[str], op: Op) -> str:
    alpha, scale, inner = (_argument(op, n, name, 1) for n, name in ((1, "alpha"), (2, "scale"), (3, "input_scale")))
    return f"({x[0]} > 0 ? {x[0]} * {scale} : std::expm1({x[0]} * {inner}) * {alpha} * {scale})"


def _hardtanh(x: Sequence[str], op: Op) -> str:
    low, high = _argument(op, 1, "min_val", -1), _argument(op, 2, "max_val", 1)
    return f"({x[0]} < {low} ? {low} : {x[0]} > {high} ? {high} : {x[0]})"


def _multiplied(sign: str) -> Write:
    def write(x: Sequence[str], op: Op) -> str:
        return f"{x[0]} + {literal(number(op, 'value'), computed(op.type.dtype))} * ({x[1]} {sign} {x[2]})"

    return write


_FUNCTIONS: Mapping[str, Write] = {
    "add.Tensor": added("+", "||", literal), "add.Scalar": added("+", "||", literal), "sub.Tensor": added("-", "||", literal), "sub.Scalar": added("-", "||", literal), "rsub.Scalar": rsub(literal), "rsub.Tensor": rsub(literal),
    "pow.Tensor_Scalar": _power, "clamp": _clamp, "gelu": _gelu, "gelu_backward": _gelu_backward, "lerp.Scalar": lerp(literal), "pow.Scalar": _exponential, "leaky_relu": _leaky, "elu": _elu, "hardtanh": _hardtanh, "addcmul": _multiplied("*"), "addcdiv": _multiplied("/"),
}  # fmt: skip
