"""What a loop with accumulation sends and holds, counted on real ranks: nothing is sent below zero2 before the boundary, and from zero2 on a part of the gradients waits."""

from __future__ import annotations

import pytest
from gloo.launch import ranks
from gloo.microsteps import BYTES, LAYERS, on_ranks

SCALARS = 4096 / BYTES  # in which ranks agree, the batch, a loss


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.wide)])
def test_what_is_sent_and_held_between_boundaries(count: int) -> None:
    """In units of the parameters' bytes, N ranks. zero3 gathers each weight forward, and backward those that backward reads: all but the first layer's."""
    part, ring = 1 / count, (count - 1) / count
    gathers = ring * (2 * LAYERS - 1) / LAYERS
    forms = {  # stage: a microbatch, the update, what waits
        0: (0.0, 2 * ring, 1.0),
        1: (0.0, 2 * ring, 1.0),
        2: (ring, ring, part),
        3: (gathers + ring, 0.0, part),
    }
    for rank in ranks(count, on_ranks, tuple(forms)):
        for found, (micro, update, waits) in zip(rank, forms.values(), strict=True):
            said = {"microbatch 0": micro, "microbatch 1": micro, "microbatch 2": micro, "update": update, "waits": waits, "held": waits, "after": 0.0}
            wrong = {key: (found[key], value) for key, value in said.items() if abs(found[key] - value) > SCALARS}
            assert not wrong, (forms, wrong)
