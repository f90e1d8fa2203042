"""Weights in eight bits: each matrix that products read becomes whole numbers (or 8-bit floats) and one scale an output channel. Activations stay as they are.

    captured, state, report = quantized(captured, state, "int8")

A pass over the captured forward. Which weights: those of two dimensions that products read, and nothing but products and lookups (a tied table is both), all with the same dimension
for channels.
No name of a module is looked at. ``int8`` is symmetric, round(w / s) with s = max|w| / 127; ``fp8`` is float8_e4m3fn of w / s with s = max|w| / 448.

The product of int8 has torch's own kernel for CPUs, which takes bfloat16 activations: on any path a row's activations are rounded to bfloat16, sums are float32, and the result is
rounded once more. fp8 has no such kernel: its matrix is made whole again a few channels at a time, in the activations' own precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseed.inference.capture import CapturedForward
from deepseed.inference.errors import InferenceError

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
FEW = 32  # rows for which torch's kernel is the fastest
VECTOR = 16  # elements of a row that torch's kernel of int8 takes at a time
AT_A_TIME = 1 << 18  # elements of a matrix that are whole at a time
_ATEN = torch.ops.aten
# op: (argument that is the matrix, of the input, of the bias; dimension of the matrix that is the output's channels)
_PRODUCTS: dict[Any, tuple[int, int, int | None, int]] = {_ATEN.linear.default: (1, 0, 2, 0), _ATEN.mm.default: (1, 0, None, 1), _ATEN.addmm.default: (2, 1, 0, 1)}
_LOOKUP = _ATEN.embedding.default


@dataclass(frozen=True)
class Error:
    """What one matrix lost. ``relative``: the error's norm over the matrix's; ``largest``: of an element, over the matrix's largest."""

    name: str
    shape: tuple[int, ...]
    relative: float
    largest: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    kind: str
    errors: tuple[Error, ...]
    relative: float  # of all matrices together
    kept: int  # bytes of what stays as it is

    @property
    def bytes_before(self) -> int:
        return self.kept + sum(e.bytes_before for e in self.errors)

    @property
    def bytes_after(self) -> int:
        return self.kept + sum(e.bytes_after for e in self.errors)

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda e: e.relative)
        return (
            f"{self.kind}: {len(self.errors)} matrices, {self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB of weights; "
            f"relative error {self.relative:.2%} in all, {worst.relative:.2%} at most ({worst.name})"
        )

    def table(self) -> str:
        return "\n".join([f"{e.relative:8.3%} {e.largest:8.3%}  {e.name} {list(e.shape)}" for e in self.errors] + [str(self)])


def quantized(captured: CapturedForward, state: Mapping[str, Tensor], kind: str) -> tuple[CapturedForward, dict[str, Tensor], Report]:
    """The same forward on the same weights in eight bits. ``state`` itself stays."""
    if kind not in KINDS:
        raise InferenceError(f"quantize={kind!r} is unknown\n  fix: one of {', '.join(KINDS)}")
    graph = copy.deepcopy(captured.graph.graph)
    inputs = dict(zip(captured.names, (n for n in graph.nodes if n.op == "placeholder"), strict=False))
    alike: dict[int, list[str]] = {}  # names of one tensor
    for name in captured.names:
        if name in state:
            alike.setdefault(id(state[name]), []).append(name)
    made, scales, errors = dict(state), dict[str, Tensor](), list[Error]()
    for names in alike.values():
        nodes = [inputs[n] for n in names]
        channels = _channels(nodes)
        if channels is None or state[names[0]].dim() != 2:
            continue
        weight = state[names[0]].detach().movedim(channels, 0).contiguous()
        whole, scale = eight_bits(weight, kind)
        errors.append(_error(names[0], weight, whole, scale))
        for name, node in zip(names, nodes, strict=True):
            made[name], scales[f"{name}.scale"] = whole, scale
            with graph.inserting_after(node):
                given = graph.placeholder(f"{node.name}_scale")
            given.meta = {"val": None}
            for user in list(node.users):
                with graph.inserting_before(user):
                    new = graph.call_function(*_kernel(kind, user, node, given))
                new.meta = dict(user.meta)
                user.replace_all_uses_with(new)
                graph.erase_node(user)
    if not errors:
        raise InferenceError("no weight is read by products alone, so none can be stored in eight bits\n  fix: leave quantize out")
    names_now = tuple(n for name in captured.names for n in ((name, f"{name}.scale") if f"{name}.scale" in scales else (name,)))
    kept = {id(x): x for n, x in made.items() if n in captured.names and f"{n}.scale" not in scales}
    lost = sum((e.relative * float(state[e.name].detach().float().norm())) ** 2 for e in errors)
    all_of = sum(float(state[e.name].detach().float().norm()) ** 2 for e in errors)
    report = Report(kind, tuple(errors), (lost / all_of) ** 0.5 if all_of else 0.0, sum(x.numel() * x.element_size() for x in kept.values()))
    return replace(captured, graph=torch.fx.GraphModule(torch.nn.Module(), graph), names=names_now), made | scales, report


