"""The documentation is run: examples, programs, links, make targets, and what is generated from the code."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"hf_trainer.md": "accelerate"}  # what an example needs beyond DeepSeed's own requirements
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pages
def test_examples_give_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for target in [t for t in ("aten.cdist",) if t in RULES]:  # pages add rules of their own
        pytest.fail(f"{target} has a rule now: CONTRIBUTING.md needs another example")
    try:
        failed = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, encoding="utf-8")
    finally:
        RULES.pop("aten.cdist", None)
    assert failed.failed == 0


@pages
def test_programs_in_code_blocks_are_programs(page: Path) -> None:
    for block in re.findall(r"```\w*\n(program .*?)```", page.read_text(), re.DOTALL):
        assert str(verify(parse(block))) == block


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)) <= targets


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_passes_is_up_to_date() -> None:
    generate = script("generate")
    assert generate.TARGET.read_text() == generate.text(), "run `make docs`"


def test_the_pictures_are_up_to_date() -> None:
    pictures = script("pictures")
    drawn = pictures.pictures()
    assert {f.name for f in pictures.FOLDER.glob("*.svg")} == {*drawn, "peers.svg"}  # which make bench draws
    for name, text in drawn.items():
        assert (pictures.FOLDER / name).read_text() == text, f"{name}: run `make docs`"


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    env = {**os.environ, "DEEPSEED_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code[0]], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.splitlines()]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
