"""A small placed program, random reshards, and one way to run a lowered program on all ranks in this process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseed.codegen.python import generate
from deepseed.ir.layout import Layout, Partial, Split, check
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program, Type
from deepseed.ir.text import format_type, parse
from deepseed.ir.verify import verify
from deepseed.passes.insert_reshards import insert_reshards
from deepseed.passes.localize import localize
from deepseed.passes.lower_reshards import lower_reshards
from deepseed.runtime.executable import Executable
from deepseed.runtime.simulate import simulate
from deepseed.runtime.state import State, gather, gather_states, shard

# Two layers, mean squared error, plain gradient descent; zero3 over dp, column and row split over tp.
MLP = """program step mesh(dp=2, tp=2) facts(canonical, captured, placed)
%w1 : f64[16@(tp,dp), 8] param "w1"
%w2 : f64[4, 16@(tp,dp)] param "w2"
%x : f64[8@dp, 8] batch "x"
%target : f64[8@dp, 4] batch "target"
%w1.t = permute(%w1 as [16@tp, 8], dims=[1, 0]) : f64[8, 16@tp] {at="up", phase="forward"}
%h = aten.mm(%x, %w1.t) : f64[8@dp, 16@tp] {at="up", phase="forward"}
%a = aten.relu(%h) : f64[8@dp, 16@tp] {at="act", phase="forward"}
%w2.t = permute(%w2 as [4, 16@tp], dims=[1, 0]) : f64[16@tp, 4] {at="down", phase="forward"}
%y = aten.mm(%a, %w2.t) : f64[8@dp, 4] sum@tp {at="down", phase="forward"}
%d = aten.sub.Tensor(%y as [8@dp, 4], %target) : f64[8@dp, 4] {at="loss", phase="forward"}
%sq = aten.mul.Tensor(%d, %d) : f64[8@dp, 4] {at="loss", phase="forward"}
%s = sum(%sq, dims=[0, 1], keepdim=false) : f64[] sum@dp {at="loss", phase="forward"}
%loss = aten.mul.Tensor(%s, 0.03125) : f64[] sum@dp {at="loss", phase="forward"}
%g = aten.mul.Tensor(%d, 0.0625) : f64[8@dp, 4] {at="loss", phase="backward"}
%g.t = permute(%g, dims=[1, 0]) : f64[4, 8@dp] {at="down", phase="backward"}
%dw2 = aten.mm(%g.t, %a) : f64[4, 16@tp] sum@dp {at="down", phase="backward"}
%da = aten.mm(%g, %w2 as [4, 16@tp]) : f64[8@dp, 16@tp] {at="down", phase="backward"}
%m = aten.gt.Scalar(%h, 0) : bool[8@dp, 16@tp] {at="act", phase="backward"}
%mf = cast(%m) : f64[8@dp, 16@tp] {at="act", phase="backward"}
%dh = aten.mul.Tensor(%da, %mf) : f64[8@dp, 16@tp] {at="act", phase="backward"}
%dh.t = permute(%dh, dims=[1, 0]) : f64[16@tp, 8@dp] {at="up", phase="backward"}
%dw1 = aten.mm(%dh.t, %x) : f64[16@tp, 8] sum@dp {at="up", phase="backward"}
%s1 = aten.mul.Tensor(%dw1 as [16@(tp,dp), 8], 0.1) : f64[16@(tp,dp), 8] {phase="update"}
%w1.new = aten.sub.Tensor(%w1, %s1) : f64[16@(tp,dp), 8] {phase="update"}
%s2 = aten.mul.Tensor(%dw2 as [4, 16@(tp,dp)], 0.1) : f64[4, 16@(tp,dp)] {phase="update"}
%w2.new = aten.sub.Tensor(%w2, %s2) : f64[4, 16@(tp,dp)] {phase="update"}
return %loss as [] loss "loss"
return %y output "0"
return %w1.new param "w1"
return %w2.new param "w2"
"""


def lowered(text: str) -> Program:
    return verify(lower_reshards(verify(insert_reshards(verify(parse(text))))))


def sources(p: Program) -> list[str]:
    """The source of every rank."""
    return [generate(localize(p, p.mesh.coordinate(rank))) for rank in range(p.mesh.ranks)]


def random_inputs(p: Program, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i.name: torch.randn(i.type.shape, dtype=torch.float64, generator=generator) for i in p.inputs}


@dataclass
class Outcome:
    ranks: list[tuple[Tensor, ...]]
    returned: dict[str, Tensor]  # whole, by output key
    stored: dict[tuple[str, str], Tensor]  # whole, by (role, key)
    states: list[State]


def run_simulated(p: Program, full: Mapping[str, Tensor]) -> Outcome:
    """One step of a lowered program on all ranks, from whole inputs."""
    states = [new_state(p, full, rank) for rank in range(p.mesh.ranks)]
    ranks = simulate(p.mesh, [Executable(s) for s in sources(p)], [s.inputs(p, full) for s in states])
    returned = [o for o in p.outputs if o.role not in ("param", "buffer", "state")]
    whole = {o.key: gather([r[n] for r in ranks], p.types[o.ref.name], p.mesh) for n, o in enumerate(returned)}
    return Outcome(ranks, whole, gather_states(states), states)


def new_state(p: Program, full: Mapping[str, Tensor], rank: int) -> State:
    state = State(p.mesh, p.mesh.coordinate(rank), torch.device("cpu"))
    for i in p.inputs:
        if i.role in ("param", "buffer", "state"):
            state.put(i, full[i.name].clone())
    return state


# random reshards ----------------------------------------------------------------------------------------------------


def random_layout(draw: random.Random, shape: tuple[int, ...], mesh: Mesh, partial: str) -> Layout:
    """Any layout that fits; partial values are all of one kind."""
    out = Layout()
    for axis in draw.sample(mesh.names, len(mesh.names)):
        kind = draw.choice(("whole", "split", "split", "split", "partial"))
        element = Partial(partial) if kind == "partial" else None
        if kind == "split":
            dim = draw.randrange(len(shape))
            element = Split(dim, draw.choice((1, 1, 2, 3, mesh.size(axis), 4, 6)))  # type: ignore[assignment]
        candidate = out.with_(axis, element)
        try:
            check(shape, candidate, mesh)
            out = candidate
        except ValueError:
            pass
    return out


def random_reshard(seed: int, ranks: int) -> tuple[str, Tensor, list[Tensor]]:
    """A program that reshards its one input and returns it, the whole value, and every rank's part of the input (integers: exact)."""
    draw = random.Random(seed)
    axes = {2: ((2,),), 4: ((4,), (2, 2)), 6: ((2, 3), (6,)), 8: ((2, 2, 2), (2, 4), (8,))}[ranks]
    mesh = Mesh(tuple(zip(("dp", "tp", "sp"), draw.choice(axes), strict=False)))
    shape = tuple(draw.choice((12, 24, 8)) for _ in range(draw.randint(1, 3)))
    kind = draw.choice(("sum", "max"))
    before = Type("f64", shape, random_layout(draw, shape, mesh, kind))
    wanted = random_layout(draw, shape, mesh, "sum")
    if kind == "max":
        wanted = Layout(tuple((a, e) for a, e in wanted.elements if not isinstance(e, Partial)))
    after = before.laid(wanted)
    want = format_type(after, mesh).removeprefix("f64")
    use = "%x" if after == before else f"%x as {want}"
    text = f"""program reshard {mesh} facts(placed)
%x : {format_type(before, mesh)} batch "x"
%y = aten.mul.Scalar({use}, 2) : {format_type(after, mesh)} {{phase="forward"}}
return %y output "y"
"""
    partial = [axis for axis, _ in before.layout.partials]
    summands: dict[tuple[int, ...], Tensor] = {}
    parts = []
    whole_here = before.laid(Layout(tuple((a, e) for a, e in before.layout.elements if isinstance(e, Split))))
    for rank in range(mesh.ranks):
        where = mesh.coordinate(rank)
        at = tuple(where[axis] for axis in partial)
        if at not in summands:
            summands[at] = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(seed + len(summands))).double()
        parts.append(shard(summands[at], whole_here, mesh, where).clone())
    stacked = torch.stack(list(summands.values()))
    return text, stacked.sum(0) if kind == "sum" else stacked.amax(0), parts


def run_parts(text: str, parts: list[Tensor]) -> list[Tensor]:
    """What each rank returns."""
    p = lowered(text)
    return [out[0] for out in simulate(p.mesh, [Executable(s) for s in sources(p)], [[part] for part in parts])]
