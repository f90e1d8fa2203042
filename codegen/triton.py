"""Readable Triton source of one fragment: its kernels, and ``launch``, which allocates the outputs and runs them.

    source(fragment) -> a Python file:   @triton.jit def kernel_0(..): ..      def launch(i0, i1, ..) -> (outputs in the fragment's order)

A fragment is one kernel where one pass over one iteration space makes all of it: pointwise ops, reductions along the row that programs hold in registers,
and sums over the rows, of which each program makes a part (a second, small kernel adds these up). What needs another space, or a sum to be complete, is a
kernel of its own behind it; values that cross are the parts of sums, everything else is computed again where it is needed.
"""

from __future__ import annotations

from functools import lru_cache

from deepseed.codegen import triton_attention as attention
from deepseed.codegen.any_rows import NONE, Free
from deepseed.codegen.block_sizes import Blocks
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.triton_writer import Launch, Writer
from deepseed.ir.program import Program


@lru_cache(maxsize=4096)
def source(fragment: Program, chosen: tuple[tuple[str, Blocks], ...] = (), free: Free = NONE) -> str:
    """The file of a fragment. ``chosen``: blocks of kernels, by name, that are not the model's. ``free``: sizes that stand for any (deepseed.codegen.any_rows).
    Raises CodegenError, naming the op, where it cannot be written."""
    return _written(fragment, chosen, free)[0]


@lru_cache(maxsize=4096)
def launched(fragment: Program, free: Free = NONE) -> tuple[Launch, ...]:
    """What a call of ``launch`` runs, with the model's blocks."""
    return _written(fragment, (), free)[1]


def _written(fragment: Program, chosen: tuple[tuple[str, Blocks], ...], free: Free) -> tuple[str, tuple[Launch, ...]]:
    if (op := attention.of(fragment)) is not None:
        if free:
            raise CodegenError(f"%{op.name} = {op.target} of any number of rows: no Triton kernel for it\n  fix: none is needed, the group runs as Python")
        return attention.written(fragment, dict(chosen))
    writer = Writer(fragment, dict(chosen), free)
    return writer.file(), tuple(writer.launched)


def can_emit(fragment: Program) -> bool:
    """Whether ``source`` has one."""
    try:
        source(fragment)
    except CodegenError:
        return False
    return True


def launches(fragment: Program, free: Free = NONE) -> int:
    """Kernels that a call of ``launch`` runs."""
    return len(launched(fragment, free))
