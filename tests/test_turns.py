"""Long tests take turns by commit (conftest.py): each has its turn, and of a test's cases some run each time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

found = importlib.util.spec_from_file_location("turns", Path(__file__).parent / "conftest.py")
assert found is not None and found.loader is not None
conftest = importlib.util.module_from_spec(found)  # tests/gpu has one of that name too
found.loader.exec_module(conftest)


def left(monkeypatch: pytest.MonkeyPatch, commit: str, names: list[str], **of: int) -> list[str]:
    """Of tests with these names, those that run."""
    said: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: said.extend(items))
    items: list[Any] = [Item(name, of) for name in names]
    everything = set(items)
    monkeypatch.setenv("DEEPSEED_TURNS", commit)
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert {*items, *said} == everything and len(items) + len(said) == len(names)
    return [item.nodeid for item in items]


class Item:
    def __init__(self, nodeid: str, of: dict[str, int]) -> None:
        self.nodeid, self.of = nodeid, of

    def get_closest_marker(self, name: str) -> Any:
        return pytest.mark.turn(**self.of).mark if name == "turn" and not self.nodeid.startswith("short") else None


def test_each_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a.py::test_{n}" for n in range(60)]
    found = [left(monkeypatch, f"commit {n}", names) for n in range(12)]
    assert set().union(*found) == set(names) and 0 < min(map(len, found)) <= max(map(len, found)) < 40
    assert left(monkeypatch, "", names) == names and left(monkeypatch, "commit", ["short"] * 3) == ["short"] * 3


@pytest.mark.parametrize("of", [3, 4])
def test_of_the_cases_of_one_test_as_many_run_each_time(monkeypatch: pytest.MonkeyPatch, of: int) -> None:
    names = [f"a.py::test[{n}]" for n in range(12)]
    found = [left(monkeypatch, f"commit {n}", names, of=of) for n in range(20)]
    assert {len(each) for each in found} == {12 // of} and set().union(*found) == set(names)
