"""Attention as Triton kernels: the softmax of a row of scores is made while keys are read, so that no score is written to memory.

    sdpa:           attend    programs have queries of one head, and go through the keys
    sdpa_backward:  for_heads  programs have one head of k and v whole, where its keys are one block, and go through all queries of the heads that share it: dq, dk, dv
                    for_queries  where they are more: programs have queries, and go through the keys: dq; and of each query the sum over features of out * gradient
                    for_keys  programs have keys of one head of k and v, and go through all queries of the heads that share it, with those sums: dk, dv

Scores are made again in the backward pass. No sum is made by more than one program, so that a run repeats bit for bit; so more keys than a program holds are two kernels, and both read q, k, v and
the gradient (docs/design.md).
What the ops mean: deepseed/ops/attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from deepseed.codegen.block_sizes import Blocks, attention_sizes, head_sizes
from deepseed.codegen.expressions import DTYPES, CodegenError, listed
from deepseed.codegen.triton_ops import LIBRARY, TYPES, computed
from deepseed.codegen.triton_writer import POINTERS, Launch
from deepseed.ir.program import FLOATS, ITEMSIZE, Op, Program, Ref
from deepseed.ir.text import format_program

GRID = 65535  # programs along the second axis that a device takes
ATTENTION = ("sdpa", "sdpa_backward")


def of(fragment: Program) -> Op | None:
    """The op, where a fragment is attention."""
    found = [op for op in fragment.ops if op.target in ATTENTION]
    if found and len(fragment.ops) > 1:
        raise CodegenError(f"%{found[0].name} = {found[0].target} among {len(fragment.ops)} ops: attention has a kernel of its own\n  fix: none is needed, the group runs as Python")
    return found[0] if found else None


def written(fragment: Program, chosen: Mapping[str, Blocks]) -> tuple[str, tuple[Launch, ...]]:
    """The file, and what it launches."""
    op = of(fragment)
    assert op is not None
    return _Attention(fragment, op, chosen).file()


@dataclass
class _Attention:
    p: Program
    op: Op
    chosen: Mapping[str, Blocks]

    def __post_init__(self) -> None:
        args = list(self.op.args)
        back = self.op.target == "sdpa_backward"
        if len(args) == (6 if back else 3):
            args.insert(4 if back else 3, None)
        names = ("g", "q", "k", "v", "mask", "out", "lse") if back else ("q", "k", "v", "mask")
        self.names = {name: a.name for name, a in zip(names, args, strict=True) if isinstance(a, Ref)}
        self.type = {name: self.p.types[value] for name, value in self.names.items()}
        q, k, v = (self.type[n] for n in "qkv")
        self.b, self.h, self.s, self.d = q.shape
        self.t, self.e, self.group = k.shape[2], v.shape[3], self.h // k.shape[1]
        self.keys = min(self.s, self.t) if self.causal else self.t  # that some query sees
        self.dtype, self.wide = q.dtype, computed(q.dtype)
        if self.dtype not in FLOATS or {k.dtype, v.dtype} != {self.dtype} or max(self.d, self.e) > 256 or self.b * self.h > GRID or 0 in (*q.shape, *k.shape, *v.shape):
            raise CodegenError(f"%{self.op.name} = {self.op.target} of {', '.join(str((t.dtype, list(t.shape))) for t in (q, k, v))}: no Triton kernel for it: one float dtype, at most 256 features, {GRID} heads of all rows, nothing empty\n  fix: none is needed, the group runs as Python")

    @cached_property
    def scale(self) -> str:
        value = self.op.kw("scale")
        assert isinstance(value, int | float)
        return repr(float(value))

    @property
    def whole(self) -> Blocks | None:
        """Of a program that has all keys of a head."""
        return head_sizes(self.s * self.group, self.keys, max(self.d, self.e), ITEMSIZE[self.dtype])

    @property
    def causal(self) -> bool:
        return bool(self.op.kw("causal", False))

    def file(self) -> tuple[str, tuple[Launch, ...]]:
        self.kernels: list[str] = []
        self.signatures: list[str] = []
        self.calls: list[str] = []
        self.launched: list[Launch] = []
        if self.op.target == "sdpa":
            self._forward()
        else:
            self._backward()
        lines = ['"""' + "\n".join(["Generated, see deepseed/codegen/triton_attention.py.", "", *format_program(self.p).splitlines()]) + '\n"""', "", "import torch", "import triton", "import triton.language as tl"]
        lines += ["", "", LIBRARY["product"], *(f"\n\n{k}" for k in self.kernels)]
        lines += ["", "", "KERNELS = {  # types of the parameters, block sizes, warps", *(f"    {line}" for line in self.signatures), "}"]
        lines += ["", "", f"def launch({', '.join(i.name for i in self.p.inputs)}):", *(f"    {c}" for c in self._named() + self.calls)]
        results = ("o_out", "o_lse") if self.op.target == "sdpa" else ("o_dq", "o_dk", "o_dv")
        place = dict(zip(self.op.results, results, strict=True))
        return "\n".join([*lines, f"    return {listed([place[o.ref.name] for o in self.p.outputs])}"]) + "\n", tuple(self.launched)

    def _named(self) -> list[str]:
        lines = [f"{name} = {value}" for name, value in self.names.items() if name != "mask" and name != value]
        return lines + ([f"mask = {self.names['mask']}.expand({self.b}, {self.h}, {self.s}, {self.t})"] if "mask" in self.names else [])

    # kernels ----------------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        made = {"o_out": (self.b, self.h, self.s, self.e)}
        self._allocate(made, self.dtype)
        self.calls.append(f"o_lse = torch.empty({listed((self.b, self.h, self.s))}, dtype={DTYPES[self.wide]}, device=q.device)")
        body = [
            *self._program("s", "SB", self.h), *self._axis("d", self.d), *self._axis("e", self.e),
            *self._load("q", "s[:, None]", "d[None, :]", self._inside("s", "d")),
            f'most = tl.full([SB], float("-inf"), {TYPES[self.wide]})', f"total = tl.zeros([SB], {TYPES[self.wide]})", f"acc = tl.zeros([SB, EB], {TYPES[self.wide]})",
            f"for first in range(0, {self._keys_seen()}, TB):",
            *self._nested([
                "t = first + tl.arange(0, TB)", f"t_in = t < {self.keys}",
                *self._load("k", "t[None, :]", "d[:, None]", self._inside("d", "t"), f"// {self.group}"),
                *self._scores("q_, k_"),
                "more = tl.maximum(most, tl.max(score, 1))", 'shift = tl.where(more == float("-inf"), 0.0, more)', "p = tl.exp(score - shift[:, None])",
                "less = tl.exp(most - shift)", "total = total * less + tl.sum(p, 1)", "acc = acc * less[:, None]",
                *self._load("v", "t[:, None]", "e[None, :]", self._inside("t", "e"), f"// {self.group}"),
                "acc = product(p.to(v_.dtype), v_, acc)", "most = more",
            ]),
            "some = total != 0", *self._store("out", "s[:, None]", "e[None, :]", "acc / tl.where(some, total, 1.0)[:, None]", self._inside("s", "e")),
            f"tl.store(o_lse + {self._row()}, tl.where(some, most + tl.log(tl.where(some, total, 1.0)), 0.0), mask=s_in)",
        ]  # fmt: skip
        read = ("q", "k", "v", *self._mask())
        self._kernel("attend", read, (*made, "o_lse"), body, "SB", self.s, self.h, self._loaded(*read), self._bytes_of(made, self.dtype) + self._rows())

    def _backward(self) -> None:
        self.calls.append("lse = lse.contiguous()")
        dq = {"o_dq": (self.b, self.h, self.s, self.d)}
        dkv = {"o_dk": (self.b, self.h // self.group, self.t, self.d), "o_dv": (self.b, self.h // self.group, self.t, self.e)}
        self._allocate(dq | dkv, self.dtype)
        if self.whole is not None:
            self._for_keys("for_heads", self._inner_sum(), dq | dkv)
            return
        self.calls.append(f"inner_ = torch.empty({listed((self.b, self.h, self.s))}, dtype={DTYPES[self.wide]}, device=q.device)")
        self._for_queries(dq)
        self._for_keys("for_keys", [f"sum_ = tl.load(inner_ + {self._row()}, mask=s_in, other=0)"], dkv)

    def _for_queries(self, dq: Mapping[str, tuple[int, ...]]) -> None:
        loop = [
            "t = first + tl.arange(0, TB)", f"t_in = t < {self.keys}",
            *self._load("k", "t[:, None]", "d[None, :]", self._inside("t", "d"), f"// {self.group}"), *self._load("v", "t[:, None]", "e[None, :]", self._inside("t", "e"), f"// {self.group}"),
            *self._again("q_, tl.trans(k_)", "g_, tl.trans(v_)"), "dq = product(ds.to(k_.dtype), k_, dq)",
        ]  # fmt: skip
        body = [
            *self._program("s", "SB", self.h), *self._axis("d", self.d), *self._axis("e", self.e), *self._load("q", "s[:, None]", "d[None, :]", self._inside("s", "d")),
            *self._load("g", "s[:, None]", "e[None, :]", self._inside("s", "e")),
            *self._inner_sum(), f"tl.store(inner_ + {self._row()}, sum_, mask=s_in)", f"lse_ = tl.load(lse + {self._row()}, mask=s_in, other=0)",
            f"dq = tl.zeros([SB, DB], {TYPES[self.wide]})", f"for first in range(0, {self._keys_seen()}, TB):", *self._nested(loop),
            *self._store("dq", "s[:, None]", "d[None, :]", "dq", self._inside("s", "d")),
        ]  # fmt: skip
        read = ("q", "k", "v", *self._mask(), "g", "out")
        self._kernel("for_queries", (*read, "lse"), ("inner_", *dq), body, "SB", self.s, self.h, self._loaded(*read) + self._rows(), self._bytes_of(dq, self.dtype) + self._rows())

    def _for_keys(self, name: str, inner: list[str], made: Mapping[str, tuple[int, ...]]) -> None:
        """``inner``: how the sums over features of out * gradient come. With dq among ``made``: of all keys, that is of one block."""
        whole = "o_dq" in made
        loop = [
            "s = first + tl.arange(0, SB)", f"s_in = s < {self.s}", *self._load("g", "s[:, None]", "e[None, :]", self._inside("s", "e")), *inner,
            *self._load("q", "s[:, None]", "d[None, :]", self._inside("s", "d")), f"lse_ = tl.load(lse + {self._row()}, mask=s_in, other=0)",
            *self._again("q_, tl.trans(k_)", "g_, tl.trans(v_)"),
            "dv = product(tl.trans(p).to(g_.dtype), g_, dv)", "dk = product(tl.trans(ds).to(q_.dtype), q_, dk)",
        ]  # fmt: skip
        if whole:
            loop += self._store("dq", "s[:, None]", "d[None, :]", f"product(ds.to(k_.dtype), k_, tl.zeros([SB, DB], {TYPES[self.wide]}))", self._inside("s", "d"))
        body = [
            *self._program("t", "TB", self.h // self.group, "head_k"), *self._axis("d", self.d), *self._axis("e", self.e),
            *self._load("k", "t[:, None]", "d[None, :]", self._inside("t", "d"), head="head_k"), *self._load("v", "t[:, None]", "e[None, :]", self._inside("t", "e"), head="head_k"),
            f"dk = tl.zeros([TB, DB], {TYPES[self.wide]})", f"dv = tl.zeros([TB, EB], {TYPES[self.wide]})",
            f"for n in range(head_k * {self.group}, head_k * {self.group} + {self.group}):",
            *self._nested(["head = tl.cast(n, tl.int64)", f"for first in range({'tl.program_id(0) * TB' if self.causal else '0'}, {self.s}, SB):", *self._nested(loop)]),
            *self._store("dk", "t[:, None]", "d[None, :]", "dk", self._inside("t", "d"), head="head_k"), *self._store("dv", "t[:, None]", "e[None, :]", "dv", self._inside("t", "e"), head="head_k"),
        ]  # fmt: skip
        read = ("q", "k", "v", *self._mask(), "g", *(("out",) if whole else ()))
        given = (*read, "lse", *(() if whole else ("inner_",)))
        self._kernel(name, given, tuple(made), body, "TB", self.t, self.h // self.group, self._loaded(*read) + (1 if whole else 2) * self._rows(), self._bytes_of(made, self.dtype))

    def _inner_sum(self) -> list[str]:
        """Of each query, over the features of out * gradient."""
        wide = f".to({TYPES[self.wide]})"
        return [*self._load("out", "s[:, None]", "e[None, :]", self._inside("s", "e")), f"sum_ = tl.sum(out_{wide} * g_{wide}, 1)"]

    def _row(self) -> str:
        return f"(batch * {self.h} + head) * {self.s} + s"

    def _rows(self) -> int:
        """Bytes of a number for each query."""
        return self.b * self.h * self.s * ITEMSIZE[self.wide]

    def _kernel(self, name: str, read: tuple[str, ...], made: tuple[str, ...], body: list[str], block: str, length: int, heads: int, bytes_read: int, bytes_written: int) -> None:
        usual = self.whole if name == "for_heads" else attention_sizes(self.s, self.t, max(self.d, self.e), ITEMSIZE[self.dtype], name)
        blocks = self.chosen.get(name) or usual
        assert blocks is not None
        sizes = {k: n for k, n in {"SB": blocks.x, "TB": blocks.r, "DB": _block(self.d), "EB": _block(self.e)}.items() if any(k in line for line in body)}
        types, arguments = dict[str, object](), []
        for value in (*read, *made):
            word = value.removeprefix("o_")
            dtype = self.type[value].dtype if value in self.type else self.wide if value in ("inner_", "o_lse") else self.dtype
            types[value] = f"*{POINTERS[dtype]}"
            arguments.append(value)
            strides = self._strides(value)
            for n, stride in enumerate(strides):
                types[f"{word}_s{n}"] = stride
                arguments.append(f"{value}.stride({n})")
        parameters = [*types, *(f"{k}: tl.constexpr" for k in sizes)]
        self.kernels.append("\n".join(["@triton.jit", f"def {name}({', '.join(parameters)}):", *(f"    {line}" for line in body)]))
        self.signatures.append(f'"{name}": ({types | sizes!r}, {blocks.warps}),'.replace("'", '"'))
        given = [*arguments, *(f"{k}={n}" for k, n in sizes.items()), f"num_warps={blocks.warps}"]
        self.calls.append(f"{name}[{listed((-(-length // sizes[block]), self.b * heads))}]({', '.join(given)})")
        self.launched.append(Launch(name, blocks, True, bytes_read, bytes_written))

    def _strides(self, value: str) -> tuple[int, ...]:
        """What a compiler may take the strides to be: rows in order, heads inside rows; ``lse`` lies in order for certain."""
        word = value.removeprefix("o_")
        if word in ("lse", "inner_"):
            return ()
        if word == "mask":
            full = (self.b, self.h, self.s, self.t)
            shape = (1,) * (4 - len(self.type["mask"].shape)) + self.type["mask"].shape
            steps = [0 if n == 1 and m > 1 else 1 for n, m in zip(shape, full, strict=True)]
            return tuple(keep * in_order(shape)[n] for n, keep in enumerate(steps))
        heads = self.h // self.group if word in ("k", "v", "dk", "dv") else self.h
        length, features = self.t if word in ("k", "v", "dk", "dv") else self.s, self.d if word in ("q", "k", "dq", "dk") else self.e
        return (length * heads * features, features, heads * features, 1)

    # lines ------------------------------------------------------------------------------------------------------------

    def _program(self, axis: str, block: str, heads: int, head: str = "head") -> list[str]:
        length = {"s": self.s, "t": self.keys}[axis]
        stored = [f"t_made = t < {self.t}"] if axis == "t" and self.keys < self.t else []
        return [
            f"{axis} = tl.program_id(0) * {block} + tl.arange(0, {block})", f"{axis}_in = {axis} < {length}", *stored,
            f"batch = (tl.program_id(1) // {heads}).to(tl.int64)", f"{head} = tl.program_id(1) % {heads}",
        ]  # fmt: skip

    @staticmethod
    def _axis(name: str, size: int) -> list[str]:
        block = f"{name.upper()}B"
        return [f"{name} = tl.arange(0, {block})"] + ([f"{name}_in = {name} < {size}"] if _block(size) != size else [])

    def _inside(self, first: str, second: str) -> str:
        """The mask of a block of two axes."""
        whole = {"d": _block(self.d) == self.d, "e": _block(self.e) == self.e}
        words = [f"{axis}_in{at}" for axis, at in ((first, "[:, None]"), (second, "[None, :]")) if not whole.get(axis, False)]
        return " & ".join(words)

    def _load(self, value: str, rows: str, features: str, mask: str, group: str = "", head: str = "head") -> list[str]:
        head = f"({head} {group})" if group and self.group > 1 else head
        return [f"{value}_ = tl.load({value} + {_place(value, head, rows, features)}" + (f", mask={mask}, other=0)" if mask else ")")]

    def _store(self, value: str, rows: str, features: str, text: str, mask: str, head: str = "head") -> list[str]:
        if self.keys < self.t:
            mask = mask.replace("t_in", "t_made")
        return [f"tl.store(o_{value} + {_place(value, head, rows, features)}, {text}" + (f", mask={mask})" if mask else ")")]

    def _scores(self, operands: str) -> list[str]:
        """Scaled, with the mask; what a query does not see is minus infinity."""
        lines = [f"score = product({operands}, tl.zeros([SB, TB], {TYPES[self.wide]})) * {self.scale}", "seen = s_in[:, None] & t_in[None, :]"]
        if self.causal:
            lines.append("seen = seen & (s[:, None] >= t[None, :])")
        if "mask" in self.names:
            lines += self._load("mask", "s[:, None]", "t[None, :]", "seen")
            bias = 'tl.where(mask_.to(tl.int1), 0.0, float("-inf"))' if self.type["mask"].dtype == "bool" else "mask_"  # added, as PyTorch does: what both masks say in one bit ended the compiler for gfx942
            lines.append(f"score = score + {bias}")
        return [*lines, 'score = tl.where(seen, score, float("-inf"))']

    def _again(self, keys: str, values: str) -> list[str]:
        """The probabilities of the forward pass, and the gradient of the scores."""
        return [
            *self._scores(keys), "p = tl.exp(score - lse_[:, None])", f"dp = product({values}, tl.zeros([SB, TB], {TYPES[self.wide]}))", f"ds = p * (dp - sum_[:, None]) * {self.scale}",
        ]  # fmt: skip

    def _keys_seen(self) -> str:
        return f"min({self.keys}, tl.program_id(0) * SB + SB)" if self.causal else str(self.keys)

    def _mask(self) -> tuple[str, ...]:
        return ("mask",) if "mask" in self.names else ()

    @staticmethod
    def _nested(lines: list[str]) -> list[str]:
        return [f"    {line}" for line in lines]

    def _allocate(self, made: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        """Heads inside rows, as the program says (deepseed.rules.strides)."""
        for name, (b, h, s, d) in made.items():
            self.calls.append(f"{name} = torch.empty({listed((b, s, h, d))}, dtype={DTYPES[dtype]}, device=q.device).transpose(1, 2)")

    def _loaded(self, *values: str) -> int:
        """Bytes that a launch loads, each once an operand: of k and v the keys that some query sees, of a mask the places that are seen."""
        loaded = 0
        for value in values:
            *outer, rows, columns = (1,) * (4 - len(self.type[value].shape)) + self.type[value].shape
            if value in ("k", "v"):
                places = self.keys * columns
            elif value == "mask" and self.causal and (rows, columns) == (self.s, self.t):
                places = self.keys * (self.keys + 1) // 2 + (self.s - self.keys) * self.keys
            elif value == "mask":
                places = rows * min(columns, self.keys)
            else:
                places = rows * columns
            loaded += prod(outer) * places * ITEMSIZE[self.type[value].dtype]
        return loaded

    @staticmethod
    def _bytes_of(made: Mapping[str, tuple[int, ...]], dtype: str) -> int:
        return sum(map(prod, made.values())) * ITEMSIZE[dtype]


def _place(value: str, head: str, rows: str, features: str) -> str:
    """Where elements lie. In 64 bits: an index and a stride of 32 bits each are multiplied in 32, and a long sequence of many heads has more elements than that.
    The order of the sums is the one of which no kernel spilled (tests/test_ahead_of_time.py)."""
    return f"{rows}.to(tl.int64) * {value}_s2 + {features}.to(tl.int64) * {value}_s3 + (batch * {value}_s0 + {head}.to(tl.int64) * {value}_s1)"


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose rows lie in order."""
    out, n = [], 1
    for size in reversed(shape):
        out.append(n)
        n *= size
    return tuple(reversed(out))
