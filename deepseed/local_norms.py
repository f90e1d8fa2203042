"""``bn(local)``: batch norms whose statistics are those of each microbatch, as plain gradient accumulation has them.

The statistics of the whole batch are exact under any plan, and cost a loop over the microbatches for each batch norm on a path. A user who
does not want that says so in the plan, and gets another program: the captured one with the microbatches of a batch norm as channels of
their own. All plans, and ``verify``'s eager side, then compute that program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

from deepseed.ir.contract import PassError
from deepseed.ir.program import Arg, Builder, Op, Program, Ref, Type

_FORWARD = {"aten._native_batch_norm_legit_functional": (5, 6), "aten._batch_norm_with_update_functional": (None, 5), "aten._native_batch_norm_legit.no_stats": (3, 4)}
_BACKWARD = ("aten.native_batch_norm_backward", "aten.batch_norm_backward")


def with_local_norms(p: Program, ranks: int, m: int) -> Program:
    """``p`` with the batch norms of its forward over the rows of one microbatch of ``m``; a rank of ``ranks`` has every ranks-th run of rows, and
    microbatch i is the i-th part of each. Raises PassError where the rows do not divide."""
    if m == 1:
        return p
    out = _Local(p, ranks, m)
    for op in p.ops:
        out.put(op)
    return out.builder.program(outputs=p.outputs)


@dataclass
class _Local:
    p: Program
    ranks: int
    m: int

    def __post_init__(self) -> None:
        self.builder = Builder(self.p)
        self.saved: dict[str, Ref] = {}  # a statistic -> the same of each microbatch
        self.op = self.p.ops[0]

    def put(self, op: Op) -> None:
        self.op = op
        if op.target in _FORWARD and self._training(op):
            self._forward(op)
        elif op.target in _BACKWARD and op.args[7]:
            self._backward(op)
        else:
            self.builder.emit(op)

    def _training(self, op: Op) -> bool:
        at = _FORWARD[op.target][0]
        return at is None or bool(op.args[at])

    def _forward(self, op: Op) -> None:
        x, weight, bias = op.args[:3]
        at = _FORWARD[op.target][1]
        factor = op.args[at]
        assert isinstance(x, Ref) and isinstance(factor, int | float)
        running = [a for a in op.args[3:5] if isinstance(a, Ref)] if at > 4 else []
        args: tuple[Arg, ...] = (self._split(x), self._each(weight), self._each(bias), *(self._each(a) for a in running), *op.args[3 + len(running) :])
        results = [self.builder.fresh(f"{r}.local") for r in op.results]
        types = [self._split_type(op.types[0]), *(self._each_type(t) for t in op.types[1:])]
        made = self.builder.emit(replace(op, results=tuple(results), args=args, types=tuple(types), origin=""))
        self._join(Ref(made.results[0]), op.results[0], op.types[0])
        self.saved.update((old, Ref(new)) for old, new in zip(op.results[1:3], results[1:3], strict=True))
        for old, new, result, type_ in zip(running, results[-len(running) :] if running else (), op.results[-len(running) :], op.types[-len(running) :], strict=False):
            self._run(old, Ref(new), float(factor), result, type_)
        if unserved := [r for r in op.results[1 : len(op.results) - len(running)] if any(isinstance(u, Op) and u.target not in _BACKWARD for u in self.p.uses[r])]:
            raise PassError(f"bn(local): %{unserved[0]}, a statistic of {op.path or 'a batch norm'}, is read outside of its norm\n  fix: a plan without bn(local)")

    def _backward(self, op: Op) -> None:
        grad, x, weight = op.args[:3]
        assert isinstance(grad, Ref) and isinstance(x, Ref)
        statistics = tuple(self.saved.get(a.name, a) if isinstance(a, Ref) else a for a in op.args[5:7])
        old = tuple(self._each(a) for a in op.args[3:5])
        args = (self._split(grad), self._split(x), self._each(weight), *old, *statistics, *op.args[7:])
        mask = op.args[9]
        asked = [n for n in range(3) if isinstance(mask, tuple) and mask[n]]
        results = tuple(self.builder.fresh(f"{r}.local") for r in op.results)
        types = tuple(self._split_type(t) if n == 0 else self._each_type(t) for n, t in zip(asked, op.types, strict=True))
        self.builder.emit(replace(op, results=results, args=args, types=types, origin=""))
        for n, made, result, type_ in zip(asked, results, op.results, op.types, strict=True):
            if n == 0:
                self._join(Ref(made), result, type_)
            else:
                rows = self._reshape(Ref(made), (self.m, *type_.shape))
                self._emit("sum", (rows,), type_, result, dims=(0,), keepdim=False)

    # microbatches as channels -----------------------------------------------------------------------------------------

    def _split(self, x: Ref) -> Ref:
        """[N, C, ..] -> [N / m, m C, ..]"""
        t = self.builder.types[x.name]
        n, c, *rest = t.shape
        if n % (self.ranks * self.m):
            raise PassError(
                f"bn(local) of {self.op.path or 'a batch norm'}: {n} rows are not {self.ranks} data-parallel ranks x {self.m} microbatches "
                f"({n} = {self.ranks * self.m} * {n // (self.ranks * self.m)} + {n % (self.ranks * self.m)})\n  fix: another mb, or a batch that divides"
            )
        rows = n // (self.ranks * self.m)
        apart = self._reshape(x, (self.ranks, self.m, rows, c, *rest))
        dims = (0, 2, 1, *range(3, 4 + len(rest)))
        turned = self._emit("permute", (apart,), replace(t, shape=(self.ranks, rows, self.m, c, *rest)), "", dims=dims)
        return self._reshape(turned, self._split_type(t).shape)

    def _join(self, x: Ref, result: str, t: Type) -> None:
        n, c, *rest = t.shape
        apart = self._reshape(x, (self.ranks, n // (self.ranks * self.m), self.m, c, *rest))
        shape = (self.ranks, self.m, n // (self.ranks * self.m), c, *rest)
        turned = self._emit("permute", (apart,), replace(t, shape=shape), "", dims=(0, 2, 1, *range(3, 4 + len(rest))))
        self._emit("reshape", (turned,), t, result)

    def _each(self, x: Arg) -> Arg:
        """[C] -> [m C], the same for each microbatch."""
        if not isinstance(x, Ref):
            return x
        t = self.builder.types[x.name]
        wide = self._emit("expand", (self._reshape(x, (1, *t.shape)),), replace(t, shape=(self.m, *t.shape)), "")
        return self._reshape(wide, self._each_type(t).shape)

    def _run(self, old: Ref, new: Ref, factor: float, result: str, t: Type) -> None:
        """The running statistic after all microbatches in turn, from what each alone would make of the old one."""
        keep = 1 - factor
        index = self._emit("iota", (), Type("i64", (self.m,)), "", start=0, step=1)
        ahead = self._reshape(self._emit("cast", (index,), Type(t.dtype, (self.m,)), ""), (self.m, 1))
        ahead = self._emit("aten.sub.Tensor", (ahead, self.m - 1), Type(t.dtype, (self.m, 1)), "")  # 1 - m .. 0
        if keep > 0:
            weight = self._emit("aten.exp", (self._emit("aten.mul.Tensor", (ahead, -log(keep)), Type(t.dtype, (self.m, 1)), ""),), Type(t.dtype, (self.m, 1)), "")
        else:  # only the last one counts
            weight = self._emit("cast", (self._emit("aten.eq.Scalar", (ahead, 0), Type("bool", (self.m, 1)), ""),), Type(t.dtype, (self.m, 1)), "")
        parts = self._emit("aten.mul.Tensor", (self._reshape(new, (self.m, *t.shape)), weight), replace(t, shape=(self.m, *t.shape)), "")
        total = self._emit("sum", (parts,), t, "", dims=(0,), keepdim=False)
        left = keep**self.m - keep * sum(keep**i for i in range(self.m))
        self._emit("aten.add.Tensor", (self._emit("aten.mul.Tensor", (old, left), t, ""), total), t, result)

    def _split_type(self, t: Type) -> Type:
        return replace(t, shape=(t.shape[0] // self.m, self.m * t.shape[1], *t.shape[2:]))

    def _each_type(self, t: Type) -> Type:
        return replace(t, shape=(self.m * t.shape[0],)) if t.numel and t.shape else t

    def _reshape(self, x: Ref, shape: Sequence[int]) -> Ref:
        return self._emit("reshape", (x,), replace(self.builder.types[x.name], shape=tuple(shape)), "")

    def _emit(self, target: str, args: tuple[Arg, ...], t: Type, result: str, **kwargs: Arg) -> Ref:
        name = result or self.builder.fresh(f"{self.op.name}.{target.split('.')[1] if target.startswith('aten.') else target}")
        made = Op((name,), target, args, (t,), tuple(kwargs.items()), self.op.phase, self.op.path, self.op.line)
        self.builder.emit(made)
        return Ref(name)
