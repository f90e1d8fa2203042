"""Sizes that the ranks do not divide: rows, heads, vocabularies, widths. Whole programs against eager PyTorch, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from deepseed.ir.layout import Layout, LayoutError, Split, check, chunk, local_indices, local_shape
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type
from deepseed.ir.text import parse
from deepseed.runtime.state import gather, placements, shard, shown
from deepseed.verify import verify

torch.set_num_threads(1)


class Decoder(nn.Module):
    """An embedding, attention of any number of heads, a gated MLP of any width, a norm and a head tied to the embedding or not."""

    def __init__(self, vocab: int, heads: int, dim: int, ffn: int, tied: bool) -> None:
        super().__init__()
        width = heads * dim
        self.heads = heads
        self.embed = nn.Embedding(vocab, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, ffn), nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        rows, tokens, width = x.shape
        q, k, v = (t.view(rows, tokens, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.dropout(self.out(attended))
        x = x + self.down(self.up(x) * functional.silu(self.gate(x)))
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten(), ignore_index=-100)


def case(rows: int, tokens: int, vocab: int, heads: int, dim: int, ffn: int, tied: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Decoder(vocab, heads, dim, ffn, tied).train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (rows, tokens), generator=generator)
    labels = torch.where(torch.rand(rows, tokens, generator=generator) < 0.2, -100, torch.randint(0, vocab, (rows, tokens), generator=generator))
    labels[:, 0] = 1
    return model, {"ids": ids, "labels": labels}


cases = st.builds(
    lambda *args: args, st.integers(1, 7), st.integers(2, 7), st.integers(11, 70), st.integers(1, 6), st.sampled_from((2, 3, 4)), st.integers(3, 33), st.booleans()
)
plans = st.tuples(st.sampled_from(("zero0", "zero1", "zero2", "zero3")), st.integers(1, 5), st.integers(1, 5)).filter(lambda p: 1 < p[1] * p[2] <= 10)


def equal(sizes: Any, plan: tuple[str, int, int]) -> None:
    zero, dp, tp = plan
    model, batch = case(*sizes)
    report = verify(model, batch, f"dp{dp}+{zero}+tp{tp}", steps=2)
    assert report.ok, f"{sizes} under {plan}:\n{report}"


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases, plans)
@pytest.mark.turn
def test_any_size_on_any_ranks(sizes: Any, plan: tuple[str, int, int]) -> None:
    equal(sizes, plan)


@pytest.mark.wide
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases, plans)
def test_two_hundred_sizes_on_any_ranks(sizes: Any, plan: tuple[str, int, int]) -> None:
    equal(sizes, plan)


@pytest.mark.parametrize("tp", [2, 3])
def test_a_vocabulary_of_50257(tp: int) -> None:
    model, batch = case(2, 3, 50257, 2, 2, 5, tied=True)
    report = verify(model, batch, f"tp{tp}", steps=1)
    assert report.ok, report


# layouts --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 9), st.integers(2, 6), st.sampled_from((1, 2, 3)), st.sampled_from((1, 2, 5)), st.data())
def test_parts_are_those_of_torch_chunk(of: int, n: int, outer: int, rest: int, data: st.DataObject) -> None:
    mesh, size = Mesh((("a", n), ("b", 2))), outer * of * rest * 2
    if of < 2 or of % n == 0:
        with pytest.raises(LayoutError):
            check((size,), Layout.of(a=Split(0, outer, of)), mesh)
        return
    layout = Layout.of(a=Split(0, outer, of), **({"b": Split(0, outer * of * rest)} if data.draw(st.booleans()) else {}))
    t = Type("f32", (size,), layout)
    text = f"program p {mesh} facts()\n%x : f32[{size}] batch \"x\"\n"
    p = parse(text)
    p = type(p)(p.name, mesh, (type(p.inputs[0])("x", t, "batch", "x"),), (), ())
    assert parse(str(p)) == p
    x = torch.arange(float(size))
    want = x.view(outer, of, -1).chunk(n, 1)
    parts = []
    for rank in range(mesh.ranks):
        at = mesh.coordinate(rank)
        part = shard(x, t, mesh, at)
        parts.append(part)
        held = local_indices(size, 0, layout, mesh, at)
        assert part.tolist() == [float(i) for i in held]
        assert local_shape((size,), layout, mesh.seen_from(at)) == (len(held),)
        if layout.on("b") is None:
            expect = want[at["a"]].flatten().tolist() if at["a"] < len(want) else []
            assert part.tolist() == expect and len(chunk(of, n, at["a"])) * outer * rest * 2 == len(expect)
    assert torch.equal(gather(parts, t, mesh), x)


def test_dtensor_shows_what_it_can_show() -> None:
    mesh = Mesh((("a", 2),))
    whole, heads = Type("f32", (7, 4), Layout.of(a=Split(0, 1, 7))), Type("f32", (12, 4), Layout.of(a=Split(0, 1, 3)))
    assert shown(whole, mesh) and str(placements(whole, mesh)[0]) == "S(0)"
    assert not shown(heads, mesh)
