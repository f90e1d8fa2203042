"""One or more examples of every rule: ``op(operands) : results``, types in place of names. Sizes divide by 2, 3 and 4."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch

from deepseed.ir.program import Op, Type
from deepseed.ir.text import parse
from deepseed.ops import dtype_name, overload
from deepseed.rules.pointwise import POINTWISE

EXAMPLES = """
reshape(f32[12, 24]) : f32[288]
reshape(f32[24, 12, 36]) : f32[24, 432]
reshape(f32[24, 12]) : f32[12, 24]
reshape(f32[12, 1, 36]) : f32[12, 3, 12]
reshape(f32[30, 12]) : f32[12, 30]
permute(f32[12, 24, 36], dims=[2, 0, 1]) : f32[36, 12, 24]
expand(f32[12, 1, 24]) : f32[12, 12, 36, 24]
cast(f32[12, 24]) : f64[12, 24]
cast(f32[12, 24]) : i64[12, 24]
cast(bool[12, 24]) : f32[12, 24]
slice(f32[12, 72], dim=1, start=24, step=1) : f32[12, 24]
slice(f32[12, 72], dim=1, start=12, step=1) : f32[12, 36]
slice(f32[12, 24], dim=1, start=1, step=1) : f32[12, 23]
slice(f32[12, 24], dim=1, start=1, step=2) : f32[12, 12]
unslice(f32[12, 24], dim=1, start=24, step=1) : f32[12, 72]
unslice(f32[12, 23], dim=1, start=1, step=1) : f32[12, 24]
unslice(f32[12, 12], dim=1, start=1, step=2) : f32[12, 24]
pad(f32[12, 24], pads=[0, 0, 0, 1], value=0) : f32[12, 25]
pad(f32[12, 24], pads=[0, 0, 24, 12], value=0.5) : f32[12, 60]
pad(i64[12, 24], pads=[12, 0, 0, 0], value=0) : i64[24, 24]
cat([f32[12, 24], f32[12, 24], f32[12, 24]], dim=1) : f32[12, 72]
cat([f32[24, 12], f32[48, 12]], dim=0) : f32[72, 12]
cat([f32[12, 1], f32[12, 24]], dim=1) : f32[12, 25]
full(value=0) : f32[12, 24]
full(value=2.5) : f32[12, 24]
iota(start=3, step=2) : i64[24]
bernoulli(i64[2], p=0.4, site="a") : f32[12, 24]
uniform(i64[2], low=-1.0, high=2.0, site="a") : f32[12, 24]
normal(i64[2], mean=0.5, std=2.0, site="a") : f32[12, 24]
sum(f32[12, 24, 36], dims=[1], keepdim=false) : f32[12, 36]
sum(f32[12, 24], dims=[0, 1], keepdim=false) : f32[]
sum(i64[12, 24], dims=[0], keepdim=true) : i64[1, 24]
sum(bool[12, 24], dims=[0], keepdim=true) : i64[1, 24]
add_into(f32[12, 24], f32[12, 24]) : f32[12, 24]
sum_of_squares(f32[12, 24, 36]) : f32[]
amax(f32[12, 24, 36], dims=[1], keepdim=true) : f32[12, 1, 36]
amax(f32[12, 24], dims=[0], keepdim=false) : f32[24]
aten.cumsum(f32[12, 24], 1) : f32[12, 24]
aten.argmax(f32[12, 24], 1) : i64[12]
aten.argmax(f32[12, 24], -1, true) : i64[12, 1]
aten.argmin(f32[12, 24], 0) : i64[24]
aten.max.dim(f32[12, 24], 1, true) : f32[12, 1], i64[12, 1]
aten.min.dim(f32[12, 24], 1) : f32[12], i64[12]
aten.topk(f32[12, 24], 3, -1) : f32[12, 3], i64[12, 3]
aten.sort(f32[12, 24], 1) : f32[12, 24], i64[12, 24]
aten._softmax(f32[12, 24], -1, false) : f32[12, 24]
aten._log_softmax(f32[12, 24], 1, false) : f32[12, 24]
aten._softmax_backward_data(f32[12, 24], f32[12, 24], -1, "f32") : f32[12, 24]
aten._log_softmax_backward_data(f32[12, 24], f32[12, 24], 1, "f32") : f32[12, 24]
aten.tril(f32[12, 24, 24], 0) : f32[12, 24, 24]
aten.triu(f32[12, 24, 24], 1) : f32[12, 24, 24]
aten.flip(f32[12, 24, 36], [1]) : f32[12, 24, 36]
aten.mm(f32[12, 24], f32[24, 36]) : f32[12, 36]
aten.bmm(f32[12, 24, 36], f32[12, 36, 24]) : f32[12, 24, 24]
aten.mv(f32[12, 24], f32[24]) : f32[12]
aten.dot(f32[12], f32[12]) : f32[]
aten.convolution(f32[12, 24, 5, 6], f32[36, 24, 3, 3], none, [1, 1], [1, 1], [1, 1], false, [0, 0], 1) : f32[12, 36, 5, 6]
aten.convolution(f32[12, 24, 9], f32[36, 2, 3], f32[36], [1], [0], [1], false, [0], 12) : f32[12, 36, 7]
aten.baddbmm(f32[12, 1, 24], f32[12, 24, 36], f32[12, 36, 24]) : f32[12, 24, 24]
aten.convolution(f32[12, 24, 5], f32[24, 12, 3], f32[12], [2], [1], [1], true, [1], 1) : f32[12, 12, 10]
aten.convolution(f32[12, 24, 5], f32[24, 12, 3], none, [2], [1], [1], true, [1], 12) : f32[12, 144, 10]
aten.convolution_backward(f32[12, 36, 5, 6], f32[12, 24, 5, 6], f32[36, 24, 3, 3], none, [1, 1], [1, 1], [1, 1], false, [0, 0], 1, [true, false, false]) : f32[12, 24, 5, 6]
aten.convolution_backward(f32[12, 36, 5, 6], f32[12, 24, 5, 6], f32[36, 24, 3, 3], none, [1, 1], [1, 1], [1, 1], false, [0, 0], 1, [false, true, false]) : f32[36, 24, 3, 3]
aten.convolution_backward(f32[12, 24, 7], f32[12, 24, 9], f32[24, 1, 3], none, [1], [0], [1], false, [0], 24, [true, false, false]) : f32[12, 24, 9]
aten.convolution_backward(f32[12, 24, 7], f32[12, 24, 9], f32[24, 1, 3], none, [1], [0], [1], false, [0], 24, [false, true, false]) : f32[24, 1, 3]
aten.convolution_backward(f32[12, 12, 10], f32[12, 24, 5], f32[24, 12, 3], none, [2], [1], [1], true, [1], 1, [false, true, false]) : f32[24, 12, 3]
aten.max_pool2d_with_indices(f32[12, 24, 6, 8], [2, 2], [2, 2]) : f32[12, 24, 3, 4], i64[12, 24, 3, 4]
aten.max_pool2d_with_indices(f32[24, 6, 8], [2, 2], [2, 2]) : f32[24, 3, 4], i64[24, 3, 4]
aten.max_pool2d_with_indices_backward(f32[12, 24, 3, 4], f32[12, 24, 6, 8], [2, 2], [2, 2], [0, 0], [1, 1], false, i64[12, 24, 3, 4]) : f32[12, 24, 6, 8]
aten.avg_pool2d(f32[12, 24, 6, 8], [2, 2], [2, 2]) : f32[12, 24, 3, 4]
aten.avg_pool2d_backward(f32[12, 24, 3, 4], f32[12, 24, 6, 8], [2, 2], [2, 2], [0, 0], false, true, none) : f32[12, 24, 6, 8]
aten._adaptive_avg_pool2d(f32[12, 24, 6, 8], [3, 2]) : f32[12, 24, 3, 2]
aten._adaptive_avg_pool2d_backward(f32[12, 24, 3, 2], f32[12, 24, 6, 8]) : f32[12, 24, 6, 8]
aten.upsample_nearest2d(f32[12, 24, 3, 4], [6, 8]) : f32[12, 24, 6, 8]
aten.upsample_bilinear2d(f32[12, 24, 3, 4], [6, 8], false) : f32[12, 24, 6, 8]
aten.cumprod(f32[12, 24], 1) : f32[12, 24]
aten.logcumsumexp(f32[12, 24], 0) : f32[12, 24]
aten.prod.dim_int(f32[12, 24], 1) : f32[12]
aten.any.dim(bool[12, 24], 1) : bool[12]
aten.all.dim(bool[12, 24], 0, true) : bool[1, 24]
aten.median.dim(f32[12, 24], 1) : f32[12], i64[12]
aten.kthvalue(f32[12, 24], 2, 1) : f32[12], i64[12]
aten.roll(f32[12, 24, 36], [1], [1]) : f32[12, 24, 36]
cat([f32[12, 24], f32[12, 0]], dim=1) : f32[12, 24]
aten.addmm(f32[24], f32[12, 36], f32[36, 24]) : f32[12, 24]
aten.addmm(f32[12, 1], f32[12, 36], f32[36, 24]) : f32[12, 24]
aten._safe_softmax(f32[12, 24], -1) : f32[12, 24]
aten.mean.dim(f32[12, 24, 36], [1]) : f32[12, 36]
aten.mean.dim(f32[12, 24, 36], [-1, 0], true) : f32[1, 24, 1]
aten.native_layer_norm(f32[12, 24, 36], [36], f32[36], f32[36], 1e-05) : f32[12, 24, 36], f32[12, 24, 1], f32[12, 24, 1]
aten.native_layer_norm_backward(f32[12, 24, 36], f32[12, 24, 36], [36], f32[12, 24, 1], f32[12, 24, 1], f32[36], f32[36], [true, true, true]) : f32[12, 24, 36], f32[36], f32[36]
aten.native_layer_norm_backward(f32[12, 24, 36], f32[12, 24, 36], [36], f32[12, 24, 1], f32[12, 24, 1], f32[36], f32[36], [false, true, true]) : f32[36], f32[36]
aten.native_layer_norm_backward(f32[12, 24, 36], f32[12, 24, 36], [36], f32[12, 24, 1], f32[12, 24, 1], f32[36], f32[36], [true, false, true]) : f32[12, 24, 36], f32[36]
aten.nll_loss_forward(f32[12, 24], i64[12], none, 2, -100) : f32[], f32[]
aten.nll_loss_backward(f32[], f32[12, 24], i64[12], none, 2, -100, f32[]) : f32[12, 24]
optim.adamw(f32[12, 24], f32[12, 24], f32[], f32[12, 24], f32[12, 24], f32[], states=["step", "exp_avg", "exp_avg_sq"], betas=[0.9, 0.95], eps=0.01, weight_decay=0.1) : f32[12, 24], f32[12, 24], f32[12, 24]
optim.adam(f32[12, 24], f32[12, 24], f32[], f32[12, 24], f32[12, 24], f32[], states=["step", "exp_avg", "exp_avg_sq"], betas=[0.9, 0.95], eps=0.01, weight_decay=0.1) : f32[12, 24], f32[12, 24], f32[12, 24]
optim.sgd(f32[12, 24], f32[12, 24], f32[12, 24], f32[], states=["momentum_buffer"], momentum=0.9) : f32[12, 24], f32[12, 24]
optim.pointwise(f32[12, 24], f32[12, 24], f32[12, 24], f32[], operands=["param", "exp_avg", "grad", "n0"], numbers=["n0"], body=["%v0 = aten.mul.Tensor(%exp_avg, 0.9) : f32[n]", "%v1 = aten.add.Tensor(%v0, %grad, alpha=0.1) : f32[n]", "%v2 = aten.sign(%v1) : f32[n]", "%v3 = aten.mul.Tensor(%v2, %n0) : f32[n]", "%v4 = aten.sub.Tensor(%param, %v3) : f32[n]"], results=["v4", "v1"]) : f32[12, 24], f32[12, 24]
aten.reflection_pad1d(f32[12, 24, 6], [1, 1]) : f32[12, 24, 8]
aten.reflection_pad1d_backward(f32[12, 24, 8], f32[12, 24, 6], [1, 1]) : f32[12, 24, 6]
aten.replication_pad1d(f32[12, 24, 6], [1, 1]) : f32[12, 24, 8]
aten.replication_pad1d_backward(f32[12, 24, 8], f32[12, 24, 6], [1, 1]) : f32[12, 24, 6]
aten.upsample_nearest1d(f32[12, 24, 6], [9]) : f32[12, 24, 9]
sized.upsample_nearest1d_backward(f32[12, 24, 9], given=[[9], "shape"]) : f32[12, 24, 6]
aten._upsample_nearest_exact1d(f32[12, 24, 6], [9]) : f32[12, 24, 9]
sized._upsample_nearest_exact1d_backward(f32[12, 24, 9], given=[[9], "shape"]) : f32[12, 24, 6]
aten.upsample_linear1d(f32[12, 24, 6], [9], false) : f32[12, 24, 9]
sized.upsample_linear1d_backward(f32[12, 24, 9], given=[[9], "shape", false]) : f32[12, 24, 6]
aten.avg_pool2d(f32[12, 24, 4, 6], [2, 2], [2, 2]) : f32[12, 24, 2, 3]
aten._adaptive_avg_pool2d(f32[12, 24, 4, 6], [2, 3]) : f32[12, 24, 2, 3]
aten.adaptive_max_pool2d(f32[12, 24, 4, 6], [2, 3]) : f32[12, 24, 2, 3], i64[12, 24, 2, 3]
aten.adaptive_max_pool2d_backward(f32[12, 24, 2, 3], f32[12, 24, 4, 6], i64[12, 24, 2, 3]) : f32[12, 24, 4, 6]
aten.max_unpool2d(f32[12, 24, 2, 3], i64[12, 24, 2, 3], [4, 6]) : f32[12, 24, 4, 6]
aten.reflection_pad2d(f32[12, 24, 4, 6], [1, 1, 1, 1]) : f32[12, 24, 6, 8]
aten.reflection_pad2d_backward(f32[12, 24, 6, 8], f32[12, 24, 4, 6], [1, 1, 1, 1]) : f32[12, 24, 4, 6]
aten.replication_pad2d(f32[12, 24, 4, 6], [1, 1, 1, 1]) : f32[12, 24, 6, 8]
aten.replication_pad2d_backward(f32[12, 24, 6, 8], f32[12, 24, 4, 6], [1, 1, 1, 1]) : f32[12, 24, 4, 6]
aten.upsample_nearest2d(f32[12, 24, 4, 6], [5, 9]) : f32[12, 24, 5, 9]
sized.upsample_nearest2d_backward(f32[12, 24, 5, 9], given=[[5, 9], "shape"]) : f32[12, 24, 4, 6]
aten._upsample_nearest_exact2d(f32[12, 24, 4, 6], [5, 9]) : f32[12, 24, 5, 9]
sized._upsample_nearest_exact2d_backward(f32[12, 24, 5, 9], given=[[5, 9], "shape"]) : f32[12, 24, 4, 6]
aten.upsample_bilinear2d(f32[12, 24, 4, 6], [5, 9], false) : f32[12, 24, 5, 9]
sized.upsample_bilinear2d_backward(f32[12, 24, 5, 9], given=[[5, 9], "shape", false]) : f32[12, 24, 4, 6]
aten.upsample_bicubic2d(f32[12, 24, 4, 6], [5, 9], false) : f32[12, 24, 5, 9]
sized.upsample_bicubic2d_backward(f32[12, 24, 5, 9], given=[[5, 9], "shape", false]) : f32[12, 24, 4, 6]
aten._upsample_bilinear2d_aa(f32[12, 24, 4, 6], [5, 9], false) : f32[12, 24, 5, 9]
sized._upsample_bilinear2d_aa_backward(f32[12, 24, 5, 9], given=[[5, 9], "shape", false]) : f32[12, 24, 4, 6]
aten._upsample_bicubic2d_aa(f32[12, 24, 4, 6], [5, 9], true) : f32[12, 24, 5, 9]
sized._upsample_bicubic2d_aa_backward(f32[12, 24, 5, 9], given=[[5, 9], "shape", true]) : f32[12, 24, 4, 6]
aten.avg_pool3d(f32[12, 24, 2, 4, 6], [2, 2, 2], [2, 2, 2]) : f32[12, 24, 1, 2, 3]
aten.avg_pool3d_backward(f32[12, 24, 1, 2, 3], f32[12, 24, 2, 4, 6], [2, 2, 2], [2, 2, 2], [0, 0, 0], false, true, none) : f32[12, 24, 2, 4, 6]
aten._adaptive_avg_pool3d(f32[12, 24, 2, 4, 6], [1, 2, 3]) : f32[12, 24, 1, 2, 3]
aten._adaptive_avg_pool3d_backward(f32[12, 24, 1, 2, 3], f32[12, 24, 2, 4, 6]) : f32[12, 24, 2, 4, 6]
aten.max_pool3d_with_indices(f32[12, 24, 2, 4, 6], [2, 2, 2], [2, 2, 2]) : f32[12, 24, 1, 2, 3], i64[12, 24, 1, 2, 3]
aten.max_pool3d_with_indices_backward(f32[12, 24, 1, 2, 3], f32[12, 24, 2, 4, 6], [2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], false, i64[12, 24, 1, 2, 3]) : f32[12, 24, 2, 4, 6]
aten.adaptive_max_pool3d(f32[12, 24, 2, 4, 6], [1, 2, 3]) : f32[12, 24, 1, 2, 3], i64[12, 24, 1, 2, 3]
aten.adaptive_max_pool3d_backward(f32[12, 24, 1, 2, 3], f32[12, 24, 2, 4, 6], i64[12, 24, 1, 2, 3]) : f32[12, 24, 2, 4, 6]
aten.max_unpool3d(f32[12, 24, 1, 2, 3], i64[12, 24, 1, 2, 3], [2, 4, 6], [2, 2, 2], [0, 0, 0]) : f32[12, 24, 2, 4, 6]
aten.reflection_pad3d(f32[12, 24, 2, 4, 6], [1, 1, 1, 1, 1, 1]) : f32[12, 24, 4, 6, 8]
aten.reflection_pad3d_backward(f32[12, 24, 4, 6, 8], f32[12, 24, 2, 4, 6], [1, 1, 1, 1, 1, 1]) : f32[12, 24, 2, 4, 6]
aten.replication_pad3d(f32[12, 24, 2, 4, 6], [1, 1, 1, 1, 1, 1]) : f32[12, 24, 4, 6, 8]
aten.replication_pad3d_backward(f32[12, 24, 4, 6, 8], f32[12, 24, 2, 4, 6], [1, 1, 1, 1, 1, 1]) : f32[12, 24, 2, 4, 6]
aten.upsample_nearest3d(f32[12, 24, 2, 4, 6], [3, 5, 9]) : f32[12, 24, 3, 5, 9]
sized.upsample_nearest3d_backward(f32[12, 24, 3, 5, 9], given=[[3, 5, 9], "shape"]) : f32[12, 24, 2, 4, 6]
aten._upsample_nearest_exact3d(f32[12, 24, 2, 4, 6], [3, 5, 9]) : f32[12, 24, 3, 5, 9]
sized._upsample_nearest_exact3d_backward(f32[12, 24, 3, 5, 9], given=[[3, 5, 9], "shape"]) : f32[12, 24, 2, 4, 6]
aten.upsample_trilinear3d(f32[12, 24, 2, 4, 6], [3, 5, 9], false) : f32[12, 24, 3, 5, 9]
sized.upsample_trilinear3d_backward(f32[12, 24, 3, 5, 9], given=[[3, 5, 9], "shape", false]) : f32[12, 24, 2, 4, 6]
aten.fractional_max_pool2d(f32[12, 24, 4, 6], [2, 2], [2, 3], f32[12, 24, 2]) : f32[12, 24, 2, 3], i64[12, 24, 2, 3]
aten.im2col(f32[12, 24, 4, 6], [2, 3], [1, 1], [0, 1], [2, 1]) : f32[12, 144, 12]
aten.im2col(f32[24, 4, 6], [2, 3], [1, 1], [0, 1], [2, 1]) : f32[144, 12]
aten.col2im(f32[12, 144, 12], [4, 6], [2, 3], [1, 1], [0, 1], [2, 1]) : f32[12, 24, 4, 6]
aten.grid_sampler_2d(f32[12, 24, 4, 6], f32[12, 3, 5, 2], 0, 0, false) : f32[12, 24, 3, 5]
aten.grid_sampler_2d_backward(f32[12, 24, 3, 5], f32[12, 24, 4, 6], f32[12, 3, 5, 2], 0, 0, false, [true, true]) : f32[12, 24, 4, 6], f32[12, 3, 5, 2]
aten.grid_sampler_3d(f32[12, 24, 2, 3, 4], f32[12, 2, 3, 5, 3], 0, 0, false) : f32[12, 24, 2, 3, 5]
aten.grid_sampler_3d_backward(f32[12, 24, 2, 3, 5], f32[12, 24, 2, 3, 4], f32[12, 2, 3, 5, 3], 0, 0, false, [true, true]) : f32[12, 24, 2, 3, 4], f32[12, 2, 3, 5, 3]
aten._linalg_det(f32[12, 24, 3, 3]) : f32[12, 24], f32[12, 24, 3, 3], i32[12, 24, 3]
aten._linalg_slogdet(f32[12, 24, 3, 3]) : f32[12, 24], f32[12, 24], f32[12, 24, 3, 3], i32[12, 24, 3]
aten._linalg_eigh(f32[12, 24, 3, 3]) : f32[12, 24, 3], f32[12, 24, 3, 3]
aten.linalg_inv_ex(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3], i32[12, 24]
aten.linalg_cholesky_ex(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3], i32[12, 24]
aten.linalg_lu_factor_ex(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3], i32[12, 24, 3], i32[12, 24]
aten.linalg_qr(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3], f32[12, 24, 3, 3]
aten.linalg_matrix_exp(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3]
aten.cholesky_inverse(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3]
aten._linalg_svd(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3], f32[12, 24, 3], f32[12, 24, 3, 3]
aten._linalg_solve_ex(f32[12, 24, 3, 3], f32[12, 24, 3, 2]) : f32[12, 24, 3, 2], f32[12, 24, 3, 3], i32[12, 24, 3], i32[12, 24]
aten._linalg_solve_ex(f32[12, 24, 3, 3], f32[12, 24, 3]) : f32[12, 24, 3], f32[12, 24, 3, 3], i32[12, 24, 3], i32[12, 24]
aten.linalg_lu_solve(f32[12, 24, 3, 3], i32[12, 24, 3], f32[12, 24, 3, 2]) : f32[12, 24, 3, 2]
aten.lu_unpack(f32[12, 24, 3, 3], i32[12, 24, 3]) : f32[12, 24, 3, 3], f32[12, 24, 3, 3], f32[12, 24, 3, 3]
aten.linalg_pinv.atol_rtol_tensor(f32[12, 24, 3, 3]) : f32[12, 24, 3, 3]
aten.linalg_solve_triangular(f32[12, 24, 3, 3], f32[12, 24, 3, 2], upper=true) : f32[12, 24, 3, 2]
aten.linalg_solve_triangular(f32[12, 1, 3, 3], f32[12, 24, 3, 2], upper=false) : f32[12, 24, 3, 2]
aten.triangular_solve(f32[12, 24, 3, 2], f32[12, 24, 3, 3]) : f32[12, 24, 3, 2], f32[12, 24, 3, 3]
aten.cholesky_solve(f32[12, 24, 3, 2], f32[12, 24, 3, 3]) : f32[12, 24, 3, 2]
aten._cdist_forward(f32[12, 24, 3], f32[12, 36, 3], 2.0, none) : f32[12, 24, 36]
aten._cdist_backward(f32[12, 24, 36], f32[12, 24, 3], f32[12, 36, 3], 2.0, f32[12, 24, 36]) : f32[12, 24, 3]
aten._cdist_forward(f32[12, 24], f32[36, 24], 1.0, none) : f32[12, 36]
aten.linalg_cross(f32[12, 3, 24], f32[12, 3, 24], dim=1) : f32[12, 3, 24]
aten._fft_r2c(f32[12, 6, 24], [1], 0, true) : c128[12, 4, 24]
aten._fft_c2r(c128[12, 4, 24], [1], 0, 6) : f32[12, 6, 24]
aten._fft_c2c(c128[12, 4, 24], [1], 0, true) : c128[12, 4, 24]
aten._fft_r2c(f32[12, 6, 4], [1, 2], 0, true) : c128[12, 6, 3]
aten.view_as_real(c128[12, 4, 24]) : f32[12, 4, 24, 2]
aten.searchsorted.Tensor(f32[5], f32[12, 24]) : i64[12, 24]
aten.searchsorted.Tensor(f32[12, 5], f32[12, 24]) : i64[12, 24]
aten.bucketize.Tensor(f32[12, 24], f32[5]) : i64[12, 24]
aten.isin.Tensor_Tensor(i64[12, 24], i64[5]) : bool[12, 24]
aten.bartlett_window(8, dtype="f32") : f32[8]
aten.blackman_window(8, dtype="f32") : f32[8]
aten.hamming_window(8, dtype="f32") : f32[8]
aten.hann_window(8, dtype="f32") : f32[8]
aten.kaiser_window(8, dtype="f32") : f32[8]
aten.fft_fftfreq(8, dtype="f32") : f32[8]
aten.fft_rfftfreq(8, dtype="f32") : f32[5]
aten.hann_window.periodic(8, true, dtype="f32") : f32[8]
aten.blackman_window.periodic(8, true, dtype="f32") : f32[8]
aten.hamming_window.periodic(8, true, dtype="f32") : f32[8]
aten.hamming_window.periodic_alpha(8, true, 0.5, dtype="f32") : f32[8]
aten.hamming_window.periodic_alpha_beta(8, true, 0.5, 0.5, dtype="f32") : f32[8]
aten.kaiser_window.periodic(8, true, dtype="f32") : f32[8]
aten.kaiser_window.beta(8, true, 12.0, dtype="f32") : f32[8]
aten.linspace(0, 1, 8, dtype="f32") : f32[8]
aten.logspace(0, 1, 8, 10.0, dtype="f32") : f32[8]
aten.tril_indices(4, 4) : i64[2, 10]
aten.triu_indices(4, 4) : i64[2, 10]
aten.median(f32[12, 24]) : f32[]
aten.nanmedian(f32[12, 24]) : f32[]
aten._pdist_forward(f32[4, 6], 2.0) : f32[6]
aten._pdist_backward(f32[6], f32[4, 6], 2.0, f32[6]) : f32[4, 6]
aten.cummax(f32[12, 24], 1) : f32[12, 24], i64[12, 24]
aten.cummin(f32[12, 24], 0) : f32[12, 24], i64[12, 24]
aten.nanmedian.dim(f32[12, 24], 1) : f32[12], i64[12]
aten.mode(f32[12, 24], 1) : f32[12], i64[12]
aten.sort.stable(f32[12, 24], stable=true, dim=1) : f32[12, 24], i64[12, 24]
aten.scatter_reduce.two(f32[12, 24], 1, i64[12, 12], f32[12, 12], "amax") : f32[12, 24]
embedding(f32[24, 36], i64[12, 24]) : f32[12, 24, 36]
embedding_backward(f32[12, 24, 36], i64[12, 24]) : f32[24, 36]
gather(f32[12, 24], i64[12, 12], dim=1) : f32[12, 12]
gather(f32[24, 24], i64[12, 12], dim=1) : f32[12, 12]
gather(bool[12, 24], i64[12, 12], dim=1) : bool[12, 12]
scatter_add(f32[12, 24], i64[12, 12], f32[12, 12], dim=1) : f32[12, 24]
scatter_add(f32[24, 24], i64[12, 12], f32[12, 12], dim=0) : f32[24, 24]
aten.index.Tensor(f32[12, 24, 36], [none, i64[12]]) : f32[12, 12, 36]
aten.index.Tensor(f32[12, 24, 36], [i64[12, 1], i64[24]]) : f32[12, 24, 36]
aten.index_select(f32[12, 24, 36], 1, i64[12]) : f32[12, 12, 36]
aten.index_put(f32[12, 24, 36], [none, i64[12]], f32[12, 12, 36], true) : f32[12, 24, 36]
aten.index_put(f32[24, 36], [i64[12]], f32[12, 36], false) : f32[24, 36]
aten.scatter.src(f32[12, 24], 1, i64[12, 12], f32[12, 12]) : f32[12, 24]
aten.scatter.value(f32[12, 24], -1, i64[12, 12], 0.5) : f32[12, 24]
routed_mm(f32[24, 36], f32[12, 36, 48], i64[24]) : f32[24, 48]
routed_outer(f32[24, 36], f32[24, 48], i64[24]) : f32[12, 36, 48]
paged_attention(f32[6, 24, 8], f32[6, 24, 8], f32[6, 24, 4], layer=0, scale=0.3, window=0, softcap=0.0) : f32[6, 24, 4]
paged_attention(f32[6, 144, 8], f32[6, 12, 8], f32[6, 12, 8], f32[144], layer=1, scale=0.3, window=3, softcap=2.0) : f32[6, 144, 8]
sdpa(f32[12, 24, 4, 8], f32[12, 24, 6, 8], f32[12, 24, 6, 8], none, causal=false, scale=0.3) : f32[12, 24, 4, 8], f32[12, 24, 4]
sdpa(f32[12, 144, 4, 8], f32[12, 12, 4, 8], f32[12, 12, 4, 8], none, causal=true, scale=0.3) : f32[12, 144, 4, 8], f32[12, 144, 4]
sdpa(f32[12, 24, 4, 8], f32[12, 24, 6, 8], f32[12, 24, 6, 8], f32[12, 1, 4, 6], causal=false, scale=0.3) : f32[12, 24, 4, 8], f32[12, 24, 4]
sdpa_backward(f32[12, 24, 4, 8], f32[12, 24, 4, 8], f32[12, 24, 6, 8], f32[12, 24, 6, 8], none, f32[12, 24, 4, 8], f32[12, 24, 4], causal=false, scale=0.3) : f32[12, 24, 4, 8], f32[12, 24, 6, 8], f32[12, 24, 6, 8]
sdpa_backward(f32[12, 144, 4, 8], f32[12, 144, 4, 8], f32[12, 12, 4, 8], f32[12, 12, 4, 8], none, f32[12, 144, 4, 8], f32[12, 144, 4], causal=true, scale=0.3) : f32[12, 144, 4, 8], f32[12, 12, 4, 8], f32[12, 12, 4, 8]
sdpa_backward(f32[12, 24, 4, 8], f32[12, 24, 4, 8], f32[12, 24, 6, 8], f32[12, 24, 6, 8], bool[1, 24, 4, 6], f32[12, 24, 4, 8], f32[12, 24, 4], causal=false, scale=0.3) : f32[12, 24, 4, 8], f32[12, 24, 6, 8], f32[12, 24, 6, 8]
""".strip().splitlines()

_TYPE = re.compile(r"\b(f64|f32|bf16|i64|i32|bool|c128)\[[\d, ]*\]")


@lru_cache(maxsize=4096)
def example(text: str) -> tuple[Op, tuple[Type, ...]]:
    """The op and its operand types."""
    call, _, results = text.rpartition(" : ")
    inputs: list[str] = []

    def name(m: re.Match[str]) -> str:
        inputs.append(f'%x{len(inputs)} : {m.group(0)} batch "x{len(inputs)}"')
        return f"%x{len(inputs) - 1}"

    call = _TYPE.sub(name, call)
    left = ", ".join(f"%y{i}" for i in range(len(_TYPE.findall(results))))
    p = parse("\n".join(["program example mesh() facts()", *inputs, f'{left} = {call} : {results} {{phase="forward"}}', 'return %y0 output "y"']))
    return p.ops[0], tuple(i.type for i in p.inputs)


INTEGER = re.compile(r"aten\.(bitwise|__|gcd|lcm)")
SHAPES = ([[12, 24], [24], [12, 1]], [[12, 24]] * 3, [[12, 24], [], []])


def pointwise_examples(target: str) -> list[str]:
    """Examples made from the op's schema: broadcast operands, equal ones, and a 0-d second operand where the op runs on them."""
    return [text for shapes in SHAPES for text in [_pointwise(target, shapes)] if text is not None] if target in POINTWISE else []


