"""Connections to the store where ranks met."""

from __future__ import annotations

from torch.distributed.distributed_c10d import PrefixStore, Store


def own(store: Store, name: str) -> Store:
    """A connection of one's own, and keys of one's own in it: a thread that waits for an answer keeps nobody else from the store."""
    clone = getattr(store, "clone", None)
    return PrefixStore(f"deepseed.{name}", clone() if clone else store)
