"""Fragments drawn at random: small chains of pointwise ops, reductions and moves that no model has. What a back end makes of them is held against the interpreter (test_drawn_fragments.py)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from deepseed.ir.program import Op, Program
from deepseed.ir.text import parse

Shape = tuple[int, ...]
ROWS, COLUMNS = (1, 2, 3, 5, 7, 17), (1, 2, 7, 7, 14, 16, 23, 30, 33, 65)  # with and without a rest beside whole vectors
UNARY = ("aten.sigmoid", "aten.tanh", "aten.neg", "aten.relu", "aten.cos", "aten.silu", "aten.abs", "aten.square")
BINARY = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.maximum")


def drawn(seed: int, dtype: str = "f64") -> Program:
    """One to four operands, two to twelve ops, one to three results."""
    rng, draw = random.Random(seed), None
    while draw is None or not draw.made:
        draw = _Drawn(rng, dtype)
        draw.grow()
    return draw.program()


def inputs_of(p: Program, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    dtypes = {"f64": torch.float64, "f32": torch.float32}
    return [torch.randint(0, int(i.key.split("below")[1]), i.type.shape, generator=g) if i.type.dtype == "i64" else torch.randn(i.type.shape, generator=g, dtype=torch.float64).to(dtypes[i.type.dtype]) for i in p.inputs]


@dataclass
class _Drawn:
    rng: random.Random
    dtype: str
    inputs: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def grow(self) -> None:
        """Operands, then ops on these and on what was made."""
        rows, columns = self.rng.choice(ROWS), self.rng.choice(COLUMNS)
        whole: Shape = (rows, columns) if self.rng.random() < 0.7 else (2, rows, columns)
        for n in range(self.rng.randint(1, 4)):
            shape = whole if n == 0 else self.rng.choice([whole, whole, whole[1:], whole[-1:], (*whole[:-1], 1), (*(1 for _ in whole[:-1]), columns), ()])
            self.input(f"x{n}", shape)
        for _ in range(self.rng.randint(2, 12)):
            self.op()

    def input(self, name: str, shape: Shape) -> str:
        self.inputs.append(f'%{name} : {self.typed(shape)} batch "{name}"')
        self.shapes[name] = shape
        return name

    def typed(self, shape: Shape) -> str:
        return f"{self.dtype}[{', '.join(map(str, shape))}]"

    def emit(self, text: str, shape: Shape) -> None:
        name = f"v{len(self.lines)}"
        self.lines.append(f'%{name} = {text} : {self.typed(shape)} {{phase="forward"}}')
        self.shapes[name] = shape
        self.made.append(name)

    def op(self) -> None:
        x = self.rng.choice([*self.shapes, *self.made[-3:]])
        kind = self.rng.choice(["unary", "binary", "binary", "binary", "reduce", "reduce", "move", "move", "lookup", "choice"])
        getattr(self, f"_{kind}")(x, self.shapes[x])

    def _unary(self, x: str, shape: Shape) -> None:
        self.emit(f"{self.rng.choice(UNARY)}(%{x})", shape)

    def _binary(self, x: str, shape: Shape) -> None:
        y, both = self._with(shape)
        if both is not None:
            self.emit(f"{self.rng.choice(BINARY)}(%{x}, %{y})", both)

    def _with(self, shape: Shape) -> tuple[str, Shape | None]:
        """Another value, and the shape that it has with one of ``shape``."""
        y = self.rng.choice(list(self.shapes))
        try:
            both = tuple(torch.broadcast_shapes(shape, self.shapes[y]))
        except RuntimeError:
            return y, None
        return y, both if prod(both) <= 1 << 13 else None

    def _choice(self, x: str, shape: Shape) -> None:
        y, both = self._with(shape)
        if both is not None:
            self.lines.append(f'%c{len(self.lines)} = aten.gt.Tensor(%{x}, %{y}) : bool[{", ".join(map(str, both))}] {{phase="forward"}}')
            self.emit(f"aten.where.self(%c{len(self.lines) - 1}, %{y}, %{x})", both)

    def _reduce(self, x: str, shape: Shape) -> None:
        if not shape:
            return
        if self.rng.random() < 0.1:
            return self.emit(f"sum_of_squares(%{x})", ())
        dims, keep = sorted(self.rng.sample(range(len(shape)), self.rng.randint(1, len(shape)))), self.rng.random() < 0.6
        left = tuple(1 if d in dims else n for d, n in enumerate(shape)) if keep else tuple(n for d, n in enumerate(shape) if d not in dims)
        self.emit(f"{self.rng.choice(['sum', 'sum', 'amax'])}(%{x}, dims={dims}, keepdim={str(keep).lower()})", left)

    def _move(self, x: str, shape: Shape) -> None:
        kind = self.rng.choice(["permute", "join", "split", "slice", "cat", "expand", "pad"])
        d = self.rng.randrange(len(shape)) if shape else 0
        n = shape[d] if shape else 1
        if kind == "permute" and len(shape) > 1:
            dims = self.rng.sample(range(len(shape)), len(shape))
            self.emit(f"permute(%{x}, dims={dims})", tuple(shape[i] for i in dims))
        elif kind == "join" and len(shape) > 1:
            at = self.rng.randrange(len(shape) - 1)
            self.emit(f"reshape(%{x})", (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]))
        elif kind == "split" and shape and n > 1:
            by = self.rng.choice([k for k in range(1, n + 1) if n % k == 0])
            self.emit(f"reshape(%{x})", (*shape[:d], by, n // by, *shape[d + 1 :]))
        elif kind == "slice" and n > 1:
            start, step = self.rng.randrange(n - 1), self.rng.choice([1, 1, 2])
            end = self.rng.randint(start + 1, n)
            self.emit(f"slice(%{x}, dim={d}, start={start}, step={step})", (*shape[:d], -(-(end - start) // step), *shape[d + 1 :]))
        elif kind == "cat" and shape and prod(shape) < 1 << 12:
            alike = [y for y, other in self.shapes.items() if other == shape]
            self.emit(f"cat([%{x}, %{self.rng.choice(alike)}], dim={d})", (*shape[:d], 2 * n, *shape[d + 1 :]))
        elif kind == "expand" and shape and 1 in shape:
            self.emit(f"expand(%{x})", tuple(self.rng.choice([1, 3]) if m == 1 else m for m in shape))
        elif kind == "pad" and shape and prod(shape) < 1 << 12:
            pads = [self.rng.randint(0, 2) if each // 2 == d else 0 for each in range(2 * len(shape))]
            self.emit(f"pad(%{x}, pads={pads}, value=0.5)", (*shape[:d], n + pads[2 * d] + pads[2 * d + 1], *shape[d + 1 :]))

    def _lookup(self, x: str, shape: Shape) -> None:
        """One element of each row, by a number that is read."""
        if len(shape) < 2:
            return
        index = (*shape[:-1], 1)
        name = f"n{len(self.inputs)}"
        self.inputs.append(f'%{name} : i64[{", ".join(map(str, index))}] batch "{name}below{shape[-1]}"')
        self.emit(f"gather(%{x}, %{name}, dim={len(shape) - 1})", index)

    def program(self) -> Program:
        """What its results need."""
        returned = list(dict.fromkeys([self.made[-1], *self.rng.sample(self.made, min(len(self.made), self.rng.randint(0, 2)))]))
        p = parse("\n".join(["program drawn mesh() facts()", *self.inputs, *self.lines, *(f'return %{o} output "{o}"' for o in returned)]))
        needed, ops = set(returned), list[Op]()
        for op in reversed(p.ops):
            if op.name in needed:
                needed.update(r.name for r in op.refs)
                ops.append(op)
        return replace(p, inputs=tuple(i for i in p.inputs if i.name in needed), ops=tuple(reversed(ops)))
