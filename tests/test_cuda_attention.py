"""Attention as CUDA traces it (flash, efficient, cudnn) becomes ``sdpa`` and ``sdpa_backward``: hand-written graphs of the kernels,
evaluated on the CPU in float64 against plain matrix products, and whole captures of a model that calls the kernels itself."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseed.capture import CaptureError, capture
from deepseed.capture.batch import type_of
from deepseed.capture.convert import Emitter, convert
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Output, Program, Ref
from deepseed.ir.verify import verify
from deepseed.ops import evaluate

aten = torch.ops.aten
KERNELS = ("flash", "efficient", "cudnn")
B, H, S, D = 2, 3, 16, 8


def math_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """softmax(q k^T scale + bias) v, row by row what the kernels compute."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1) @ v


class Graph:
    """A graph in the making, each node with the fake value that the kernel's own shape function gives."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()

    def input(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=torch.float64)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **fx.node.map_arg(kwargs, lambda n: n.meta["val"]))
        return node

    def get(self, node: fx.Node, n: int) -> fx.Node:
        return self.call(operator.getitem, node, n)


def attention_graph(
    kernel: str, bias: bool, causal: bool, scale: float | None, queries: int = S, kv_heads: int = H, dropout: float = 0.0, bias_grad: bool = False
) -> tuple[Graph, list[fx.Node]]:
    """q, k, v, (bias), grad -> out, dq, dk, dv, as autograd leaves it on a CUDA device."""
    g = Graph()
    q, k, v = g.input("q", (B, H, queries, D)), g.input("k", (B, kv_heads, S, D)), g.input("v", (B, kv_heads, S, D))
    b = g.input("bias", (B, 1, queries, S)) if bias else None
    grad = g.input("grad", (B, H, queries, D))
    if b is not None:
        b = g.call(aten.expand.default, b, [B, H, queries, S])
    if kernel == "flash":
        forward = g.call(aten._scaled_dot_product_flash_attention.default, q, k, v, dropout, causal, scale=scale)
        out, lse, cq, ck, mq, mk, seed, offset = (g.get(forward, n) for n in range(8))
        back = g.call(
            aten._scaled_dot_product_flash_attention_backward.default, grad, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, seed, offset, scale=scale
        )
    elif kernel == "efficient":
        forward = g.call(aten._scaled_dot_product_efficient_attention.default, q, k, v, b, True, dropout, causal, scale=scale)
        out, lse, seed, offset = (g.get(forward, n) for n in range(4))
        back = g.call(
            aten._scaled_dot_product_efficient_attention_backward.default,
            grad, q, k, v, b, out, lse, seed, offset, dropout, [True, True, True, bias_grad], causal, scale=scale,
        )  # fmt: skip
    else:
        forward = g.call(aten._scaled_dot_product_cudnn_attention.default, q, k, v, b, True, dropout, causal, False, scale=scale)
        out, lse, cq, ck, mq, mk, seed, offset = (g.get(forward, n) for n in range(8))
        back = g.call(
            aten._scaled_dot_product_cudnn_attention_backward.default,
            grad, q, k, v, out, lse, seed, offset, b, cq, ck, mq, mk, dropout, causal, scale=scale,
        )  # fmt: skip
    return g, [out, *(g.get(back, n) for n in range(3))]


def converted(g: Graph, outputs: list[fx.Node]) -> Program:
    e = Emitter()
    inputs = [e.input(type_of(n.meta["val"]), "batch", n.name) for n in g.graph.nodes if n.op == "placeholder"]
    values = convert(g.graph, inputs, outputs, e)
    assert all(isinstance(v, Ref) for v in values)
    returned = tuple(Output(v, "output", str(n)) for n, v in enumerate(values) if isinstance(v, Ref))
    return verify(Program("attention", Mesh(()), tuple(e.inputs), tuple(e.ops), returned))


CASES = [
    (kernel, bias, causal, scale)
    for kernel in KERNELS for bias in (False, True) for causal in (False, True) for scale in (None, 0.3)
    if not (bias and (kernel == "flash" or causal))
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "bias", "causal", "scale"), CASES)
def test_a_kernel_means_plain_attention(kernel: str, bias: bool, causal: bool, scale: float | None) -> None:
    g, outputs = attention_graph(kernel, bias, causal, scale)
    p = converted(g, outputs)
    assert [op.target for op in p.ops if op.target.startswith(("sdpa", "aten"))] == ["sdpa", "sdpa_backward"]
    torch.manual_seed(0)
    values = {i.name: torch.randn(i.type.shape, dtype=torch.float64) for i in p.inputs}
    q, k, v = (values[n].clone().requires_grad_() for n in "qkv")
    want = math_attention(q, k, v, values.get("bias"), causal, scale)
    grads = torch.autograd.grad(want, (q, k, v), values["grad"])
    got = evaluate(p, values)
    for o, w in zip(p.outputs, (want, *grads), strict=True):
        torch.testing.assert_close(got[o.ref.name], w.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_fewer_heads_of_keys_stay_fewer(kernel: str) -> None:
    p = converted(*attention_graph(kernel, False, True, None, kv_heads=1))
    (forward,) = (op for op in p.ops if op.target == "sdpa")
    assert p.types[forward.refs[1].name].shape == (B, 1, S, D)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_inside_a_kernel_is_refused(kernel: str) -> None:
    with pytest.raises(CaptureError, match=rf"{kernel}(.|\n)*dropout 0\.1 draws its random numbers inside the kernel(.|\n)*fix: use the math kernel"):
        converted(*attention_graph(kernel, False, False, None, dropout=0.1))


def test_what_the_own_op_does_not_mean_is_refused() -> None:
    with pytest.raises(CaptureError, match="causal, of 4 queries and 16 keys"):
        converted(*attention_graph("flash", False, True, None, queries=4))
    with pytest.raises(CaptureError, match="gradient of its mask"):
        converted(*attention_graph("efficient", True, False, None, bias_grad=True))


class Calls(nn.Module):
    """Calls a kernel by name, as an exported CUDA program does."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel, self.qkv = kernel, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.kernel == "flash":
            out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        elif self.kernel == "efficient":
            out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[0]
        elif self.kernel == "cudnn":
            out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]
        else:
            out = math_attention(q, k, v, None, True, None)
        return out.square().mean()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_whole_capture_of_kernels(kernel: str) -> None:
    torch.manual_seed(0)
    model = Calls(kernel).double()
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    c = capture(model, {"x": x})
    assert {op.target for op in c.program.ops} >= {"sdpa", "sdpa_backward"}
    values = {i.name: x if i.role == "batch" else c.parameters[i.key].detach() for i in c.program.inputs}
    got = evaluate(c.program, values)
    model.kernel = "math"
    loss = model(x)
    loss.backward()
    wanted = {"loss": loss, **{n: p.grad for n, p in model.named_parameters()}}
    for o in c.program.outputs:
        w = wanted[o.key]
        assert w is not None
        torch.testing.assert_close(got[o.ref.name], w.detach(), rtol=1e-11, atol=1e-11)


def test_no_op_names_a_device() -> None:
    """An exported CUDA program makes its tensors on ``cuda``; the captured one makes them where it runs."""

    class Made(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            cuda = torch.device("cuda", 0)
            made = aten.full.default([4], 2.0, dtype=torch.float64, device=cuda) + aten._to_copy.default(input.sum(), device=cuda)
            return (super().forward(input) * made).sum()

    model = Made(3, 4).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    c = capture(model, {"input": x})
    got = evaluate(c.program, {i.name: x if i.role == "batch" else c.parameters[i.key].detach() for i in c.program.inputs})
    want = (nn.Linear.forward(model, x) * (2 + x.sum())).sum()
    torch.testing.assert_close(got[c.program.outputs[0].ref.name], want.detach())
