"""Rows that are each data-parallel rank's own: the program that means DDP's mean, what is refused of it, and the update over gradients that wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseed.capture import capture, capture_update
from deepseed.capture.gradients import LossScale
from deepseed.check.collectives import perform
from deepseed.check.own_rows import AXIS, check_own_rows
from deepseed.check.typing import MOVES, TypingError
from deepseed.ir.contract import PassError
from deepseed.ir.layout import Layout, Partial
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import OWN_ROWS, Program, Type
from deepseed.ir.text import parse
from deepseed.own_buffers import looked_at, written
from deepseed.own_rows import with_own_rows
from deepseed.runtime.simulate import simulate

TWO = Mesh((("dp", 2),))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def module_program() -> Program:
    return capture(linear(), (torch.zeros(4, 3),), want="module", pending=True).program


def test_every_gradient_ends_in_its_share_of_the_mean(golden: Callable[[object], None]) -> None:
    golden(f"{module_program()}\n{with_own_rows(module_program(), TWO)}")


def test_alone_and_with_experts() -> None:
    p = module_program()
    assert with_own_rows(p, Mesh((("dp", 1), ("tp", 2)))) is p
    with pytest.raises(PassError, match=r"ep=2\): experts over ep(.|\n)*fix: a plan without ep"):
        with_own_rows(p, Mesh((("dp", 2), ("ep", 2))))


def test_the_update_reads_gradients_that_wait(golden: Callable[[object], None]) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clipped = capture_update(model, optimizer, {"weight": torch.float32}, clip_grad_norm=1.0)
    scaled = capture_update(model, optimizer, {"weight": torch.float32, "bias": torch.bfloat16}, loss_scale=LossScale(8.0, 4))
    golden(f"{clipped.program}\n{scaled.program}")
    assert [i.key for i in clipped.program.inputs if i.role == "param"] == ["weight"], "a parameter without a gradient is not touched"


# what is refused --------------------------------------------------------------------------------------------------------


def program(line: str, returned: str = '%y output "y"', mesh: str = "dp=2, tp=2") -> Program:
    """Ops over a batch, a parameter and what came before."""
    line += ' {phase="backward"}'
    text = f'program module mesh({mesh}) facts(own_rows)\n%w : f32[4, 4] param "w"\n%x : f32[4, 4] batch "x"\n%h = aten.relu(%x) : f32[4, 4] {{phase="forward"}}\n{line}\nreturn {returned}\n'
    return parse(text)


@pytest.mark.parametrize("kind", sorted(set(MOVES) - {"share"}))
def test_no_move_over_dp_takes_what_is_a_ranks_own(kind: str) -> None:
    with pytest.raises(TypingError, match=f"{kind}(.|\n)*mixes rows over dp"):
        check_own_rows(program(f'%y = {kind}(%h, axis="dp") : f32[4, 4]'))
    check_own_rows(program(f'%y = {kind}(%h, axis="tp") : f32[4, 4]'))  # over another axis the rows are the same
    check_own_rows(program(f'%y = {kind}(%w, axis="dp") : f32[4, 4]'))  # a parameter is no row
    unmarked = program(f'%y = {kind}(%h, axis="dp") : f32[4, 4]')
    check_own_rows(replace(unmarked, facts=unmarked.facts - {OWN_ROWS}))


@pytest.mark.parametrize("role", ["grad", "pending", "param", "state", "norm"])
def test_what_must_be_alike_on_all_ranks_is_no_ranks_own(role: str) -> None:
    with pytest.raises(TypingError, match=f"{role} 'w' is %h, each rank's own along dp: it is no share of the mean"):
        check_own_rows(program("%y = aten.relu(%h) : f32[4, 4]", f'%h {role} "w"'))
    check_own_rows(program('%y = share(%h, axis="dp") : f32[4, 4] sum@dp', f'%y {role} "w"'))
    with pytest.raises(TypingError, match="no share of the mean"):  # of another axis is not of this one
        check_own_rows(program('%y = share(%h, axis="tp") : f32[4, 4] sum@tp', f'%y {role} "w"'))
    check_own_rows(program("%y = aten.relu(%w) : f32[4, 4]", f'%y {role} "w"'))
    check_own_rows(program("%y = aten.relu(%h) : f32[4, 4]", '%y buffer "b"'))  # each rank's running statistics, as under DDP


@pytest.mark.parametrize("role", ["batch", "tangent", "rng"])
def test_what_differs_from_rank_to_rank(role: str) -> None:
    p = program('%y = all_reduce.start(%h, axis="dp") : f32[4, 4]')
    p = replace(p, inputs=tuple(replace(i, role=role) if i.role == "batch" else i for i in p.inputs))
    with pytest.raises(TypingError, match="mixes rows over dp"):
        check_own_rows(p)


# share ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_add_up_to_the_mean(count: int) -> None:
    """On simulated ranks, and as the instance check has it."""
    mesh = Mesh(((AXIS, count),))
    parts = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(count)]
    shares = [out[0] for out in simulate(mesh, [lambda rt, xs: (rt.share(xs[0], AXIS),)] * count, [[x] for x in parts])]
    whole = Type("f64", (4, 3))
    checked = perform("share", parts, whole, whole.laid(Layout().with_(AXIS, Partial("sum"))), AXIS, mesh)
    mean = torch.stack(parts).mean(0)
    assert (sum(shares) - mean).abs().max() <= 1e-15
    assert all(torch.equal(a, b) for a, b in zip(shares, checked, strict=True))
    alike = [out[0] for out in simulate(mesh, [lambda rt, xs: (rt.share(xs[0], AXIS),)] * count, [[mean]] * count)]
    assert (sum(alike) - mean).abs().max() <= 1e-15  # of what is the same on all ranks it is that


# buffers ----------------------------------------------------------------------------------------------------------------


def test_buffers_are_looked_at_where_more_than_a_buffer_depends_on_them() -> None:
    """A batch norm's in an evaluation, not in training; what is written in a program of own rows is each rank's own."""
    for training in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train(training)
        p = capture(model, (torch.zeros(4, 3),), want="module", pending=True).program
        named = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert looked_at(p, own=True) & named == (set() if training else {"1.running_mean", "1.running_var"})
        assert looked_at(p, own=False) >= {"1.running_mean", "1.running_var"}
        assert written(p) == set() and written(with_own_rows(p, TWO)) == (named if training else set())