def eight_bits(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[channels, width] -> the same in eight bits, and [channels] scales in the weight's precision. What they mean: ``whole``."""
    dtype, top = KINDS[kind]
    wide = weight.float()
    scale = (wide.abs().amax(1) / top).to(weight.dtype).float()
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = wide / scale[:, None]
    return (scaled.round().clamp(-127, 127) if dtype is torch.int8 else scaled.clamp(-top, top)).to(dtype), scale.to(weight.dtype)


def whole(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.to(scale.dtype) * scale[:, None]


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).bfloat16()
    if rows.shape[0] <= FEW and x.device.type == "cpu" and rows.shape[1] % VECTOR == 0:  # torch's kernel reads past rows of other widths
        out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight, scale.bfloat16())
    else:
        out = _in_parts(rows.float(), weight, lambda part: part.float()).mul_(scale.bfloat16()).bfloat16()
    out = out.to(x.dtype).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _in_parts(x.reshape(-1, x.shape[-1]), weight, lambda part: _from_fp8(part, x.dtype)).mul_(scale * 256).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def int8_rows(weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """``embedding`` of a table in eight bits."""
    return F.embedding(ids, weight).to(scale.dtype) * F.embedding(ids, scale[:, None])


def fp8_rows(weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    rows: Tensor = F.embedding(ids, weight.view(torch.int8)).view(weight.dtype)
    return rows.to(scale.dtype) * F.embedding(ids, scale[:, None])


def _kernel(kind: str, user: torch.fx.Node, weight: torch.fx.Node, scale: torch.fx.Node) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    if user.target is _LOOKUP:
        return (int8_rows if kind == "int8" else fp8_rows), (weight, scale, user.args[1])
    _, x, bias, _ = _PRODUCTS[user.target]
    return (int8_linear if kind == "int8" else fp8_linear), (user.args[x], weight, scale, user.args[bias] if bias is not None and bias < len(user.args) else None)


def _in_parts(x: Tensor, weight: Tensor, made_whole: Callable[[Tensor], Tensor]) -> Tensor:
    channels, width = weight.shape
    out = x.new_empty(x.shape[0], channels)
    each = max(1, AT_A_TIME // width)
    for begin in range(0, channels, each):
        out[:, begin : begin + each] = x @ made_whole(weight[begin : begin + each]).t()
    return out


def _from_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x / 256, by bits: sign, exponent and mantissa of an e4m3 lie in a float16 as they are, whose exponents begin 8 lower. Ten times faster than torch's own conversion."""
    bits: Tensor = (x.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).to(dtype)


def _channels(nodes: list[torch.fx.Node]) -> int | None:
    """The dimension of the output's channels, where some product reads the matrix and nothing but products and lookups does, each as its matrix alone."""
    users = [(node, user) for node in nodes for user in node.users]
    dims = set[int]()
    for node, user in users:
        at, dim = (0, 0) if user.target is _LOOKUP else (_PRODUCTS[user.target][0], _PRODUCTS[user.target][3]) if user.target in _PRODUCTS else (None, 0)
        if at is None or [n for n, a in enumerate(user.args) if a is node] != [at] or user.kwargs:
            return None
        dims.add(dim)
    return dims.pop() if len(dims) == 1 and any(u.target is not _LOOKUP for _, u in users) else None


def _error(name: str, weight: Tensor, stored: Tensor, scale: Tensor) -> Error:
    lost = weight.float() - whole(stored, scale.float())
    norm, largest = float(weight.float().norm()) or 1.0, float(weight.abs().max()) or 1.0
    before, after = weight.numel() * weight.element_size(), stored.numel() + scale.numel() * scale.element_size()
    return Error(name, tuple(weight.shape), float(lost.norm()) / norm, float(lost.abs().max()) / largest, before, after)
