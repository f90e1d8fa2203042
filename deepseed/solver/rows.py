"""Sparse linear constraints under construction, for HiGHS (scipy.optimize.milp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from scipy.optimize import LinearConstraint
from scipy.sparse import coo_array


@dataclass
class Rows:
    """``low`` <= the sum of ``val`` x variable ``col`` over each row <= ``high``."""

    row: list[int] = field(default_factory=list)
    col: list[int] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, terms: Sequence[tuple[int, float]], low: float, high: float = inf) -> None:
        """A row from its (variable, coefficient) terms."""
        for col, val in terms:
            self.row.append(len(self.low))
            self.col.append(col)
            self.val.append(val)
        self.low.append(low)
        self.high.append(high)

    def equal(self, some: Sequence[int], others: Sequence[int]) -> None:
        """The sum of some variables is that of others."""
        self.row += [len(self.low)] * (len(some) + len(others))
        self.col += [*some, *others]
        self.val += [1.0] * len(some) + [-1.0] * len(others)
        self.low.append(0.0)
        self.high.append(0.0)

    def constraint(self, variables: int) -> LinearConstraint:
        matrix = coo_array((self.val, (self.row, self.col)), shape=(len(self.low), variables)).tocsr()
        return LinearConstraint(matrix, self.low, self.high)
