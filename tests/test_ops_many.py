"""Tables of addresses for kernels over many tensors: kept while tensors stay, bounded, and in a captured graph copied from memory that lives as long as it."""

from __future__ import annotations

import pytest
import torch

from deepseed.ops import many

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in (("_tables", dict), ("_ahead", dict), ("_replayed", list)):
        monkeypatch.setattr(many, name, empty())


def test_programs_and_addresses_of_tensors_of_any_size() -> None:
    tensors = [[torch.empty(n), torch.empty(n)] for n in (5, 0, 4)]
    assert many.chunks((5, 0, 4), 4, CPU).tolist() == [[0, 0], [0, 1], [2, 0]]
    assert many.lengths((5, 0, 4), CPU).tolist() == [5, 0, 4]
    assert many.addresses(tensors, CPU).tolist() == [x.data_ptr() for row in tensors for x in row]
    assert many.addresses(tensors, CPU) is many.addresses(tensors, CPU)
    x = torch.empty(8, dtype=torch.int8)
    assert many.aligned([[x, x[1:]]], [0]) and not many.aligned([[x, x[1:]]], [0, 1])


def test_only_so_many_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "TABLES", 2)
    a, b, c = ([[torch.empty(1)]] for _ in range(3))
    first = many.addresses(a, CPU)
    second = many.addresses(b, CPU)
    many.addresses(c, CPU)
    assert len(many._tables) == 2 and many.addresses(b, CPU) is second and many.addresses(a, CPU) is not first


def test_a_graph_copies_its_tables_from_memory_that_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured nothing is pinned and no other table is read: what it copies stays, unchanged by the next."""
    made: list[int] = []

    def pinned(n: int) -> torch.Tensor:
        made.append(n)
        return torch.empty(n, dtype=torch.int64)

    monkeypatch.setattr(many, "_pinned", pinned)
    many._ahead[2] = [pinned(2), pinned(2)]
    made.clear()
    tables = [many._in_graph(found, CPU) for found in ((1, 2), (1, 2))]
    assert [t.tolist() for t in tables] == [[1, 2], [1, 2]] == [t.tolist() for t in many._replayed]
    assert not made and many._ahead[2] == [] and tables[0].data_ptr() != tables[1].data_ptr()
    many._in_graph((3, 4), CPU)
    assert made == [2] and [t.tolist() for t in many._replayed] == [[1, 2], [1, 2], [3, 4]]


def test_a_capture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device; what is made before one leaves pinned memory for it."""
    device, made = torch.device("cuda"), list[int]()
    monkeypatch.setattr(many, "_pinned", lambda n: made.append(n) or torch.empty(n, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(many, "_in_graph", lambda found, device: found)
    x, y = torch.empty(1), torch.empty(1)
    assert many.addresses([[x, y], [y]], device) == (x.data_ptr(), y.data_ptr(), y.data_ptr(), 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "tensor", lambda found, dtype, device: found)
    others = [torch.empty(1) for _ in range(many.AHEAD + 2)]
    assert all(many.addresses([[z, y]], device)[:2] == (z.data_ptr(), y.data_ptr()) for z in others)
    assert made == [2] * many.AHEAD == [len(t) for t in many._ahead[2]]
    assert many.forms((2, 0, 1), CPU) == [0, 0, 2]
