"""One rank of the tests of exchanges within a host's memory (test_attach.py)."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseed.ir.mesh import Mesh
from deepseed.runtime import attach, neighbours
from deepseed.runtime.distributed import DistributedRuntime, guarded, start, stop
from deepseed.runtime.errors import AgreementError
from deepseed.runtime.simulate import simulate

SHAPES = ((8, 4), (0, 3), (7, 5), (1,), (4, 1, 6), (130,), (), (33, 9))
KINDS = (("all_gather", ""), ("all_reduce", "sum"), ("all_reduce", "max"), ("reduce_scatter", "sum"), ("reduce_scatter", "max"), ("all_to_all", ""))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def opened(**constants: int) -> DistributedRuntime:
    torch.set_num_threads(1)
    for name, value in constants.items():
        setattr(attach, name, value)
    start("gloo", timeout=60.0)
    return DistributedRuntime(Mesh((("dp", dist.get_world_size()),)), timeout=20.0)


def small_pieces() -> dict[str, int]:
    """So that every loop turns more than once."""
    return {"PIECE": 64, "VECTORS": 3, "LONGEST": 96, "ALONE": 0, "FEW": 2}


def members(seed: int, n: int, rank: int, kind: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Any], list[Any]]:
    """Tensors of a bucket, lying as they happen to, and the places where they are cut and joined: even ones and uneven ones."""
    draw = random.Random(seed)
    xs, take, put = [], [], []
    for k in range(draw.randint(1, 6)):
        shape = list(draw.choice(SHAPES if kind == "all_reduce" else SHAPES[:-2]))
        turned = len(shape) == 2 and draw.random() < 0.4
        whole = torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(1000 * seed + 10 * k + rank)).to(dtype) + rank
        x = whole.t().contiguous().t() if turned else whole
        if kind in ("reduce_scatter", "all_to_all"):
            d = draw.randrange(len(shape))
            x = torch.cat([x] * n, d) if draw.random() < 0.6 else x  # divides, or (perhaps) not
            take.append((d, 1, x.shape[d], 1) if x.shape[d] % n else (d, 1))
        if kind in ("all_gather", "all_to_all"):
            put.append((draw.randrange(len(shape)), 1))
        if kind == "all_to_all" and len(take[-1]) > 2:  # what is joined must lie elsewhere
            x = torch.cat([x] * n, take[-1][0])
            take[-1] = (take[-1][0], 1)
        xs.append(x)
    return xs, take, put


def together(rt: Any, seed: int, kind: str, reduce: str, dtype: torch.dtype) -> list[Tensor]:
    xs, take, put = members(seed, rt.mesh.ranks, rt.rank, kind, dtype)
    handles = rt.bucket_start(kind, xs, "dp", take, put, reduce)
    order = random.Random(-seed).sample(range(len(xs)), len(xs))
    found = {k: rt.wait(handles[k]) for k in order}
    for x in xs:  # nobody reads them any more
        x.fill_(99)
    return [found[k] for k in range(len(xs))]


def buckets(seeds: range, few: bool) -> list[str]:
    """Every kind in every dtype, beside what the simulation gives; what differs."""
    rt, n, wrong = opened(**small_pieces() if few else {}), dist.get_world_size(), []
    assert rt._links, "the ranks do not read each other's memory"
    cases = [(seed, kind, reduce, DTYPES[seed % len(DTYPES)]) for seed in seeds for kind, reduce in KINDS]
    with guarded(rt):
        got = [together(rt, *case) for case in cases]
    expected = simulate(rt.mesh, [lambda r, _: tuple(t for case in cases for t in together(r, *case))] * n, [[] for _ in range(n)])[rt.rank]
    flat = [(case, t) for case, each in zip(cases, got, strict=True) for t in each]
    for (case, a), b in zip(flat, expected, strict=True):
        if a.dtype != b.dtype or not torch.equal(a, b):
            wrong.append(f"{case}: {a} for {b}")
    stop()
    return wrong


def into(rounds: int) -> bool:
    """Gathers into memory that is there, of parts that lie in it, which the ranks change at once while others are late."""
    rt = opened(PIECE=1 << 12, LONGEST=1 << 14)
    n, rank, ok = rt.mesh.ranks, rt.rank, True
    whole, other = torch.zeros(n * 4096, 3), torch.zeros(5, n * 2)
    with guarded(rt):
        for k in range(rounds):
            mine = whole.view(n, -1, 3)[rank].fill_(k * n + rank)
            there = torch.full((5, 2), float(k * n + rank))
            handles = rt.bucket_start("all_gather", [mine, there], "dp", put=[(0, 1), (1, 1)])
            time.sleep(0.002 * ((k + rank) % n))
            found = rt.wait_into(handles[0], whole), rt.wait_into(handles[1], other)
            want = k * n + torch.arange(n, dtype=torch.float32)
            ok &= found[0] is whole and torch.equal(whole, want.repeat_interleave(4096)[:, None].expand(-1, 3)) and torch.equal(other, want.repeat_interleave(2).expand(5, -1))
    stop()
    return ok


def late(rounds: int) -> bool:
    """Operands are overwritten right after the own wait, whatever the others do."""
    rt = opened()
    n, ok = rt.mesh.ranks, True
    x = torch.empty(n, 20_000)
    with guarded(rt):
        for k in range(rounds):
            x.fill_(k + rt.rank)
            handle = rt.reduce_scatter_start(x, "dp", (0, 1)) if k % 2 else rt.all_reduce_start(x, "dp")
            time.sleep(0.003 * ((k + rt.rank) % n))
            total = rt.wait(handle)
            x.fill_(-1.0)
            ok &= bool((total == n * k + n * (n - 1) / 2).all())
    stop()
    return ok


def changed(rounds: int) -> bool:
    """A sum of a bucket is changed right after its own wait, while others are late, and another one of the bucket is not waited for yet."""
    rt = opened()
    n, ok = rt.mesh.ranks, True
    with guarded(rt):
        for k in range(rounds):
            handles = rt.bucket_start("all_reduce", [torch.full((20_000,), float(k + rt.rank)) for _ in range(3)], "dp")
            for each, handle in enumerate(handles):
                time.sleep(0.002 * ((k + each + rt.rank) % n))
                total = rt.wait(handle)
                ok &= bool((total == n * k + n * (n - 1) / 2).all())
                total.fill_(-1.0)
    stop()
    return ok


def lazily_conjugated() -> bool:
    rt = opened()
    x = torch.complex(torch.arange(6.0), torch.arange(6.0) + rt.rank)
    with guarded(rt):
        whole = rt.wait(rt.all_gather_start(x.conj(), "dp", (0, 1)))
        (handle,) = rt.bucket_start("all_gather", [x.conj()], "dp", put=[(0, 1)])
        total = rt.wait(rt.all_reduce_start(x.conj(), "dp"))
    want = [torch.complex(torch.arange(6.0), -torch.arange(6.0) - r) for r in range(rt.mesh.ranks)]
    ok = torch.equal(whole, torch.cat(want)) and torch.equal(rt.wait(handle), torch.cat(want)) and torch.equal(total, sum(want[1:], want[0]))
    stop()
    return ok


def many(tensors: int) -> float:
    rt = opened()
    with guarded(rt):
        total = sum(float(rt.wait(h)) for h in rt.bucket_start("all_reduce", [torch.full((), float(rt.rank)) for _ in range(tensors)], "dp"))
    stop()
    return total


def disagree() -> str:
    """Rank 1 brings more."""
    rt = opened()
    try:
        with guarded(rt):
            rt.wait(rt.all_reduce_start(torch.zeros(3 + rt.rank), "dp"))
    except AgreementError as error:
        return str(error)
    return ""


def after_an_error() -> tuple[bool, float]:
    """An error that all ranks have between a start and its wait: what was started is over, and what follows is right."""
    rt = opened()
    for _ in range(2):
        try:
            with guarded(rt):
                for _ in range(1 + rt.rank):  # one at another place
                    rt.all_reduce_start(torch.ones(5), "dp")
                raise AgreementError("all of them")
        except AgreementError:
            pass
    with guarded(rt):
        total = float(rt.wait(rt.all_reduce_start(torch.full((9,), rt.rank + 1.0), "dp"))[0])
    kept = len(rt._links["dp"]._under_way) + len(rt._links["dp"]._heard)
    stop()
    return kept == 0, total


def unwilling(how: str) -> tuple[list[str], float]:
    """One rank will not be read, or may not read."""
    if how == "said" and os.environ["RANK"] == "1":
        os.environ["DEEPSEED_CMA"] = "0"
    if how == "forbidden" and os.environ["RANK"] == "1":

        def forbidden(pid: int, spans: Any) -> None:
            raise OSError(1, "Operation not permitted")

        neighbours.read = forbidden
    rt = opened()
    with guarded(rt):
        total = float(rt.wait(rt.all_reduce_start(torch.full((9,), rt.rank + 1.0), "dp"))[0])
    found = list(rt._links)
    stop()
    return found, total