def _pointwise(target: str, shapes: list[list[int]]) -> str | None:
    function: Any = overload(target)
    integer = bool(INTEGER.match(target))
    values: list[Any] = []
    words: list[str] = []
    tensors = 0
    for a in function._schema.arguments:
        kind = str(a.type)
        if a.kwarg_only:
            continue
        if kind in ("Tensor", "Optional[Tensor]"):
            boolean = (target.startswith("aten.where") and tensors == 0) or (target in ("aten.masked_fill.Scalar", "aten.native_dropout_backward") and tensors == 1)
            shape = shapes[tensors]
            x = torch.rand(shape, dtype=torch.float64) * 0.5 + 0.25
            values.append(x > 0.5 if boolean else (x * 8).long() if integer else x)
            words.append(f"{dtype_name(values[-1].dtype)}{shape}")
            tensors += 1
        else:
            scalar = a.default_value if a.has_default_value() and a.name not in ("min", "max") else {"int": 1, "bool": False, "Optional[int]": None}.get(kind, 1 if integer else 0.7)
            values.append(scalar)
            words.append({None: "none", True: "true", False: "false"}[scalar] if scalar is None or isinstance(scalar, bool) else f'"{scalar}"' if isinstance(scalar, str) else repr(scalar))
    keywords = {a.name: "floor" for a in function._schema.arguments if a.name == "rounding_mode"}
    keywords |= {"decimals": 1} if target == "aten.round.decimals" else {}
    try:
        out = function(*values, **keywords)
    except (RuntimeError, TypeError):
        return None
    words += [f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in keywords.items()]
    results = [out] if isinstance(out, torch.Tensor) else list(out)
    if any(list(r.shape) != [12, 24] for r in results):
        return None
    return f"{target}({', '.join(words)}) : " + ", ".join(f"{dtype_name(r.dtype)}{list(r.shape)}" for r in results)
