"""Ranks agree before they run: one program text, and the same guard values and batch signatures.

Rank 0's text is sent to all, so that every rank runs what one solver decided. Hashes are compared by one small collective.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseed.runtime.errors import AgreementError

Run = Callable[[Callable[[], Any], str], None]  # starts a collective and waits for it: ``World.run``


def plainly(begin: Callable[[], Any], what: str) -> None:
    begin().wait()


def digest(text: str) -> str:
    """sha256, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def broadcast_text(text: str | None, device: torch.device | str = "cpu", run: Run = plainly) -> str:
    """Rank 0's ``text`` on every rank (the others' is ignored)."""
    first = dist.get_rank() == 0
    data = torch.frombuffer(bytearray((text or "").encode()), dtype=torch.uint8) if first and text else torch.zeros(0, dtype=torch.uint8)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    run(lambda: dist.broadcast(length, 0, async_op=True), "a text of rank 0 over all ranks")
    payload = data.to(device) if first else torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        run(lambda: dist.broadcast(payload, 0, async_op=True), "a text of rank 0 over all ranks")
    return bytes(payload.cpu().tolist()).decode()


def agree_on_text(text: str, what: str = "program", device: torch.device | str = "cpu", run: Run = plainly) -> str:
    """``text``, which every rank must hold alike; its sha256.

    Raises AgreementError on every rank where one differs: both hashes and the first line that differs.
    """
    mine = digest(text)
    if not _differs(mine, device, run):
        return mine
    texts: list[str] = everyone(text, device, run)
    others = [r for r, t in enumerate(texts) if t != texts[0]]
    line, first, theirs = _first_difference(texts[0], texts[others[0]])
    raise AgreementError(
        f"ranks would run different {what}s: rank 0 has {digest(texts[0])[:16]}, rank {others[0]} {digest(texts[others[0]])[:16]} "
        f"({len(others)} of {len(texts)} ranks differ from rank 0)\n  first difference, line {line}:\n    rank 0: {first}\n    rank {others[0]}: {theirs}\n"
        "  fix: give every rank the same model, plan and versions"
    )


def agree_on_values(values: Sequence[tuple[str, object]], device: torch.device | str = "cpu", run: Run = plainly) -> None:
    """Check that named values (guards, batch shapes) are equal on all ranks: one all_reduce of four numbers.

    Raises AgreementError on every rank, naming the first value that differs and what each rank has.
    """
    if not _differs(digest(repr(list(values))), device, run):
        return
    found: list[list[tuple[str, object]]] = everyone(list(values), device, run)
    for n in range(max(map(len, found))):
        said = [f"{values[n][0]} = {values[n][1]!r}" if n < len(values) else "nothing" for values in found]
        rank = next((r for r, text in enumerate(said) if text != said[0]), None)
        if rank is not None:
            raise AgreementError(f"ranks disagree: {said[0]} on rank 0, {said[rank]} on rank {rank}\n  fix: give every rank the same model and settings, and batches of one shape")
    raise AgreementError(f"ranks disagree: {len(found[0])} values on rank 0, {sorted({len(v) for v in found})} on all")


def everyone(value: Any, device: torch.device | str = "cpu", run: Run = plainly) -> list[Any]:
    """Every rank's value, in the order of the ranks; pickled on the way."""
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    length = torch.tensor([mine.numel()], dtype=torch.int64, device=device)
    run(lambda: dist.all_gather(lengths, length, async_op=True), "what each rank has over all ranks")
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in lengths]
    run(lambda: dist.all_gather(parts, padded, async_op=True), "what each rank has over all ranks")
    return [pickle.loads(part[: int(n)].cpu().numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]


def as_on_rank_0(named: Mapping[str, Tensor], device: torch.device | str = "cpu", run: Run = plainly) -> list[str]:
    """Overwrite what differs between ranks by rank 0's, as DDP does with a model that each rank initialised for itself; the names."""
    if not named:
        return []
    mine = torch.tensor([fingerprint(t) for t in named.values()], dtype=torch.int64)
    extremes = torch.stack([mine, -mine]).to(device)
    run(lambda: dist.all_reduce(extremes, dist.ReduceOp.MAX, async_op=True), "values of parameters over all ranks")
    high, low = extremes.cpu()
    different = [name for name, odd in zip(named, (high != -low).tolist(), strict=True) if odd]
    with torch.no_grad():
        for name in different:
            buffer = named[name].detach().to(device).contiguous()
            raw = torch.view_as_real(buffer) if buffer.is_complex() else buffer
            run(lambda raw=raw: dist.broadcast(raw, 0, async_op=True), f"{name} of rank 0 over all ranks")  # type: ignore[misc]
            named[name].copy_(buffer)
    return different


def fingerprint(t: Tensor) -> int:
    """62 bits of the values and their places."""
    raw = t.detach().contiguous().view(-1).view(torch.uint8)
    whole = raw[: raw.numel() // 2048 * 2048].view(torch.int64).view(-1, 256).sum(1)
    rest = raw[whole.numel() * 2048 :].to(torch.int64)
    parts = [(x * torch.arange(1, x.numel() + 1, device=x.device)).sum() for x in (whole, rest)]
    return (int(parts[0]) * 31 + int(parts[1])) & (2**62 - 1)


def differs(text: str, device: torch.device | str = "cpu", run: Run = plainly) -> bool:
    """Whether some rank holds another text."""
    return _differs(digest(text), device, run)


def _differs(mine: str, device: torch.device | str, run: Run) -> bool:
    """Whether a hash is not the same on all ranks: the maximum of it and of its negative, 62 bits twice."""
    parts = [int(mine[i : i + 15], 16) for i in (0, 15)]
    x = torch.tensor([parts[0], parts[1], -parts[0], -parts[1]], dtype=torch.int64, device=device)
    run(lambda: dist.all_reduce(x, dist.ReduceOp.MAX, async_op=True), "agreement over all ranks")
    high0, high1, low0, low1 = x.tolist()
    return bool(high0 != -low0 or high1 != -low1)


def _first_difference(a: str, b: str) -> tuple[int, str, str]:
    left, right = a.splitlines(), b.splitlines()
    for n in range(max(len(left), len(right))):
        x, y = (t[n] if n < len(t) else "(end)" for t in (left, right))
        if x != y:
            return n + 1, x, y
    return len(left), "(the same lines)", "(the same lines)"
