"""Products of few rows, cache writes and the attention of few new tokens, in C++ (deepseed.codegen.cpp_native): compiled once for this machine.

A decoding step reads every weight for a handful of rows, so a product is as fast as memory is read. ``product`` reads a weight as it lies, [out, in], each value
once whatever the number of rows; more rows than ``FEW`` are torch's. ``load`` gives None where there is no compiler: then torch does all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepseed.codegen.cpp_files import EXACT, library
from deepseed.codegen.cpp_native import EXPORTS, TEMPLATES
from deepseed.codegen.cpp_ops import LIBRARY
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.inductor import compiler
from deepseed.logs import say
from deepseed.ops import addmm, mm
from deepseed.runtime.executable import cache_dir

if TYPE_CHECKING:
    from deepseed.inference.attention import Few
    from deepseed.inference.packing import Packed

FEW = 32  # rows of a product, at most; beyond, blocked products win
NEW = 4  # tokens that a sequence brings, at most; beyond, products of matrices win
EIGHT = ("int8", "fp8")  # weights in eight bits
_POINTER, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Native:
    """The functions of ``EXPORTS`` by dtype."""

    def __init__(self, functions: Any) -> None:
        def each(name: str, arguments: list[Any]) -> dict[torch.dtype, Any]:
            out = {}
            for dtype, word in _DTYPES.items():
                out[dtype] = getattr(functions, f"{name}_{word}")
                out[dtype].argtypes, out[dtype].restype = arguments, None
            return out

        self.products = each("product", [_POINTER] * 3 + [_LONG] * 3 + [_INT])
        self.eights = {kind: each(kind, [_POINTER] * 4 + [_LONG] * 3 + [_INT]) for kind in EIGHT}
        self.widens = {kind: each(f"widen_{kind}", [_POINTER] * 3 + [_LONG] * 2) for kind in EIGHT}
        self.flats = each("flat", [_POINTER] * 3 + [_LONG] * 3 + [_INT])
        self.puts = each("put", [_POINTER] * 3 + [_LONG] * 4)
        self.attends = each("attend", [_POINTER] * 9 + [_LONG] * 8 + [_DOUBLE, _LONG, _DOUBLE, _INT])


@cache
def load() -> Native | None:
    """The functions, compiled; None where there is no compiler, or where compiling or loading fails, which is said once. Whether a program of that name is there at all,
    for which nothing need be compiled, is ``inductor.compiler``."""
    if not compiler():
        return None
    try:
        return Native(library(LIBRARY + TEMPLATES + EXPORTS, cache_dir() / "kernels", EXACT))
    except (CodegenError, OSError) as error:  # a compiler that is not whole, a folder that cannot be written
        say(f"inference runs without C++: {error}")
        return None


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [rows, in] @ w [in, out], which lies by rows or by columns."""
    (rows, width), outputs = x.shape, w.shape[1]
    native, lying = load(), w.stride()
    by_columns = lying == (1, width)
    if native is None or not 0 < rows <= FEW or x.dtype not in _DTYPES or x.device.type != "cpu" or x.dtype != w.dtype or not (by_columns or lying == (outputs, 1)):
        return mm(x, w)
    x = x if x.stride() == (width, 1) else x.contiguous()
    y = torch.empty(rows, outputs, dtype=x.dtype)
    (native.products if by_columns else native.flats)[x.dtype](x.data_ptr(), w.data_ptr(), y.data_ptr(), rows, width, outputs, torch.get_num_threads())
    return y


def biased(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The same with a bias [out]."""
    return addmm(bias, x, w) if x.shape[0] > FEW or load() is None else product(x, w).add_(bias)


def product_of_eight(x: Tensor, w: Tensor, scale: Tensor, kind: str) -> Tensor | None:
    """x [rows, width] @ w [outputs, width].t(), weights in eight bits with scale [outputs, groups]; None where rows are many or there is no compiler."""
    native, (rows, width), outputs = load(), x.shape, w.shape[0]
    if native is None or not 0 < rows <= FEW or x.dtype not in _DTYPES or x.device.type != "cpu":
        return None
    x, y = x.contiguous(), torch.empty(rows, outputs, dtype=x.dtype)
    native.eights[kind][x.dtype](x.data_ptr(), w.data_ptr(), scale.data_ptr(), y.data_ptr(), rows, width, outputs, torch.get_num_threads())
    return y


def widened(w: Tensor, scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor | None:
    """What weights in eight bits say; None without a compiler."""
    native = load()
    if native is None or dtype not in _DTYPES or w.device.type != "cpu":
        return None
    y = torch.empty(w.shape, dtype=dtype)
    native.widens[kind][dtype](w.data_ptr(), scale.data_ptr(), y.data_ptr(), *w.shape)
    return y


class FewRows:
    """A whole step of at most ``FEW`` rows (deepseed.codegen.cpp_step)."""

    def __init__(self, function: Any, arena: int, width: Sequence[int], dtype: torch.dtype) -> None:
        function.argtypes, function.restype = [_LONG, _LONG, _INT, *[_POINTER] * 9, *[_LONG] * 4], _INT
        self.function, self.width, self.dtype = function, tuple(width), dtype
        self.arena = torch.empty(arena + 64, dtype=torch.uint8)
        self.begin = -(-self.arena.data_ptr() // 64) * 64

    def takes(self, made: Packed) -> bool:
        return len(made.ids) <= FEW and len(made.last) > 0 and made.packing.few is not None and len(made.packing.few.news) == len(made.packing.news)

    def run(self, inputs: Sequence[Tensor], caches: Mapping[int, tuple[Tensor, Tensor]], made: Packed) -> Tensor:
        """Logits. ``inputs``: what the program reads, contiguous. Raises IndexError."""
        few, pairs = made.packing.few, [caches[n] for n in range(len(caches))]
        assert few is not None
        given, kept = (_POINTER * len(inputs))(*[x.data_ptr() for x in inputs]), (_POINTER * (2 * len(pairs)))(*[x.data_ptr() for pair in pairs for x in pair])
        out = torch.empty(len(made.last), *self.width, dtype=self.dtype)
        _, pages, size, _ = pairs[0][0].shape
        if self.function(
            len(made.ids), len(made.last), torch.get_num_threads(), given, kept, self.begin, out.data_ptr(), made.packing.slots.data_ptr(), *few.pointers, *few.table.shape, pages, size,
        ):  # fmt: skip
            raise IndexError("a served step: an index is out of range\n  fix: token ids, and positions, must be below the number of rows of the tables that they pick from")
        return out


def write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """``deepseed.inference.paged.write``."""
    native = load()
    assert native is not None
    for x, cache_ in ((k, keys), (v, values)):
        native.puts[x.dtype](x.data_ptr(), cache_.data_ptr(), slots.data_ptr(), x.shape[0], x.shape[1], cache_.shape[1] * cache_.shape[2], x.shape[2])


def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, few: Few, scale: float, window: int, softcap: float, sinks: Tensor | None) -> None:
    """Into the rows of ``out`` [tokens, heads, value width] that ``few`` has."""
    native = load()
    assert native is not None
    held, pages, size, width = keys.shape
    sink = None if sinks is None else sinks.to(q.dtype).contiguous()
    native.attends[q.dtype](
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), None if sink is None else sink.data_ptr(), *few.pointers,
        *few.table.shape, held, q.shape[1] // held, pages, size, width, values.shape[3], scale, window, softcap, torch.get_num_threads(),
    )  # fmt: skip
