"""Sources for any number of rows, made from sources of a stand-in number: a prime that divides no other number of a program.

    x.reshape((503, 4, 16))  ->  x.reshape((T, 4, 16))        y = torch.empty((1, 1006))  ->  y = torch.empty((1, T * 2))

``free``: the stand-ins and the names of what they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel
from deepseed.ir.program import Program

Free = tuple[tuple[int, str], ...]
NONE: Free = ()
MOST = 1 << 17  # rows: what is smaller than 2^31 for so many is a 32-bit number
_NUMBER = re.compile(r"(?<![\w.%])\d+(?![\w.])")


def general(text: str, free: Mapping[int, str]) -> str:
    """Multiples of a stand-in are multiples of its name."""

    def named(found: re.Match[str]) -> str:
        n = int(found[0])
        name, k = stands_for(n, free)
        several = f"({name} * {k})" if text[: found.start()].rstrip().endswith(("/", "%")) else f"{name} * {k}"
        return several if name and k > 1 else name or str(n)

    return _NUMBER.sub(named, text)


def stands_for(n: int, free: Mapping[int, str]) -> tuple[str, int]:
    """The name, and how many of it; no name for a number that is what it is."""
    return next(((name, n // size) for size, name in free.items() if n and n % size == 0), ("", n))


def heads(p: Program, free: Mapping[int, str]) -> dict[str, str]:
    """How each name that a fragment's function needs is read from the shapes of its inputs. Raises CodegenError where an input does not show it."""
    out: dict[str, str] = {}
    for i in p.inputs:
        for d, size in enumerate(i.type.shape):
            name, k = stands_for(size, free)
            if name and name not in out:
                out[name] = f"{i.name}.shape[{d}]" + (f" // {k}" if k > 1 else "")
    for op in p.ops:
        for name in {stands_for(n, free)[0] for t in op.types for n in t.shape}.difference(("", *out)):
            raise CodegenError(f"%{op.name} = {op.target}: no input of its group says what {name} is\n  fix: none is needed, the group runs as Python")
    return out


def function(k: Kernel, free: Mapping[int, str]) -> str:
    """The Python function of a kernel."""
    head, _, rest = general(k.source, free).partition("\n")
    return "\n".join([head, *(f"    {name} = {text}" for name, text in heads(k.fragment, free).items()), rest])
