"""Which back end computes the groups of a program, and what it made of each.

A back end is one row of ``BACK_ENDS``: a function from kernels (deepseed.codegen.kernels: fragment, strides, Python source) to callables that return a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from deepseed.codegen import cpp_files, cpp_updates, inductor, triton_files, triton_updates
from deepseed.codegen.chains import Chaining
from deepseed.codegen.cpp_chain import Chain, runner
from deepseed.codegen.donation import Donation
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import COMPILED, Kernel, kernels
from deepseed.codegen.optim import Call, calls_of
from deepseed.codegen.updates import Formula, name_of
from deepseed.ir.fragment import groups
from deepseed.ir.program import Program
from deepseed.ops.optim import in_place
from deepseed.rules.strides import laid_out
from deepseed.runtime.arena import Arena
from deepseed.runtime.executable import cache_dir

Compiled = Callable[..., Sequence[Tensor]]
BackEnd = Callable[[Sequence[Kernel], Path, Callable[[str], object]], Sequence[Compiled]]
BACK_ENDS: dict[str, BackEnd] = {"cpp": cpp_files.compiled, "inductor": inductor.compiled, "triton": triton_files.compiled}
CPP = "cpp"
AUTO = CPP  # what "auto" is on a CPU with a compiler
ROWS = "rows"  # of a packed step: groups are marked and run as Python, until deepseed.inference.executable compiles them for any number of rows
TRITON_ROWS = "triton_rows"  # the same
PRODUCTS: Mapping[str, str] = {CPP: "alone", "triton": "joined", TRITON_ROWS: "joined"}  # those that write matrix products too, and how (deepseed.passes.group_kernels)
PYTHON = "python"  # no groups: one line an op


class BackEndError(ValueError):
    """A back end that there is not, or not here."""


@dataclass
class Kernels:
    """``names``: the function of each group, by its mark; ``updates``: of each update of an optimizer, by its name; ``calls``: what runs under that name; ``chaining``: how several
    are called at once (deepseed.codegen.chains), where that can be."""

    codegen: str = PYTHON
    names: Mapping[str, str] = field(default_factory=dict)
    updates: Mapping[str, str] = field(default_factory=dict)
    calls: dict[str, Compiled] = field(default_factory=dict)
    chaining: Chaining | None = None

    @property
    def functions(self) -> Mapping[str, str]:
        """By mark or name."""
        return {**self.names, **self.updates}


def resolve(codegen: str, device: torch.device) -> str:
    """The back end that is meant. Raises BackEndError on a word that means none here."""
    if codegen == "auto":
        return AUTO if device.type == "cpu" and inductor.compiler() else PYTHON
    if codegen not in (ROWS, TRITON_ROWS):
        known(codegen)
    if PRODUCTS.get(codegen) == "joined" and (why := triton_files.missing(device.type)):
        raise BackEndError(f"codegen='triton': {why}")
    if codegen in (CPP, "inductor") and device.type not in ("cpu", "meta"):
        raise BackEndError(f"codegen={codegen!r} computes on a CPU, and the parameters are on {device}\n  fix: codegen='triton', or 'python'")
    return codegen


def known(codegen: str) -> None:
    """Raises BackEndError on a word that means no back end to a user."""
    words = [PYTHON, *BACK_ENDS, "auto"]
    if codegen not in words:
        raise BackEndError(f"codegen={codegen!r}: no such back end\n  fix: one of {', '.join(words)}")


def made(p: Program, codegen: str, known: dict[str, Compiled], counted: bool, tell: Callable[[str], object], at: Callable[[str, int, int], object] = lambda what, done, of: None) -> Kernels:
    """What computes the groups of a localized program. ``known``: by function name, what was made before, which grows; ``counted``: whether an arena counts memory; ``at`` hears how many kernels of how many are compiled."""
    if codegen == PYTHON:
        return Kernels()
    strides, views = laid_out(p)
    found = kernels(p, strides, views)
    new = [k for k in dict.fromkeys(found.values()) if k.name not in known]
    if new:
        known.update((k.name, _seen(f) if counted else f) for k, f in zip(new, called(new, codegen, tell, at), strict=True))
    names, calls = {mark: k.name for mark, k in found.items()}, {k.name: known[k.name] for k in found.values()}
    if codegen == CPP and not counted:
        for mark, into in _overwritten(p, {mark: f.reused for mark, name in names.items() if isinstance(f := calls[name], cpp_files.Fixed)}).items():
            f = calls[names[mark]]
            assert isinstance(f, cpp_files.Fixed)
            names[mark] += "".join(f"_over{i}" for i in into.values())
            calls[names[mark]] = f.reusing(into)
    updates = dict[str, str]()
    for c in calls_of(p):
        updates.update((op.name, c.name) for run in c.runs for op in run)
        known[c.name] = calls[c.name] = known.get(c.name) or update(c.formulas, codegen, c.on_host, tell)
    chaining, codes = None, {mark: calls[name] for mark, name in names.items()}
    if codegen == CPP and not counted and any(isinstance(f, cpp_files.Fixed) for f in codes.values()) and (chain := _chain(tell)) is not None:
        chaining, calls["chain"] = Chaining(strides, views, codes), chain
    return Kernels(codegen, names, updates, calls, chaining)


def _chain(tell: Callable[[str], object]) -> Callable[..., Any] | None:
    """What makes chains of a source (deepseed.codegen.cpp_chain), which are called in its place."""
    try:
        return partial(Chain, runner(cache_dir() / "kernels"))
    except CodegenError as error:
        inductor.once(tell, f"kernels are called one by one: {error}")
        return None


def update(formulas: Sequence[Formula], codegen: str, on_host: bool, tell: Callable[[str], object]) -> Callable[..., Any]:
    """What a back end makes of updates: a function of lists of tensors (deepseed.codegen.updates), which it changes; ``on_host``: wherever the model is. Torch's where it makes nothing."""
    make = triton_files.update if _through_triton(codegen, on_host) else cpp_files.update
    try:
        return make(formulas, cache_dir() / "kernels")
    except (CodegenError, ImportError) as error:
        inductor.once(tell, f"{name_of(formulas)} is torch's, one tensor after another: {error}")
        return _torchs(formulas)


