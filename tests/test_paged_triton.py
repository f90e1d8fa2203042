"""Paged attention in Triton: in the interpreter it computes what the reference says, and it compiles for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import torch
from test_paged_attention import Case
from triton_worker import Interpreter

from deepseed.codegen.triton_paged import Attention, source, writes
from deepseed.inference.attention import Packing
from deepseed.inference.paged import reference, write

pytestmark = needs.triton
DECODES, CHUNKS, MIXED = [(0, 1), (5, 1), (70, 1), (129, 1)], [(0, 9), (6, 20), (60, 7)], [(3, 1), (0, 33), (66, 1), (17, 2)]


@pytest.mark.parametrize(
    ("sizes", "block", "kv", "share", "width", "value_width", "window", "softcap", "sinks"),
    [
        (DECODES, 16, 2, 1, 16, 16, 0, 0.0, False), (DECODES, 4, 2, 3, 8, 8, 0, 0.0, False), (CHUNKS, 16, 2, 2, 16, 16, 0, 0.0, False), (MIXED, 8, 1, 4, 16, 16, 0, 0.0, False),
        (DECODES, 16, 1, 2, 16, 16, 8, 0.0, False), (MIXED, 16, 1, 3, 16, 16, 5, 0.0, False), (MIXED, 7, 1, 2, 16, 16, 0, 2.0, False), (DECODES, 16, 2, 2, 16, 16, 0, 0.0, True),
        (MIXED, 16, 1, 2, 16, 16, 9, 3.0, True), (MIXED, 16, 2, 1, 24, 12, 0, 0.0, False), (DECODES, 1, 1, 1, 5, 3, 1, 0.0, True), (CHUNKS, 16, 1, 20, 16, 16, 0, 0.0, False),
    ],
)  # fmt: skip
def test_the_kernel_is_the_reference(
    interpreter: Interpreter, sizes: list[tuple[int, int]], block: int, kv: int, share: int, width: int, value_width: int, window: int, softcap: float, sinks: bool
) -> None:  # fmt: skip
    case = Case(sizes, block, kv, share, width, value_width, torch.float32)
    exact = Case(sizes, block, kv, share, width, value_width)
    packing = Packing(case.tables, case.lengths, case.news, block, case.slots, torch.device("cpu"))
    table, lengths, starts = packing.tensors
    want = reference(exact.q, exact.k, exact.v, exact.keys, exact.values, table, case.slots, lengths, starts, 0.3, window, softcap, exact.sinks if sinks else None)
    kind = Attention(share, width, value_width, block, 0.3, window, softcap, sinks)
    tokens = kind.tokens(max(case.news))
    assert tokens == 1 or max(case.news) > 1
    (got,), _ = interpreter.run(source(kind, tokens), [case.q, exact.keys.float(), exact.values.float(), table, lengths, starts, packing.tiles(tokens), case.sinks])
    assert (got.double() - want).abs().max() < 2e-6  # float32, sums of up to 130 terms of about 1


@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (24, 5)])
def test_new_keys_and_values_go_into_their_pages(interpreter: Interpreter, width: int, value_width: int) -> None:
    """As ``write`` has it; of views, whose heads lie anyhow."""
    torch.manual_seed(0)
    k, v = torch.randn(3, 37, width).transpose(0, 1), torch.randn(37, value_width, 3).transpose(1, 2)
    keys, values = torch.zeros(3, 6, 8, width), torch.zeros(3, 6, 8, value_width)
    slots = torch.randperm(48)[:37]
    write(k, v, keys, values, slots)
    kind, got = Attention(2, width, value_width, 8, 0.3), [torch.zeros_like(keys), torch.zeros_like(values)]
    held, traffic = interpreter.run(writes(kind).replace("return ()", "return keys, values"), [k, v, *got, slots])
    assert traffic.launches == 1 and torch.equal(held[0], keys) and torch.equal(held[1], values)


def test_tiles_cover_each_new_token_once() -> None:
    packing = Packing([[0]] * 4, [9, 5, 1, 33], [9, 1, 1, 16], 64, torch.zeros(27, dtype=torch.long), torch.device("cpu"))
    found = [(int(s), int(first) + n) for s, first in packing.tiles(4) for n in range(4) if int(first) + n < packing.news[int(s)]]
    assert found == [(s, n) for s, new in enumerate(packing.news) for n in range(new)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.turn
def test_it_compiles_for_gpus(tmp_path: Path, target: str) -> None:
    """Decodes and chunks, in bfloat16 on matrix units, with what a model may ask; nothing spills."""
    code = f"""
from pathlib import Path
from deepseed.codegen.ahead_of_time import compiled
from deepseed.codegen.triton_paged import Attention, source, writes
for kind, tokens in ((Attention(4, 128, 128, 16, 0.1, dtype="bf16"), 1), (Attention(4, 128, 128, 16, 0.1, dtype="bf16"), 16), (Attention(3, 64, 64, 16, 0.1, 128, 30.0, True, "f16"), 1), (Attention(1, 192, 128, 16, 0.1, dtype="bf16"), 16)):
    (made,) = compiled(source(kind, tokens), {target!r}, Path({str(tmp_path)!r}))
    assert not any(c.spilled for c in compiled(writes(kind), {target!r}, Path({str(tmp_path)!r})))
    text = made.assembly.read_text()
    print(made.spilled, made.shared, any(word in text for word in ("mma.sync", "wgmma", "v_mfma")))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 4 and all(spilled == "0" and matrix == "True" for spilled, _, matrix in rows), rows
    assert all(int(shared) <= {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}[target] for _, shared, _ in rows), rows
