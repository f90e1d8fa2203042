"""C++ sources as libraries: compiled once, kept in a folder by content (source, flags, processor), loaded by address.

``callables`` makes functions of tensors, of any number of rows, of fragments; one that has no C++ runs as Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from deepseed.codegen import any_rows, cpp_attention, cpp_nests, cpp_products, cpp_updates
from deepseed.codegen.cpp import Function, Shape, source
from deepseed.codegen.cpp_ops import LIBRARY
from deepseed.codegen.expressions import DTYPES, CodegenError
from deepseed.codegen.inductor import compiler, once, processor, python, told_compiler
from deepseed.codegen.kernels import Kernel, is_attention, is_product
from deepseed.codegen.places import alike
from deepseed.codegen.updates import Formula, name_of
from deepseed.ir.kernels import LEAST_ROWS
from deepseed.ops import accumulate_mm

WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()  # where the processor has such registers
FLAGS = (*WIDE, "-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-w")
EXACT = ("-ffp-contract=off",)  # of what ops are written out for: each rounds, as they do one by one
VECTOR_ROWS = 512  # of a product by vectors whose left operand lies row by row: of more a library's copies of the weights pay
VECTOR_DEPTH = 256  # of one whose left operand is turned, at least: of less copying it takes the time
_NUMBER = re.compile(r"(?<![\w.%])\d+(?![\w.])")
Code = Callable[..., Sequence[Tensor]]


def library(text: str, folder: Path, more: Sequence[str] = ()) -> ctypes.CDLL:
    """``more``: flags of the compiler. Raises Refused where the compiler does not take the source, CodegenError where there is none that works, or the folder cannot be written or has nothing that can be loaded."""
    name = compiler()
    if not name:
        raise CodegenError("no C++ compiler\n  fix: install g++ or clang++, or set CXX")
    digest = hashlib.sha256("\0".join([text, *FLAGS, *more, *_identity(name), processor()]).encode()).hexdigest()[:16]
    path = folder / f"cpp-{digest}.so"
    if path.exists():
        with suppress(OSError):  # of a disk that was full, perhaps: it is compiled again
            return ctypes.CDLL(str(path))
    if said := _refusal(name, text, path, more):
        with TemporaryDirectory() as elsewhere:
            if why := _refusal(name, "", Path(elsewhere, "nothing.so")):
                raise CodegenError(f"{name} compiles nothing: {why}\n  fix: CXX=PROGRAM, a C++ compiler that works")
        raise Refused(f"{name} refuses {path.with_suffix('.cpp')}: {said}\n  fix: open a request with that file, or codegen='python'")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CodegenError(f"compiled code cannot be loaded from {folder}: {error}\n  fix: DEEPSEED_CACHE_DIR=FOLDER, one whose files may be executed") from None


def _refusal(name: str, text: str, path: Path, more: Sequence[str] = ()) -> str:
    """Compile ``text`` to ``path``; why the compiler does not, or ""."""
    given, fresh = path.with_suffix(".cpp"), path.with_suffix(f".{os.getpid()}.tmp")
    own = given.with_suffix(f".{os.getpid()}.cpp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(text)
        done = subprocess.run([name, *FLAGS, *more, str(own), "-o", str(fresh)], capture_output=True, text=True, check=False)
        own.replace(given)
        if done.returncode:
            return done.stderr[:1000].strip() or f"it left with {done.returncode}"
        fresh.replace(path)  # at once: other ranks may compile the same
        return ""
    except OSError as error:
        raise CodegenError(f"compiled code cannot be kept in {path.parent}: {error.strerror}\n  fix: DEEPSEED_CACHE_DIR=FOLDER, one that can be written") from None


@cache
def _identity(name: str) -> tuple[str, ...]:
    """What is another one when a compiler has been replaced."""
    at = os.path.realpath(name)
    found = os.stat(at)
    return at, str(found.st_size), str(found.st_mtime_ns)


class Refused(CodegenError):
    """The compiler does not take a source that was written for it."""


def compiled(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> list[Code]:
    """Each kernel of fixed shapes as a callable, all in one library; what has no C++ runs as Python."""
    if not told_compiler(tell):
        return [python(k) for k in wanted]
    made = dict[str, cpp_nests.Function]()
    products = _products([k for k in wanted if is_product(k)], folder, tell)
    for k in wanted:
        if is_product(k):
            continue
        try:
            made[k.name] = _source(k)
        except CodegenError as error:
            once(tell, f"{k.name} runs as plain Python: {error}")
    loaded: dict[str, Any] = {}
    try:
        for alone in (False, True):  # attention adds products up, in a library of its own: each in one step where the processor does that
            if some := [k for k in wanted if k.name in made and is_attention(k) == alone]:
                loaded |= _loaded(some, made, folder, tell, () if alone else EXACT)
    except CodegenError as error:
        once(tell, f"kernels run as plain Python: {error}")
    return [Fixed(k, made[k.name], loaded[k.name]) if k.name in loaded else products.get(k.name) or python(k) for k in wanted]


def _source(k: Kernel) -> cpp_nests.Function:
    """Raises CodegenError."""
    return cpp_attention.source(k) if is_attention(k) else cpp_nests.source(k)


def traffic(k: Kernel) -> None:
    """One kernel reads the operands and writes the results. Raises CodegenError where there is no C++, so that the group runs as its Python function."""
    if not is_product(k):
        _source(k)


def _products(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> dict[str, Code]:
    """Through a library of their own, which is the same for all programs, where that pays; else torch's."""
    found = None
    if wanted and pays():
        try:
            found = product(folder)
        except CodegenError as error:
            once(tell, f"matrix products are torch's: {error}")
    return {k.name: Product(k, found) for k in wanted}


