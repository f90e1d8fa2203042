"""Golden files: ``golden`` compares a text with ``tests/golden/<test name>.ir``; ``pytest --update-golden`` rewrites them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the tests give now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """``golden(text)`` asserts that the text is the stored one."""

    def check(text: object) -> None:
        name = "".join(c if c.isalnum() or c in "_-" else "-" for c in request.node.name)
        path = Path(__file__).parent / "golden" / f"{name}.ir"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(text))
        assert path.exists(), f"{path} is missing: pytest --update-golden {request.node.nodeid}"
        assert str(text) == path.read_text()

    return check


@pytest.fixture(scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """A process that is killed loses nothing that it has written; only a machine that loses its power does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
