"""Rows that are multiplied with a matrix of their own become routed products, helper of ``canonicalize``.

A model with experts may look up each row's matrix and multiply row by row: ``bmm(w[ids], x)``. That makes a copy of a matrix
for every row, [rows, k, n], in the forward, and another for the gradient. ``routed_mm`` reads the matrices where they are, and
``routed_outer`` adds up the gradients of each matrix. Tables looked up by the same ids (biases of experts) become embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from deepseed.ir.program import Arg, Builder, Op, Program, Ref, Type

COUNTED = ("aten.topk", "aten.sort", "aten.argmax", "aten.argmin", "aten.max.dim", "aten.min.dim", "aten.argsort", "iota")  # integers >= 0
VIEWS = ("reshape", "expand", "permute", "slice", "cast", "aten.clone")


def route_products(p: Program) -> Program:
    """before: %m = aten.index.Tensor(%w, [%ids]) : f32[256, 128, 64]
               %y = aten.bmm(%m, %x) : f32[256, 128, 1]
    after:     %x.rows = reshape(%x) : f32[256, 64]
               %w.turned = permute(%w, dims=[0, 2, 1]) : f32[4, 64, 128]
               %y.routed_mm = routed_mm(%x.rows, %w.turned, %ids) : f32[256, 128]
               %y = reshape(%y.routed_mm) : f32[256, 128, 1]
    """
    return _Router(p).run()


@dataclass(frozen=True)
class _Found:
    """A use of ``op``'s result through views that keep its last two dimensions, or swap them, and casts."""

    op: Op
    swapped: bool
    casts: tuple[str, ...]