def _loaded(wanted: Sequence[Kernel], made: Mapping[str, cpp_nests.Function], folder: Path, tell: Callable[[str], object], more: Sequence[str]) -> dict[str, Any]:
    """The functions by name, of one library; where the compiler does not take it, of one a half, and so on, without those that it does not take alone."""
    parts = [cpp_nests.LIBRARY, *([cpp_attention.LIBRARY] if any(is_attention(k) for k in wanted) else []), *(made[k.name].text for k in wanted)]
    try:
        found = library("\n".join(parts), folder, more)
    except Refused as error:
        if len(wanted) == 1:
            once(tell, f"{wanted[0].name} runs as plain Python: {error}")
            return {}
        half = len(wanted) // 2
        return _loaded(wanted[:half], made, folder, tell, more) | _loaded(wanted[half:], made, folder, tell, more)
    return {k.name: getattr(found, k.name) for k in wanted}


@cache
def pays() -> bool:
    """Whether these products are ahead of the library's on this machine: known of AVX-512."""
    return bool(torch.cpu.get_capabilities().get("avx512_f", False))


@dataclass(frozen=True)
class Products:
    """The functions of cpp_products. ``in_tiles``: whether a matrix unit computes them, which always pays."""

    function: Any
    in_tiles: bool

    def pay(self, a: Tensor) -> bool:
        """Whether they do for a left operand that lies like ``a``."""
        rows, depth = a.shape
        return (a.stride(1) == 1 and (self.in_tiles or rows <= VECTOR_ROWS)) or (a.stride(0) == 1 and (self.in_tiles or depth >= VECTOR_DEPTH))

    def into(self, out: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> None:
        """``out [m, n] = start + a [m, k] @ b [k, n]``; ``start``: a row for all, ``out`` itself, or nothing."""
        row = out.stride(0) if start is out else 0
        self.function(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), None if start is None else start.data_ptr(), row, out.data_ptr(), *a.shape, b.shape[1])


def product(folder: Path) -> Products:
    """Raises CodegenError."""
    found = library(cpp_products.SOURCE, folder)
    strides, sizes = [ctypes.c_int64] * 2, [ctypes.c_int64] * 3
    found.product.argtypes = [ctypes.c_void_p, *strides, ctypes.c_void_p, *strides, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *sizes]
    found.product.restype = None
    return Products(found.product, bool(found.in_tiles()))


