"""Golden files: ``golden`` compares a text with ``tests/golden/<test name>.ir``; ``pytest --update-golden`` rewrites them."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed as dist


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the tests give now")


def pytest_configure() -> None:
    os.environ.setdefault("DEEPSEED_REMEMBER", "0")  # what a test compiles runs every pass; tests/test_remembered.py is about the others


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where ``DEEPSEED_TURNS`` has a commit (make test), tests marked ``turn`` take turns by it: one of ``of``, of each function's cases as of the functions."""
    if not (commit := os.environ.get("DEEPSEED_TURNS", "")):
        return
    cases: Counter[str] = Counter()
    later = []
    for item in items:
        if (turn := item.get_closest_marker("turn")) is not None:
            name = item.nodeid.partition("[")[0]
            if (cases[name] + crc32(name.encode()) + crc32(commit.encode())) % turn.kwargs.get("of", 3):
                later.append(item)
            cases[name] += 1
    config.hook.pytest_deselected(items=later)
    items[:] = [item for item in items if item not in set(later)]


def pytest_collection_finish() -> None:
    """What modules hold, a million objects, is no garbage: collections need not look through it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions look at the end for what was not let go


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


@pytest.fixture(scope="session")
def kernels_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests compile and need not see compiled: by content, once a process."""
    return tmp_path_factory.getbasetemp() / "kernels"


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """An engine in this process makes a process group; whoever compiles after it would be one of its ranks."""
    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Any]:
    """A process in which Triton kernels are interpreted."""
    from triton_worker import Interpreter

    process = Interpreter()
    yield process
    process.close()


@pytest.fixture(scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """A process that is killed loses nothing that it has written; only a machine that loses its power does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def text() -> Any:
    """A tokenizer for a tiny model that is served."""
    from tests.serving import tokenizer

    return tokenizer()


@pytest.fixture(scope="module")
def weights(text: Any) -> Any:
    from tests.serving import model

    return model(text)


@pytest.fixture(scope="module")
def plain(text: Any, weights: Any) -> Any:
    """An engine of the same model that no server uses."""
    from deepseed.inference.engine import Engine

    return Engine(weights, tokenizer=text, block=4)


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """An ssh that reaches this machine whatever it is called, without the environment of the caller; one whose name is in a
    file ``gone-NAME`` at home is out of reach."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text('#!/bin/bash\nfor last; do :; done\n[ -e "$HOME/gone-${@: -2:1}" ] && exit 255\nexec env -i HOME="$HOME" /bin/bash -c "$last"\n')
    (folder / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("# what all nodes get\nSAID=a b\n")
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
