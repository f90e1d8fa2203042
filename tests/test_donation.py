"""Where an update of a rank's block takes place: in the parameter's own memory, where nothing reads the old value any more and the gather puts it back there."""

from __future__ import annotations

import pytest

from deepseed.codegen.donation import Donation
from deepseed.codegen.python import generate
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.memory import live_bytes

TEXT = """program step mesh(dp=2) facts(lowered)
%w : f64[4, 8] param "w"
%m : f64[4@dp, 8] state "momentum_buffer/w"
%lr : f64[] hyper "lr/0"
%g : f64[4@dp, 8] batch "g"
%b = shard(%w, axis="dp") : f64[4@dp, 8] {phase="update"}
%new, %m.new = optim.sgd(%b, %g, %m, %lr, states=["momentum_buffer"], momentum=0.9, dampening=0, weight_decay=0, nesterov=false, maximize=false) : f64[4@dp, 8], f64[4@dp, 8] {phase="update"}
%h = all_gather.start(%new, axis="dp") : f64[4, 8] {phase="update"}
%w.new = wait(%h) : f64[4, 8] {phase="update"}
return %w.new param "w"
return %m.new state "momentum_buffer/w"
"""
LATER = TEXT.replace("%h = ", '%old = aten.neg(%w) : f64[4, 8] {phase="update"}\n%h = ') + 'return %old output "0"\n'
VIEWED = TEXT.replace("%b = ", '%v = reshape(%w) : f64[32] {phase="update"}\n%b = ').replace("%h = ", '%old = aten.neg(%v) : f64[32] {phase="update"}\n%h = ') + 'return %old output "0"\n'
COLUMNS = TEXT.replace("4@dp, 8", "4, 8@dp")
CHANGED = TEXT.replace("%h = all_gather.start(%new", '%half = aten.mul.Scalar(%new, 0.5) : f64[4@dp, 8] {phase="update"}\n%h = all_gather.start(%half')
KEPT = TEXT.replace('return %w.new param "w"', 'return %w param "w"\nreturn %w.new output "0"')


def program(text: str) -> Program:
    return parse(text)


def test_a_block_is_updated_in_the_parameters_memory() -> None:
    p = program(TEXT)
    donation, position = Donation(p), next(n for n, op in enumerate(p.ops) if op.target == "optim.sgd")
    assert donation.in_block(position, "b", "new") and not donation.in_block(position, "m", "m.new") and not donation.in_block(position + 1, "b", "new")
    source = generate(p)
    assert "params = [b]" in source and "clone" not in source and "rt.wait_into(h, w)" in source


@pytest.mark.parametrize("text", [LATER, VIEWED, COLUMNS, CHANGED, KEPT], ids=["a later reader", "a view's later reader", "columns", "another value is gathered", "the old value stays"])
def test_else_on_a_copy(text: str) -> None:
    assert "params = [b.clone(" in generate(program(text))


def test_memory_counts_no_copy() -> None:
    """After the update a block of 128 bytes is there once less; the wait's buffer is the same."""
    text = TEXT.replace("%w.new = wait", '%other = aten.neg(%g) : f64[4@dp, 8] {phase="update"}\n%w.new = wait')
    at = next(n for n, op in enumerate(program(text).ops) if op.target == "optim.sgd") + 1
    block, copy = live_bytes(program(text)), live_bytes(program(text.replace("4@dp, 8", "4, 8@dp")))
    assert copy[at] - block[at] >= 128