class Product:
    """``a [m, k] @ b [k, n]``, on a row [n] where one is given, in float32 through ``products``; with several threads, or where operands lie in another way, torch's."""

    def __init__(self, k: Kernel, products: Products | None) -> None:
        (op,) = k.fragment.ops
        *self.row, self.left, self.right = [torch.Size(k.fragment.types[r.name].shape) for r in op.refs]
        self.name, self.shape, self.strides, self.python = k.name, (self.left[0], self.right[1]), (self.right[1], 1), python(k)
        self.order = [[i.name for i in k.fragment.inputs].index(r.name) for r in op.refs]  # a kernel reads an operand once, that an op may name twice
        self.products = products if op.type.dtype == "f32" and self.left[0] >= LEAST_ROWS else None
        self.known: dict[Shape, bool] = {}  # by how the left operand lies: whether they pay

    def __call__(self, *xs: Tensor) -> Sequence[Tensor]:
        *row, a, b = [xs[i] for i in self.order]
        if (own := self._own(a, b)) is None or any(x.shape != shape or x.stride() != (1,) for x, shape in zip(row, self.row, strict=True)):
            return self.python(*xs)
        out = torch.empty_strided(self.shape, self.strides, dtype=torch.float32)
        own.into(out, a, b, *row)
        return (out,)

    def added(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``total`` with the product added in place."""
        if (own := self._own(a, b)) is None or not total.is_contiguous():
            return accumulate_mm(total, a, b)
        own.into(total, a, b, total)
        return total

    def _own(self, a: Tensor, b: Tensor) -> Products | None:
        return self.products if torch.get_num_threads() == 1 and a.shape == self.left and b.shape == self.right and self.takes(a.stride()) else None

    def takes(self, strides: Shape) -> bool:
        """Whether one thread computes it here where the left operand has these strides."""
        if self.products is not None and strides not in self.known:
            self.known[strides] = self.products.pay(torch.empty_strided(self.left, strides, device="meta"))
        return self.known.get(strides, False)


class Fixed:
    """A compiled fragment of fixed shapes on tensors."""

    def __init__(self, k: Kernel, f: cpp_nests.Function, function: Any) -> None:
        self.python = python(k)
        self.name, self.function, self.strides, self.outputs = k.name, function, k.strides, f.outputs
        self.makes = [(shape, strides, _dtype(dtype)) for shape, strides, dtype in f.makes]
        self.shapes = [k.fragment.types[o.ref.name].shape for o in k.fragment.outputs]
        written = [(False, n, strides, 0, shape) for n, (shape, strides, _) in enumerate(f.makes)]
        self.plain = [(*o, shape) for o, shape in zip(f.outputs, self.shapes, strict=True)] == written  # each output is what is written, whole
        function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * (len(k.strides) + len(self.makes))]
        function.restype = ctypes.c_int
        self.given = [i.type.shape for i in k.fragment.inputs]
        self.reused, self.into = f.reused, dict[int, int]()

    def reusing(self, into: Mapping[int, int]) -> Fixed:
        """The same, where results are written into operands' memory: by the result's number, the operand's."""
        assert all((i, m) in self.reused for m, i in into.items())
        out = copy(self)
        out.into = dict(into)
        return out

    def __call__(self, *xs: Tensor) -> Sequence[Tensor]:
        if [x.shape for x in xs] != self.given:
            raise ValueError(f"{self.name} was compiled for {[list(s) for s in self.given]} and is given {[list(x.shape) for x in xs]}\n  fix: report it, a program runs on the shapes that it was made for")
        try:
            read = [x if x.stride() == s else _lying(x, s) for x, s in zip(xs, self.strides, strict=True)]
        except RuntimeError:  # it takes several elements for one
            return self.python(*xs)
        made = [torch.empty_strided(shape, strides, dtype=dtype) if n not in self.into else read[self.into[n]].as_strided(shape, strides) for n, (shape, strides, dtype) in enumerate(self.makes)]
        if self.function(torch.get_num_threads(), *[x.data_ptr() for x in read], *[x.data_ptr() for x in made]):
            raise IndexError(f"{self.name}: an index is out of range\n  fix: labels and ids must be below the size of what they pick from")
        if self.plain:
            return made
        return [(read if given else made)[n].as_strided(shape, strides, (read if given else made)[n].storage_offset() + offset) for (given, n, strides, offset), shape in zip(self.outputs, self.shapes, strict=True)]


def update(formulas: Sequence[Formula], folder: Path) -> Update:
    """Optimizers' updates of tensors of a CPU. Raises CodegenError."""
    return Update(formulas, getattr(library(LIBRARY + cpp_updates.source(formulas), folder, EXACT), name_of(formulas)))


class Update:
    """The function on tensors: of each formula one list for each of its ``each``, then its ``shared``."""

    def __init__(self, formulas: Sequence[Formula], function: Any) -> None:
        self.sizes, self.function = [(len(f.each), len(f.shared)) for f in formulas], function
        function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4]
        function.restype = None

    def __call__(self, *given: Any) -> None:
        counts, sizes, tensors, shared, at = list[int](), list[int](), list[int](), list[int](), 0
        for each, numbers in self.sizes:
            lists: Sequence[Sequence[Tensor]] = given[at : at + each]
            counts.append(len(lists[0]))
            sizes += [x.numel() for x in lists[0]]
            tensors += [x.data_ptr() for row in zip(*lists, strict=True) for x in row]
            shared += [x.data_ptr() for x in given[at + each : at + each + numbers]]
            at += each + numbers
        self.function(torch.get_num_threads(), *[(kind * len(numbers))(*numbers) for kind, numbers in ((ctypes.c_int64, counts), (ctypes.c_int64, sizes), (ctypes.c_void_p, tensors), (ctypes.c_void_p, shared))])


