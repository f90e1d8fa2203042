"""A bucket brings what its members would have brought one by one, for every kind of collective and on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepseed.ir.mesh import Mesh
from deepseed.runtime.simulate import simulate

# of each tensor: shape of a rank's part, where it is cut, where it is joined: (dim, outer)
MEMBERS = [((8, 4), (0, 1), (1, 1)), ((16, 12), (1, 3), (0, 2)), ((4,), (0, 1), (0, 1)), ((2, 8, 3), (1, 2), (2, 1)), ((1, 4, 1), (1, 1), (0, 1))]


def alone(rt: Any, kind: str, x: Tensor, take: tuple[int, int], put: tuple[int, int], reduce: str) -> Tensor:
    start = {
        "all_gather": lambda: rt.all_gather_start(x, "a", put),
        "all_reduce": lambda: rt.all_reduce_start(x, "a", reduce),
        "reduce_scatter": lambda: rt.reduce_scatter_start(x, "a", take, reduce),
        "all_to_all": lambda: rt.all_to_all_start(x, "a", take, put),
    }[kind]
    out: Tensor = rt.wait(start())
    return out


def together(rt: Any, kind: str, xs: list[Tensor], reduce: str) -> list[Tensor]:
    take = [m[1] for m in MEMBERS] if kind in ("reduce_scatter", "all_to_all") else []
    put = [m[2] for m in MEMBERS] if kind in ("all_gather", "all_to_all") else []
    return [rt.wait(handle) for handle in rt.bucket_start(kind, xs, "a", take=take, put=put, reduce=reduce)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    ("kind", "reduce"), [("all_gather", "sum"), ("all_reduce", "sum"), ("all_reduce", "max"), ("reduce_scatter", "sum"), ("reduce_scatter", "max"), ("all_to_all", "sum")]
)
def test_a_bucket_is_its_members(kind: str, reduce: str, n: int) -> None:
    def step(rt: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        whole = together(rt, kind, inputs, reduce)
        single = [alone(rt, kind, x, take, put, reduce) for x, (_, take, put) in zip(inputs, MEMBERS, strict=True)]
        return (*whole, *single)

    members = [(tuple(s * n if d == take[0] else s for d, s in enumerate(shape)), take, put) for shape, take, put in MEMBERS]
    given = [[torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * rank + i)) for i, (shape, _, _) in enumerate(members)] for rank in range(n)]
    for results in simulate(Mesh((("a", n),)), [step] * n, given):
        for one, other in zip(results[: len(MEMBERS)], results[len(MEMBERS) :], strict=True):
            assert torch.equal(one, other)


def test_a_number_beside_what_does_not_lie_in_order() -> None:
    def step(rt: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(rt.wait(handle) for handle in rt.bucket_start("all_reduce", [inputs[0], inputs[1].t()], "a"))

    given = [[torch.tensor(1.0 + rank), torch.arange(6.0).reshape(2, 3) * (rank + 1)] for rank in range(2)]
    for number, turned in simulate(Mesh((("a", 2),)), [step] * 2, given):
        assert number.shape == () and number == 3 and torch.equal(turned, (torch.arange(6.0).reshape(2, 3) * 3).t())
