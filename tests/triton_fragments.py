"""Fragments of real programs: the ops between matmuls of Llama, GPT-2, BERT, T5 and ViT, forward and backward, and Llama's AdamW update.

They were cut from captured steps of small models (``tests/data/fragments.txt``): runs of ops that stand side by side, with sizes that tell dimensions apart, so
that ``resized`` can give them others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deepseed.codegen.kernels import Kernel, function
from deepseed.codegen.python import generate
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.rules.strides import contiguous, laid_out
from deepseed.runtime.executable import Executable
from deepseed.runtime.host import SimulatedHost

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "i32": torch.int32, "bool": torch.bool}
POSITIVE = ("aten.sqrt", "aten.rsqrt", "aten.log")


@cache
def fragments() -> dict[str, str]:
    texts = re.split(r"^(?=program )", (Path(__file__).parent / "data" / "fragments.txt").read_text(), flags=re.M)
    return {text.split()[1]: text for text in texts if text.strip()}


def resized(text: str, rows: int = 3, tokens: int = 7, head: int = 10, inner: int = 44, words: int = 52) -> Program:
    """A fragment with other sizes: of the batch, the sequence, a head (4 of them are the width), the mlp, the vocabulary."""
    new = {3: rows, 7: tokens, 21: rows * tokens, 12: 4 * rows, 6: 2 * rows, 8: tokens + 1, 40: 4 * head, 20: 2 * head, 10: head, 5: head // 2, 44: inner, 52: words, 120: 12 * head, 80: 8 * head}

    def sizes(m: re.Match[str]) -> str:
        return m.group(1) + re.sub(r"\d+", lambda n: str(new.get(int(n.group()), int(n.group()))), m.group(2)) + "]"

    text = re.sub(r"((?:f32|f64|i64|bool|bf16)\[)([\d, ]*)\]", sizes, text)
    text = re.sub(r"start=(5|10|40|80)\b", lambda m: f"start={new[int(m.group(1))]}", text)
    return parse(re.sub(r"(aten\.div\.\w+\(%\w+, )40\)", rf"\g<1>{4 * head})", text))


def retyped(p: Program, dtype: str) -> Program:
    return parse(str(p).replace("f32", dtype))


def as_kernel(p: Program, name: str, strides: Sequence[tuple[int, ...]] | None = None) -> Kernel:
    """A fragment on operands that lie in order, or as ``strides`` say."""
    given = tuple(strides or [contiguous(i.type.shape) for i in p.inputs])
    lying, views = laid_out(p, dict(zip([i.name for i in p.inputs], given, strict=True)))
    return Kernel(name, p, given, function(p, name), tuple((tuple(lying[r] for r in op.results), view) for op, view in zip(p.ops, views, strict=True)))


def random_inputs(p: Program, seed: int = 0, strided: bool = False) -> list[Tensor]:
    """``strided``: of a larger tensor, and transposed where there are two dimensions."""
    g = torch.Generator().manual_seed(seed)
    positive = any(op.target in POSITIVE for op in p.ops)
    out: list[Tensor] = []
    for n, i in enumerate(p.inputs):
        shape, dtype = i.type.shape, DTYPES[i.type.dtype]
        if strided and shape:
            shape = (*shape[:-1], 2 * shape[-1])
        if dtype.is_floating_point:
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            x = (x.abs() + 0.5 if positive else x).to(dtype)
        else:
            x = torch.randint(0, 2, shape, generator=g).to(dtype)
        if strided and shape:
            x = x[..., ::2]
            if len(shape) > 1 and n % 2:
                x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        out.append(x)
    return out


def reference(p: Program, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return SimulatedHost(Mesh()).run([Executable(generate(p))], [[x.clone() for x in inputs]])[0]