def _dtype(name: str) -> Any:
    return getattr(torch, DTYPES[name].removeprefix("torch."))


Wanted = Mapping[Kernel, Sequence[Shape]]  # kernels, and how the outputs of each lie


def functions(wanted: Wanted, free: Mapping[int, str]) -> tuple[dict[str, Function], dict[str, str]]:
    """Each kernel's C++, by name, and why some have none."""
    out, why = dict[str, Function](), dict[str, str]()
    for k, lying in wanted.items():
        try:
            out[k.name] = source(k.fragment, k.name, k.strides, lying, free)
        except CodegenError as error:
            why[k.name] = str(error)
    return out, why


def callables(wanted: Wanted, made: Mapping[str, Function], loaded: Any, free: Mapping[int, str]) -> dict[str, Code]:
    """What computes each kernel, by name; ``loaded``: the library that has the functions ``made``."""
    return {k.name: _Rows(k, made[k.name], lying, getattr(loaded, k.name)) if k.name in made else python(replace(k, source=any_rows.function(k, free))) for k, lying in wanted.items()}


class _Rows:
    """A compiled fragment on tensors."""

    def __init__(self, k: Kernel, f: Function, lying: Sequence[Shape], function: Any) -> None:
        self.function, self.free, self.rows = function, f.free, f.rows
        types = [k.fragment.types[o.ref.name] for o in k.fragment.outputs]
        self.strides, self.inputs = k.strides, [i.type.shape for i in k.fragment.inputs]
        self.outputs = [(t.shape, s, getattr(torch, DTYPES[t.dtype].removeprefix("torch."))) for t, s in zip(types, lying, strict=True)]
        function.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * (len(self.strides) + len(types))]
        function.restype = None
        self.known: dict[int, tuple[list[Shape], list[tuple[Shape, Shape, Any]]]] = {}

    def __call__(self, *xs: Tensor) -> list[Tensor]:
        n = 1
        if self.rows is not None:
            i, d, k = self.rows
            n = xs[i].shape[d] // k
        strides, outputs = self.known.get(n) or self._of(n)
        read = [x if x.stride() == s else _lying(x, s) for x, s in zip(xs, strides, strict=True)]
        out = [torch.empty_strided(shape, s, dtype=dtype) for shape, s, dtype in outputs]
        self.function(n, torch.get_num_threads(), *[x.data_ptr() for x in read], *[x.data_ptr() for x in out])
        return out

    def _of(self, n: int) -> tuple[list[Shape], list[tuple[Shape, Shape, Any]]]:
        """How tensors of ``n`` rows lie."""
        def at(sizes: Shape) -> Shape:
            return tuple(size // self.free * n if self.free and size and size % self.free == 0 else size for size in sizes)

        if len(self.known) > 1 << 12:
            self.known.clear()
        self.known[n] = [at(s) for s in self.strides], [(at(shape), at(s), dtype) for shape, s, dtype in self.outputs]
        return self.known[n]


def _lying(x: Tensor, strides: Shape) -> Tensor:
    """The same elements where the kernel looks for them."""
    if alike(x.shape, x.stride(), strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