class _Router:
    def __init__(self, p: Program) -> None:
        self.p = p
        self.out = Builder(p)
        self.routing: set[str] = set()  # where ids of routed products come from
        self.by: Op  # the op that is being replaced

    def run(self) -> Program:
        for op in self.p.ops:
            if op.target == "aten.bmm" and (found := self._product(op)) is not None:
                self.routing.add(self._root(found[1]))
            elif (ids := self._added(op)) is not None and self._outer(op) is not None:
                self.routing.add(self._root(ids))
        if not self.routing:
            return self.p
        for op in self.p.ops:
            self.by = op
            if not (self._replace_product(op) or self._replace_outer(op) or self._replace_table(op)):
                self.out.emit(op)
        return self.out.program()

    # what is there ---------------------------------------------------------------------------------------------------

    def _product(self, op: Op) -> tuple[int, Ref, _Found] | None:
        """Which operand of a bmm is looked up in a table of matrices, by which ids; the other is one row (column) each."""
        a, b = (self.p.types[r.name].shape for r in op.refs)
        for k, single in ((1, a[1]), (0, b[2])):
            found = self._through(op.refs[k]) if single == 1 else None
            ids = None if found is None else self._lookup(found.op)
            if found is not None and ids is not None and len(self.p.types[found.op.refs[0].name].shape) == 3:
                return k, ids, found
        return None

    def _outer(self, op: Op) -> _Found | None:
        """The bmm of columns and rows that a table of matrices is added up from."""
        if len(op.type.shape) != 3:
            return None
        found = self._through(op.refs[-1])
        product = found is not None and found.op.target == "aten.bmm" and self.p.types[found.op.refs[0].name].shape[2] == 1
        return found if product else None

    def _through(self, ref: Ref) -> _Found | None:
        swapped = False
        casts: list[str] = []
        while (op := self.p.producers.get(ref.name)) is not None:
            shape, source = op.type.shape, self.p.types[op.refs[0].name].shape if op.refs else ()
            if op.target == "permute":
                dims = op.kw("dims")
                n = len(shape)
                if dims not in (tuple(range(n)), (*range(n - 2), n - 1, n - 2)):
                    return None
                swapped ^= dims != tuple(range(n))
            elif op.target == "cast":
                casts.insert(0, op.type.dtype)
            elif op.target not in ("reshape", "aten.clone") or shape[-2:] != source[-2:]:
                return _Found(op, swapped, tuple(casts))
            ref = op.refs[0]
        return None

    def _lookup(self, op: Op) -> Ref | None:
        """The ids of a lookup in dimension 0: ``x[ids]``, ``index_select(x, 0, ids)``."""
        ids: Arg = None
        if op.target == "aten.index.Tensor" and isinstance(op.args[1], tuple) and isinstance(op.args[1][0], Ref):
            ids = op.args[1][0] if all(a is None for a in op.args[1][1:]) else None
        elif op.target == "aten.index_select" and op.args[1] == 0:
            ids = op.args[2]
        return ids if isinstance(ids, Ref) and self.p.types[ids.name].dtype in ("i64", "i32") else None

    def _added(self, op: Op) -> Ref | None:
        """The ids of rows added into dimension 0: index_put that accumulates, index_add."""
        ids: Arg = None
        if op.target == "aten.index_put" and len(op.args) == 4 and op.args[3] is True and isinstance(op.args[1], tuple):
            ids = op.args[1][0] if len(op.args[1]) == 1 else None
        elif op.target == "aten.index_add" and op.args[1] == 0 and op.kw("alpha", 1) == 1:
            ids = op.args[2]
        return ids if isinstance(ids, Ref) and self.p.types[ids.name].dtype in ("i64", "i32") else None

    def _root(self, ids: Ref) -> str:
        """The value that ``ids`` is a view of."""
        name = ids.name
        while (op := self.p.producers.get(name)) is not None and op.target in VIEWS:
            name = op.refs[0].name
        return name

    # what it becomes --------------------------------------------------------------------------------------------------

    def _replace_product(self, op: Op) -> bool:
        product = self._product(op) if op.target == "aten.bmm" else None
        if product is None:
            return False
        k, ids, found = product
        t, (m, n) = op.type.shape[0], op.type.shape[1:]
        x = self._rows(op.refs[1 - k])
        w = found.op.refs[0]
        for dtype in found.casts:
            w = self._emit("cast", (w,), Type(dtype, self.out.types[w.name].shape))
        if found.swapped == (k == 1):  # the product wants [e, k, n]: as the right operand has it, turned as the left one has
            w = self._turn(w)
        y = self._emit("routed_mm", (x, w, self._ids(ids, self.out.types[w.name].shape[0], t)), Type(op.type.dtype, (t, m * n)))
        self.out.emit(replace(op, target="reshape", args=(y,), kwargs=()))
        return True

    def _replace_outer(self, op: Op) -> bool:
        ids = self._added(op)
        found = self._outer(op) if ids is not None else None
        if ids is None or found is None:
            return False
        t = found.op.type.shape[0]
        rows = [self._rows(r) for r in found.op.refs]
        x, g = reversed(rows) if found.swapped else rows
        y = self._emit("routed_outer", (x, g, self._ids(ids, op.type.shape[0], t)), Type(found.op.type.dtype, op.type.shape))
        self._add(op, y)
        return True

    def _replace_table(self, op: Op) -> bool:
        """A lookup of rows by the same ids, and its gradient."""
        ids = self._lookup(op)
        if ids is not None and len(self.p.types[op.refs[0].name].shape) == 2 and self._root(ids) in self.routing:
            self.out.emit(replace(op, target="embedding", args=(op.refs[0], self._ids(ids, self.p.types[op.refs[0].name].shape[0])), kwargs=()))
            return True
        ids = self._added(op)
        if ids is not None and len(op.type.shape) == 2 and self._root(ids) in self.routing:
            rows = op.refs[-1]
            y = self._emit("embedding_backward", (rows, self._ids(ids, op.type.shape[0])), op.type)
            self._add(op, y)
            return True
        return False

    def _ids(self, ids: Ref, n: int, rows: int | None = None) -> Ref:
        """In [0, n), one a row: an index counts from the end where it is negative."""
        made = self.p.producers.get(self._root(ids))
        t = self.p.types[ids.name]
        if made is None or made.target not in COUNTED:
            low = self._emit("aten.lt.Scalar", (ids, 0), Type("bool", t.shape))
            ids = self._emit("aten.where.self", (low, self._emit("aten.add.Tensor", (ids, n), t), ids), t)
        return ids if rows is None else self._reshape(ids, (rows,))

    def _add(self, op: Op, y: Ref) -> None:
        """``op``'s result: what it adds to, and y."""
        base = self.p.producers.get(op.refs[0].name)
        if self.out.types[y.name].dtype != op.type.dtype:
            y = self._emit("cast", (y,), op.type)
        if base is not None and base.target == "full" and base.kw("value") == 0:
            self.out.emit(replace(op, target="reshape", args=(y,), kwargs=()))
        else:
            self.out.emit(replace(op, target="aten.add.Tensor", args=(op.refs[0], y), kwargs=()))

    def _rows(self, x: Ref) -> Ref:
        """[t, k, 1] or [t, 1, k] as [t, k]: the value that it is a view of, where that has this shape."""
        t, *rest = self.p.types[x.name].shape
        shape, seen = (t, prod(rest)), x
        while (op := self.p.producers.get(seen.name)) is not None and self.p.types[seen.name].shape != shape:
            if op.target != "reshape" and not (op.target == "permute" and 1 in op.type.shape[1:] and op.kw("dims") == (0, 2, 1)):
                break
            seen = op.refs[0]
        return seen if self.p.types[seen.name].shape == shape else self._reshape(x, shape)

    def _reshape(self, x: Ref, shape: tuple[int, ...]) -> Ref:
        t = self.out.types[x.name]
        return x if t.shape == shape else self._emit("reshape", (x,), Type(t.dtype, shape))

    def _turn(self, w: Ref) -> Ref:
        t = self.out.types[w.name]
        e, k, n = t.shape
        return self._emit("permute", (w,), Type(t.dtype, (e, n, k)), dims=(0, 2, 1))

    def _emit(self, target: str, args: Sequence[Arg], t: Type, **kwargs: Arg) -> Ref:
        name = self.out.fresh(f"{self.by.name}.{target.split('.')[target.startswith('aten.')]}")
        self.out.emit(replace(self.by, results=(name,), target=target, args=tuple(args), types=(t,), kwargs=tuple(kwargs.items())))
        return Ref(name)
