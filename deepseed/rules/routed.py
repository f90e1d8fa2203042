"""Rules of products with routed matrices (deepseed.ops.routed). Each row is a row of the table.

Rows, and both dimensions of a matrix, behave as in ``aten.mm``. Matrices that are split by number leave a partial sum with one
summand a row: a rank computes the rows whose matrix it has, and zeros elsewhere.
"""

from __future__ import annotations

from deepseed.rules.signature import Rule

RULES: dict[str, Rule] = {
    "routed_mm": Rule("t k, e~ k n, t -> t n", "0|1"),
    "routed_outer": Rule("t k, t n, t -> e~ k n", "0|1"),
}
