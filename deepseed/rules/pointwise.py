"""The ops that compute each element of the result from one element of each operand: one rule for all of them.

The names are those that PyTorch tags ``pointwise`` (without in-place, ``out=`` and orthogonal-polynomial variants), and a
few that it does not tag; a test compares the list with the installed PyTorch. What PyTorch tags wrongly for our purpose is
left out: ``equal`` returns one bool, ``rrelu`` draws random numbers.
"""

from __future__ import annotations

from deepseed.rules.signature import Call, Rule, RuleError

_NAMES = """
__lshift__.Scalar __lshift__.Tensor __rshift__.Scalar __rshift__.Tensor __xor__.Scalar __xor__.Tensor _conj_physical abs acos
acosh add.Scalar add.Tensor addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and.Scalar bitwise_and.Scalar_Tensor
bitwise_and.Tensor bitwise_left_shift.Scalar_Tensor bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_not
bitwise_or.Scalar bitwise_or.Scalar_Tensor bitwise_or.Tensor bitwise_right_shift.Scalar_Tensor bitwise_right_shift.Tensor
bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Scalar_Tensor bitwise_xor.Tensor ceil celu clamp clamp.Tensor
clamp_max clamp_max.Tensor clamp_min clamp_min.Tensor clip clip.Tensor clone conj_physical copysign.Scalar copysign.Tensor cos
cosh deg2rad digamma div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode elu eq.Scalar eq.Tensor erf erfc erfinv exp exp2
expm1 float_power.Scalar float_power.Tensor_Scalar float_power.Tensor_Tensor floor fmax fmin fmod.Scalar fmod.Tensor frac
frexp.Tensor gcd ge.Scalar ge.Tensor gelu gelu_backward gt.Scalar gt.Tensor hardshrink hardsigmoid hardtanh heaviside hypot i0
igamma igammac isfinite isinf isnan isneginf isposinf lcm ldexp.Tensor le.Scalar le.Tensor leaky_relu lerp.Scalar lerp.Tensor
lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logit_backward lt.Scalar
lt.Tensor masked_fill.Scalar max.other maximum min.other minimum mish mul.Scalar mul.Tensor mvlgamma nan_to_num
native_dropout_backward ne.Scalar ne.Tensor neg nextafter polygamma positive pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
rad2deg reciprocal relu relu6 remainder.Scalar remainder.Scalar_Tensor remainder.Tensor round round.decimals rsqrt rsub.Scalar
selu sgn sigmoid sigmoid_backward sign signbit silu silu_backward sin sinc sinh softplus softshrink sqrt square sub.Scalar
sub.Tensor tan tanh tanh_backward threshold threshold_backward true_divide.Tensor trunc where.self xlogy.Scalar_Other
xlogy.Scalar_Self xlogy.Tensor
elu_backward hardshrink_backward hardsigmoid_backward hardswish hardswish_backward hardtanh_backward leaky_relu_backward
log_sigmoid_backward mish_backward rsub.Tensor softplus_backward softshrink_backward where.ScalarOther where.ScalarSelf
complex polar _prelu_kernel _prelu_kernel_backward rrelu_with_noise_backward special_airy_ai special_bessel_j0 special_bessel_j1
special_bessel_y0 special_bessel_y1 special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri
special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py
special_xlog1py.other_scalar special_xlog1py.self_scalar special_zeta special_zeta.other_scalar special_zeta.self_scalar
"""
POINTWISE = frozenset(f"aten.{name}" for name in _NAMES.split())

_LINEAR_BACKWARD = """elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid logit mish sigmoid silu softplus
softshrink tanh threshold"""

# Which arguments may be partial sums together (see Rule). In a backward, the incoming gradient.
LINEAR = {
    "aten.add.Tensor": "0+1",
    "aten.add.Scalar": "0+1",
    "aten.sub.Tensor": "0+1",
    "aten.sub.Scalar": "0+1",
    "aten.rsub.Tensor": "0+1",
    "aten.rsub.Scalar": "0+1",
    "aten.lerp.Scalar": "0+1",
    "aten.lerp.Tensor": "0+1",
    "aten.addcmul": "0+1|0+2",
    "aten.addcdiv": "0+1",
    "aten.mul.Tensor": "0|1",
    "aten.mul.Scalar": "0",
    "aten.div.Tensor": "0",
    "aten.true_divide.Tensor": "0",
    "aten.div.Scalar": "0",
    "aten.neg": "0",
    "aten.positive": "0",
    "aten.clone": "0",
    "aten.deg2rad": "0",
    "aten.rad2deg": "0",
    "aten.where.self": "1+2",
    "aten.where.ScalarOther": "1+2",
    "aten.where.ScalarSelf": "1+2",
    "aten.masked_fill.Scalar": "0+2",
    "aten.native_dropout_backward": "0",
    "aten._prelu_kernel_backward": "0",
    "aten.rrelu_with_noise_backward": "0",
    "aten.complex": "0+1",
    "aten._conj_physical": "0",
    **{f"aten.{name}_backward": "0" for name in _LINEAR_BACKWARD.split()},
}

MONOTONE = {"aten.maximum": "0+1", "aten.max.other": "0+1", "aten.clone": "0"}


def form(call: Call) -> str:
    """Dimensions are aligned at the right; an operand's dimension of size 1 is broadcast and has no factor."""
    out = call.out

    def tensor(shape: tuple[int, ...]) -> str:
        first = len(out) - len(shape)
        if first < 0 or any(size not in (1, out[first + i]) and 0 not in shape for i, size in enumerate(shape)):
            raise RuleError(f"{call.op.target}: {list(shape)} does not broadcast to {list(out)}")
        return " ".join(f"d{first + i}" if size == out[first + i] else "1" for i, size in enumerate(shape)) or "."

    return ", ".join(tensor(t.shape) for t in call.operands) + " -> " + ", ".join(tensor(t.shape) for t in call.results)


def rule(target: str) -> Rule | None:
    """The pointwise row of ``target``, or None."""
    if target not in POINTWISE:
        return None
    return Rule(form, LINEAR.get(target, ""), MONOTONE.get(target, ""))
