"""No op's numbers depend on how its operands lie in memory: every example of every rule, whole, with operands that are windows of larger tensors or transposed."""

from __future__ import annotations

import pytest
import torch
from rule_examples import EXAMPLES, example, pointwise_examples
from test_group_kernels import FUSED_EXAMPLES
from test_rules import double
from torch import Tensor

from deepseed.check.instances import _drawn, unequal
from deepseed.check.shrink import Instance
from deepseed.ir.kernels import CONTIGUOUS
from deepseed.ir.mesh import Mesh
from deepseed.ops import run
from deepseed.rules.pointwise import POINTWISE

TEXTS = [*EXAMPLES, *(e for target in sorted(POINTWISE) for e in pointwise_examples(target)), *FUSED_EXAMPLES]


def window(t: Tensor) -> Tensor:
    """The same values inside of a tensor that is larger on every side."""
    around = torch.ones([n + 2 for n in t.shape], dtype=t.dtype)
    inside = around[tuple(slice(1, n + 1) for n in t.shape)]
    return inside.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The same values, the last dimension slowest."""
    return torch.empty([*reversed(t.shape)], dtype=t.dtype).permute(*reversed(range(t.dim()))).copy_(t)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("lay", [window, transposed])
def test_operands_may_lie_anyhow(part: int, lay: object) -> None:
    assert callable(lay)
    wrong = []
    for text in TEXTS[part::4]:
        op, operands = double(*example(text))
        given, want = _drawn(Instance(op, operands, Mesh()))
        got = run(op, [lay(t) if t.dim() else t for t in given], Mesh())
        wrong += [f"{text}: {why}" for a, b in zip(got, want, strict=False) if (why := unequal(a, b, "so", "contiguous")) is not None]
    assert not wrong, wrong


def test_the_table_names_examples() -> None:
    """An op whose kernel reads raw memory is among those that are tried."""
    assert set(CONTIGUOUS) <= {text.partition("(")[0] for text in TEXTS}
