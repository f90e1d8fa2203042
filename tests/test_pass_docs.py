"""The docstring of every pass shows before and after. Here each pass is run on its ``before`` and has to give its ``after``.

A docstring may leave out what the reader does not need: the header (mesh(dp=2, tp=2) then), roles of inputs (a line without
``=`` is an input), phases (forward), what is returned (the last value), and the schedule. Remarks after five blanks are no part of a line.
``EXTRA`` has the inputs that a docstring leaves out, ``ARGUMENTS`` the arguments of the pass.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseed.ir.contract import Pass
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.ir.text import parse

FOLDER = Path(__file__).resolve().parent.parent / "passes"
EXTRA = {"canonicalize": "%x : f32[4, 8]", "lower_reshards": "%y : f32[8@dp, 16] sum@tp",
         "group_kernels": '%x : f32[8@dp, 16]\norigin "y" %y = aten._softmax(%x, -1, false) : f32[8@dp, 16]'}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {"localize": {"coordinate": {"dp": 1, "tp": 0}}, "cut_stages": {"stages": 2}, "offload": {"what": ("optimizer", "params")},
                                        "offload_activations": {"wanted": True}}  # fmt: skip


def passes() -> list[Pass]:
    names = [f.stem for f in sorted(FOLDER.glob("*.py")) if "@program_pass(" in f.read_text()]
    return [getattr(importlib.import_module(f"deepseed.passes.{name}"), name) for name in names]


def blocks(p: Pass) -> tuple[str, str, str]:
    """Before, the arguments named at ``after``, after."""
    found = re.search(r"^before:(.*?)^after(?:, (.*?))?:(.*?)\Z", inspect.cleandoc(p.doc), re.DOTALL | re.MULTILINE)
    assert found is not None, f"the docstring of {p.name} has no before: and after:"
    return found[1], found[2] or "", found[3]


def complete(text: str, mesh: Mesh, facts: frozenset[str], extra: str = "") -> Program:
    lines = [*extra.splitlines(), *(re.sub(r" {5,}.*", "", line.strip()) for line in text.strip().splitlines())]
    body = []
    for line in lines:
        if re.match(r'(origin ".*?" )?(%[^\s,]+(, )?)+ = ', line):
            op, brace, meta = line.partition(" {")
            body.append(line if "phase=" in meta else f'{op} {{phase="forward"{", " if brace else ""}{meta or "}"}')
        elif not re.search(r'"( stage \d+)?$', line):
            body.append(line + f' batch "{line.split()[0]}"')
        else:
            body.append(line)
    last = re.match(r"%[^\s,]+", body[-1])
    assert last is not None
    return parse("\n".join([f"program p {mesh} facts({', '.join(sorted(facts))})", *body, f'return {last[0]} output "0"']))


@pytest.mark.parametrize("each", passes(), ids=lambda p: p.name)
def test_before_becomes_after(each: Pass) -> None:
    before, said, after = blocks(each)
    mesh = Mesh((("dp", 2), ("tp", 2)))
    arguments = dict(ARGUMENTS.get(each.name, {}))
    if found := re.match(r" *(mesh\(.*?\))\n", before):
        mesh = parse(f"program p {found[1]} facts()").mesh
        before = before[found.end() :]
        if "mesh" in inspect.signature(each.run).parameters:
            arguments["mesh"] = mesh
    arguments |= {key: int(value) for key, value in (word.split("=") for word in said.split(", ") if word)}
    extra = EXTRA.get(each.name, "")
    start = complete(before, Mesh() if "mesh" in arguments else mesh, each.requires, extra)
    got = each(start, **arguments)
    want = complete(after, got.mesh, got.facts, extra)
    ends = tuple(o.ref.name for o in got.outputs)
    assert str(replace(got, outputs=(), origins=(), schedule=None)) == str(replace(want, outputs=(), origins=())), f"returned: {ends}"