def _torchs(formulas: Sequence[Formula]) -> Callable[..., None]:
    each = [(in_place(f.kind, f.each, f.shared, dict(f.options)), len(f.each) + len(f.shared)) for f in formulas]

    def call(*given: Any) -> None:
        for one, n in each:
            one(*given[:n])
            given = given[n:]

    return call


def called(wanted: Sequence[Kernel], codegen: str, tell: Callable[[str], object], at: Callable[[str, int, int], object] = lambda what, done, of: None) -> Sequence[Compiled]:
    """What a back end makes of kernels, in their order; compiled code is kept in the cache folder."""
    at("kernels", 0, len(wanted))
    token = COMPILED.set(lambda done, of: at("kernels", done, of))
    try:
        return BACK_ENDS.get(codegen, _as_python)(wanted, cache_dir() / "kernels", tell)
    finally:
        COMPILED.reset(token)


def _overwritten(p: Program, reusable: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, dict[int, int]]:
    """By mark, of the results that can be written into an operand's memory (pairs of operand and result) those that are: the group is the last that reads it, and it was made where
    the group runs, in memory of its own."""
    donation, out = Donation(p), dict[str, dict[int, int]]()
    for g in groups(p):
        into: dict[int, int] = {}
        memories = [donation.memory(value) for value in g.reads]
        for i, m in reusable.get(g.kernel, ()):
            (root, *others) = memories[i]
            made = p.producers.get(root)
            if m in into or i in into.values() or others or made is None or donation.roots[root] or sum(root in memory for memory in memories) > 1:
                continue
            own = made.target.startswith("aten.") or bool(made.kernel)
            here = (made.part, made.stage) == (p.ops[g.first].part, p.ops[g.first].stage)
            whole = p.types[root].local_bytes(p.mesh) == p.types[g.reads[i]].local_bytes(p.mesh)
            if own and here and whole and g.first <= donation.last_use[root] < g.last:
                into[m] = i
        if into:
            out[g.kernel] = into
    return out


def _through_triton(codegen: str, on_host: bool) -> bool:
    """Whether Triton writes an update, wherever the model is."""
    return codegen == "triton" and not on_host


def traffic(codegen: str) -> Callable[[Kernel | Call], Sequence[tuple[int, int]] | None]:
    """What the kernels that a back end writes for a group, or for an update, read and write, each; None where it does not say. What is returned raises CodegenError where it writes none, as
    ``made`` finds when it asks for the source: the group, or the update, runs as Python then."""
    of_group: Mapping[str, Callable[[Kernel], Sequence[tuple[int, int]] | None]] = {CPP: cpp_files.traffic, "triton": triton_files.traffic}

    def ask(k: Kernel | Call) -> Sequence[tuple[int, int]] | None:
        if isinstance(k, Kernel):
            return of_group[codegen](k) if codegen in of_group else None
        (triton_updates if _through_triton(codegen, k.on_host) else cpp_updates).source(k.formulas)
        return None

    return ask


def _as_python(wanted: Sequence[Kernel], _: Path, __: Callable[[str], object]) -> Sequence[Compiled]:
    return [inductor.python(k) for k in wanted]


def _seen(f: Compiled) -> Compiled:
    """Compiled code makes its results past the account of a rank's memory."""

    def call(*operands: Tensor) -> Sequence[Tensor]:
        results = f(*operands)
        arena = _get_current_dispatch_mode()
        return [arena.take(x) for x in results] if isinstance(arena, Arena) else results

    return call
