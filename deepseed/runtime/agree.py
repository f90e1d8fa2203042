"""Ranks agree before they run: one program text, and the same guard values and batch signatures.

Rank 0's text is sent to all, so that every rank runs what one solver decided. Hashes are compared by one small collective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from deepseed.runtime.errors import AgreementError


def digest(text: str) -> str:
    """sha256, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def broadcast_text(text: str | None, device: torch.device | str = "cpu") -> str:
    """Rank 0's ``text`` on every rank (the others' is ignored)."""
    first = dist.get_rank() == 0
    data = torch.frombuffer(bytearray((text or "").encode()), dtype=torch.uint8) if first and text else torch.zeros(0, dtype=torch.uint8)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    dist.broadcast(length, 0)
    payload = data.to(device) if first else torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(payload, 0)
    return bytes(payload.cpu().tolist()).decode()


def agree_on_text(text: str, what: str = "program", device: torch.device | str = "cpu") -> str:
    """``text``, which every rank must hold alike; its sha256.

    Raises AgreementError on every rank where one differs: both hashes and the first line that differs.
    """
    mine = digest(text)
    if not _differs(mine, device):
        return mine
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    others = [r for r, t in enumerate(texts) if t != texts[0]]
    line, first, theirs = _first_difference(texts[0], texts[others[0]])
    raise AgreementError(
        f"ranks would run different {what}s: rank 0 has {digest(texts[0])[:16]}, rank {others[0]} {digest(texts[others[0]])[:16]} "
        f"({len(others)} of {len(texts)} ranks differ from rank 0)\n  first difference, line {line}:\n    rank 0: {first}\n    rank {others[0]}: {theirs}\n"
        "  fix: give every rank the same model, plan and versions"
    )


def agree_on_values(values: Sequence[tuple[str, object]], device: torch.device | str = "cpu") -> None:
    """Check that named values (guards, batch shapes) are equal on all ranks: one all_reduce of four numbers.

    Raises AgreementError on every rank, naming the first value that differs and what each rank has.
    """
    if not _differs(digest(repr(list(values))), device):
        return
    everyone: list[list[tuple[str, object]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(values))
    for n, (name, value) in enumerate(everyone[0]):
        for rank, theirs in enumerate(everyone):
            if n >= len(theirs) or theirs[n] != (name, value):
                got = f"{theirs[n][0]} = {theirs[n][1]!r}" if n < len(theirs) else "nothing"
                raise AgreementError(f"ranks disagree: {name} = {value!r} on rank 0, {got} on rank {rank}\n  fix: give every rank the same global batch and the same settings")
    raise AgreementError(f"ranks disagree: {len(everyone[0])} values on rank 0, {sorted({len(v) for v in everyone})} on all")


def differs(text: str, device: torch.device | str = "cpu") -> bool:
    """Whether some rank holds another text."""
    return _differs(digest(text), device)


def _differs(mine: str, device: torch.device | str) -> bool:
    """Whether a hash is not the same on all ranks: the maximum of it and of its negative, 62 bits twice."""
    parts = [int(mine[i : i + 15], 16) for i in (0, 15)]
    x = torch.tensor([parts[0], parts[1], -parts[0], -parts[1]], dtype=torch.int64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    high0, high1, low0, low1 = x.tolist()
    return bool(high0 != -low0 or high1 != -low1)


def _first_difference(a: str, b: str) -> tuple[int, str, str]:
    left, right = a.splitlines(), b.splitlines()
    for n in range(max(len(left), len(right))):
        x, y = (t[n] if n < len(t) else "(end)" for t in (left, right))
        if x != y:
            return n + 1, x, y
    return len(left), "(the same lines)", "(the same lines)"
