"""Which back end computes the groups of a program, and what it made of each.

A back end is one row of ``BACK_ENDS``: a function from kernels (deepseed.codegen.kernels: fragment, strides, Python source) to callables that return a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from deepseed.codegen import inductor, triton_files
from deepseed.codegen.kernels import Kernel, kernels
from deepseed.ir.program import Program
from deepseed.rules.strides import laid_out
from deepseed.runtime.arena import Arena
from deepseed.runtime.executable import cache_dir

Compiled = Callable[..., Sequence[Tensor]]
BackEnd = Callable[[Sequence[Kernel], Path, Callable[[str], object]], Sequence[Compiled]]
BACK_ENDS: dict[str, BackEnd] = {"inductor": inductor.compiled, "triton": triton_files.compiled}
PRODUCTS = ("triton",)  # those that write matrix products and attention too
ROWS = "cpp"  # of a packed step: groups are marked and run as Python, until deepseed.inference.executable compiles them for any number of rows
PYTHON = "python"  # no groups: one line an op


@dataclass
class Kernels:
    """``names``: the function of each group, by its mark; ``calls``: what runs under that name."""

    codegen: str = PYTHON
    names: Mapping[str, str] = field(default_factory=dict)
    calls: dict[str, Compiled] = field(default_factory=dict)


def resolve(codegen: str, device: torch.device) -> str:
    """The back end that is meant. Raises ValueError on a word that means none."""
    if codegen == "auto":
        return "inductor" if device.type == "cpu" and inductor.compiler() else PYTHON
    if codegen not in (PYTHON, ROWS, *BACK_ENDS):
        raise ValueError(f"codegen={codegen!r}: no such back end\n  fix: one of {', '.join([PYTHON, *BACK_ENDS, 'auto'])}")
    if codegen == "triton" and (why := triton_files.missing(device.type)):
        raise ValueError(f"codegen='triton': {why}")
    return codegen


def made(p: Program, codegen: str, known: dict[str, Compiled], counted: bool, tell: Callable[[str], object]) -> Kernels:
    """What computes the groups of a localized program. ``known``: by function name, what was made before, which grows; ``counted``: whether an arena counts memory."""
    if codegen == PYTHON:
        return Kernels()
    strides, _ = laid_out(p)
    found = kernels(p, strides)
    new = [k for k in dict.fromkeys(found.values()) if k.name not in known]
    if new:
        back_end = BACK_ENDS.get(codegen, _as_python)
        known.update((k.name, _seen(f) if counted else f) for k, f in zip(new, back_end(new, cache_dir() / "kernels", tell), strict=True))
    return Kernels(codegen, {mark: k.name for mark, k in found.items()}, {k.name: known[k.name] for k in found.values()})


def traffic(codegen: str) -> Callable[[Program], Sequence[tuple[int, int]] | None]:
    """What the kernels that a back end writes for a fragment read and write, each; None where it does not say."""
    return {"triton": triton_files.traffic}.get(codegen, lambda fragment: None)


def _as_python(wanted: Sequence[Kernel], _: Path, __: Callable[[str], object]) -> Sequence[Compiled]:
    return [inductor.python(k) for k in wanted]


def _seen(f: Compiled) -> Compiled:
    """Compiled code makes its results past the account of a rank's memory."""

    def call(*operands: Tensor) -> Sequence[Tensor]:
        results = f(*operands)
        arena = _get_current_dispatch_mode()
        return [arena.take(x) for x in results] if isinstance(arena, Arena) else results

    return call
