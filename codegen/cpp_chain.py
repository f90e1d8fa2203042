"""What runs a chain of kernels (deepseed.codegen.chains) in one call: a library, the same for all programs, that follows a list of addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseed.codegen.cpp_files import Product, library
from deepseed.codegen.places import alike

Shape = tuple[int, ...]
MOST = 64  # tensors of a kernel
PRODUCT, SUM = -1, -2  # for a number of tensors
LIBRARY = f"constexpr int MOST = {MOST}, PRODUCT = {PRODUCT}, SUM = {SUM};\n" + r"""
#include <cstddef>
#include <cstdint>
#include <utility>
typedef void Multiply(const void *, int64_t, int64_t, const void *, int64_t, int64_t, const void *, int64_t, void *, int64_t, int64_t, int64_t);
template <size_t> using Any = void *;
template <size_t... I> static int given(void *f, int threads, void *const *x, std::index_sequence<I...>) { return ((int (*)(int, Any<I>...))f)(threads, x[I]...); }
template <size_t N> static int with(void *f, int threads, void *const *x) { return given(f, threads, x, std::make_index_sequence<N>()); }
typedef int (*With)(void *, int, void *const *);
template <size_t... N> static With of(size_t n, std::index_sequence<N...>) {
    static constexpr With all[] = {with<N>...};
    return all[n];
}
// calls: of a kernel its address, its number of tensors, and of each the piece of memory and the bytes in there; of a product PRODUCT for the number, then what is read below. pieces: where they begin, 0 of a sum
// that has not begun. The number of the call that has met an index out of range, or 0
extern "C" int64_t run(int threads, int64_t count, const int64_t *calls, char *const *pieces) {
    for (int64_t n = 1; n <= count; ++n) {
        void *f = (void *)calls[0];
        int64_t tensors = calls[1];
        calls += 2;
        if (tensors >= 0) {
            void *x[MOST];
            for (int64_t i = 0; i < tensors; ++i, calls += 2) x[i] = pieces[calls[0]] + calls[1];
            if (of(tensors, std::make_index_sequence<MOST + 1>())(f, threads, x)) return n;
            continue;
        }
        if (tensors == SUM) {
            const float *x = (const float *)(pieces[calls[0]] + calls[1]), *before = (const float *)pieces[calls[2]];
            float *after = (float *)(pieces[calls[3]] + calls[4]);
            for (int64_t i = 0; i < calls[5]; ++i) after[i] = before ? before[i] + x[i] : x[i];
            calls += 6;
            continue;
        }
        const int64_t *a = calls, *b = calls + 4, *start = calls + 8, *c = calls + 11, *sizes = calls + 13;
        const char *from = start[0] < 0 ? nullptr : pieces[start[0]];
        (*(Multiply *)f)(pieces[a[0]] + a[1], a[2], a[3], pieces[b[0]] + b[1], b[2], b[3], from ? from + start[1] : nullptr, start[2], pieces[c[0]] + c[1], sizes[0], sizes[1], sizes[2]);
        calls += 16;
    }
    return 0;
}
"""


class Chain:
    """A chain on tensors: ``Chain(..)([x, w, total])`` empties the list and is what the chain makes; or None, where the ops' own lines have to run: with several threads, or where a tensor lies otherwise.

    ``reads``: shape and strides of each tensor that is given. Memory is in pieces: the given ones, ``makes`` (shape, strides and dtype of each), then ``inside`` bytes for what stays inside. ``sums``: by the number
    of a given one, which may be None, the made one that begins with it, in its memory. ``calls``: a kernel and where its tensors lie, as pairs of piece and bytes; of a product, left and right operand with
    their strides, what it begins with and the stride of its rows, and where it goes; of ``sum`` what is added to which given one, where that goes, and how many numbers; of None given ones that are let go.
    ``results``: piece, elements from where that begins, shape and strides.
    """

    def __init__(
        self, run: Any, reads: Sequence[tuple[Shape, Shape]], sums: Mapping[int, int], makes: Sequence[tuple[Shape, Shape, torch.dtype]], inside: int, calls: Sequence[tuple[Any, ...]],
        results: Sequence[tuple[int, int, Shape, Shape]],
    ) -> None:
        self.run, self.reads, self.sums, self.inside = run, [(torch.Size(shape), strides) for shape, strides in reads], {n: i for i, n in sums.items()}, inside
        pieces = [(shape, strides) for shape, strides, *_ in (*reads, *makes)]
        self.pieces, self.last = ctypes.c_void_p * (len(pieces) + 1), len(pieces)
        self.results = [(piece, None if (offset, shape, strides) == (0, *pieces[piece]) else (shape, strides, offset)) for piece, offset, shape, strides in results]
        self.parts = list[_Part]()
        new = {len(reads) + n: make for n, make in enumerate(makes)}
        at = 0
        for n in [n for n, (f, *_) in enumerate(calls) if f is None] + [len(calls)]:
            self.parts.append(_part(calls[at:n], new, calls[n][1:] if n < len(calls) else ()))
            at = n + 1

    def __call__(self, given: list[Tensor | None]) -> Sequence[Tensor] | None:
        if torch.get_num_threads() > 1:
            return None
        if not all(x is None or (x.shape == shape and (x.stride() == strides or alike(shape, x.stride(), strides))) for x, (shape, strides) in zip(given, self.reads, strict=True)):
            return None
        inside = torch.empty(self.inside, dtype=torch.uint8) if self.inside else None
        pieces = self.pieces(*[None if x is None else x.data_ptr() for x in given])
        pieces[self.last] = None if inside is None else inside.data_ptr()
        held = list(given)
        given.clear()
        first = len(held)
        for part in self.parts:
            for piece, (size, strides, dtype) in part.makes:
                begun = held[self.sums[piece - first]] if piece - first in self.sums else None
                x = torch.empty_strided(size, strides, dtype=dtype) if begun is None else begun
                held.append(x)
                pieces[piece] = x.data_ptr()
            if wrong := self.run(1, len(part.names), part.calls, pieces):
                raise IndexError(f"{part.names[wrong - 1]}: an index is out of range\n  fix: labels and ids must be below the size of what they pick from")
            for piece in part.ended:
                held[piece] = None
        out = list[Tensor]()
        for piece, lying in self.results:
            whole = held[piece]
            assert whole is not None
            out.append(whole if lying is None else whole.as_strided(lying[0], lying[1], whole.storage_offset() + lying[2]))
        return out


@dataclass(frozen=True)
class _Part:
    """Of a chain, up to where it lets go of what has ended: ``names`` of the kernels, ``calls`` as the library reads them, new tensors in the order of their pieces."""

    names: Sequence[str]
    calls: Any
    makes: Sequence[tuple[int, tuple[Shape, Shape, torch.dtype]]]
    ended: Sequence[int]


def _part(calls: Sequence[tuple[Any, ...]], new: dict[int, tuple[Shape, Shape, torch.dtype]], ended: Sequence[int]) -> _Part:
    """Takes out of ``new`` what is made here."""
    numbers, used = list[int](), set[int]()
    for f, *places in calls:
        if f is sum:
            x, begun, out, count = places
            numbers += [0, SUM, *x, begun, *out, count]
            used.update((x[0], out[0]))
        elif isinstance(f, Product):
            left, left_strides, right, right_strides, start, out = places
            assert f.products is not None
            numbers += [_address(f.products.function), PRODUCT, *left, *left_strides, *right, *right_strides, *start, *out, *f.left, f.shape[1]]
            used.add(out[0])
        else:
            numbers += [_address(f.function), len(places), *(n for place in places for n in place)]
            used.update(piece for piece, _ in places)
    makes = [(piece, new.pop(piece)) for piece in sorted(used.intersection(new))]
    return _Part([getattr(f, "name", "") for f, *_ in calls], (ctypes.c_int64 * len(numbers))(*numbers), makes, ended)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def runner(folder: Path) -> Any:
    """The library's function. Raises CodegenError."""
    run = library(LIBRARY, folder).run
    run.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    run.restype = ctypes.c_int64
    return run
