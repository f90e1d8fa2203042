"""Random programs through the whole pipeline: no check raises a false alarm, every pass keeps the meaning, the ranks compute it.

A failure shrinks to a small program and is printed as text with the command that runs it (``strategies.printed``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from placed import new_state, sources
from strategies import DISCONTINUOUS, batches, captured, plans, printed
from typer.testing import CliRunner

from deepseed import pipeline
from deepseed.check.equivalence import difference
from deepseed.cli import app
from deepseed.ir.contract import Pass, PassError
from deepseed.ir.layout import Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program, Ref
from deepseed.ir.text import parse
from deepseed.ops import evaluate
from deepseed.runtime.executable import Executable
from deepseed.runtime.simulate import simulate
from deepseed.runtime.state import gather

NAMES = [p.name for p in pipeline.SHARED]
TOLERANCE = 1e-10
TALLY: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path_factory.mktemp("instances")))
        yield
    print("\n" + ", ".join(f"{n} {what}" for what, n in TALLY.items()))


def drawn(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``examples`` draws, the same every time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


def shared(p: Program, mesh: Mesh, zero: int) -> list[pipeline.Passed]:
    """The program after each pass that all ranks share, every check on; a plan that this program refuses is no example."""
    try:
        return pipeline.run(p, pipeline.arguments(mesh, zero, {}), pipeline.SHARED)
    except PassError:
        raise UnsatisfiedAssumption from None


def no_false_alarm(p: Program, plan: tuple[Mesh, int]) -> None:
    """Every default check passes, of the shared program and of each rank's."""
    mesh, zero = plan
    with printed(p, NAMES, mesh, zero):
        assert parse(str(p)) == p
        done = shared(p, mesh, zero)
        for each in done:
            assert parse(str(each.program)) == each.program
        for rank in range(mesh.ranks):
            pipeline.run(done[-1].program, pipeline.arguments(mesh, zero, mesh.coordinate(rank)), pipeline.EACH_RANK)
    TALLY["valid pairs of program and plan without a false alarm"] += 1
    last = done[-1].program
    splits = [e for t in last.types.values() for _, e in t.layout.elements if isinstance(e, Split)]
    TALLY["of these on one rank"] += mesh.ranks == 1
    TALLY["with a value that is split"] += bool(splits)
    TALLY["unevenly"] += any(e.of for e in splits)
    TALLY["under sp"] += "sp" in mesh.sizes
    TALLY["under ep"] += "ep" in mesh.sizes
    TALLY["of more than 10 ops as captured"] += len(p.ops) > 10


def same_meaning(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    """What the ranks of this process compute from generated source is what the captured program is on one device; so is every pass's."""
    mesh, zero = plan
    if any(word in op.target for op in p.ops for word in DISCONTINUOUS):
        raise UnsatisfiedAssumption
    inputs = batches(p, seed)
    with printed(p, NAMES, mesh, zero):
        done = shared(p, mesh, zero)
        before = p
        for each in done:
            found = difference(before, each.program, inputs)
            assert found is None, f"after pass {each.name}: {found}"
            before = each.program
        whole = evaluate(p, inputs)
        last = done[-1].program
        states = [new_state(last, inputs, rank) for rank in range(mesh.ranks)]
        ranks = simulate(mesh, [Executable(s) for s in sources(last)], [s.inputs(last, inputs) for s in states])
        shown = [o for o in last.outputs if o.role not in ("param", "buffer", "state")]
        want = {(o.role, o.key): whole[o.ref.name] for o in p.outputs}
        for n, o in enumerate(shown):
            close(gather([r[n] for r in ranks], last.types[o.ref.name], mesh), want[o.role, o.key], f"{o.role} {o.key}")
        for o in last.outputs:
            if o.role in ("param", "buffer", "state"):
                parts = [s.tensors[o.role, o.key] for s in states]
                close(gather(parts, last.types[o.ref.name], mesh), want[o.role, o.key], f"{o.role} {o.key}")
    TALLY["programs that mean the same after every pass and on the ranks"] += 1


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    scale = max(1.0, float(torch.nan_to_num(want.double().abs(), 0.0, 0.0, 0.0).max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True, msg=lambda m: f"{what}: {m}")


PAIRS = st.booleans().flatmap(lambda uneven: st.tuples(captured(max_layers=4, uneven=uneven), plans(uneven=True)))


@given(PAIRS)
@drawn(15)
def test_no_false_alarm(pair: tuple[Program, tuple[Mesh, int]]) -> None:
    no_false_alarm(*pair)


@pytest.mark.wide
@given(PAIRS)
@drawn(int(os.environ.get("DEEPSEED_EXAMPLES", "600")))
def test_no_false_alarm_wide(pair: tuple[Program, tuple[Mesh, int]]) -> None:
    no_false_alarm(*pair)


EMPTY = """program drawn mesh() facts(captured)
%w0 : f64[12, 24] param "w0"
%w1 : f64[12, 0] param "w1"
%w2 : f64[24, 4] param "w2"
%v0.0 = cat([%w0, %w1], dim=1) : f64[12, 24] {at="layer0", phase="forward"}
%v1 = aten.mm(%v0.0, %w2) : f64[12, 4] {at="layer1", phase="forward"}
return %v1 output "0"
"""


@pytest.mark.parametrize("zero", [0, 3])
def test_a_parameter_without_an_element_is_placed(zero: int) -> None:
    same_meaning(parse(EMPTY), (Mesh((("dp", 2), ("tp", 3))), zero), 0)


@given(captured(max_layers=4), plans(), st.integers(0, 99))
@drawn(6)
def test_every_pass_and_the_ranks_keep_the_meaning(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    same_meaning(p, plan, seed)


@pytest.mark.wide
@given(captured(max_layers=10), plans(), st.integers(0, 99))
@drawn(int(os.environ.get("DEEPSEED_EXAMPLES", "200")))
def test_every_pass_and_the_ranks_keep_the_meaning_wide(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    same_meaning(p, plan, seed)


# failures -----------------------------------------------------------------------------------------------------------


@cache
def failure(wrong: Callable[[Program], Program], name: str) -> str:
    """What a property says whose pass makes an error."""

    def broken(each: Pass) -> Pass:
        return replace(each, run=lambda p, **kw: wrong(each.run(p, **kw))) if each.name == name else each

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
    @given(captured(max_layers=4, table=False), st.just((Mesh((("dp", 2),)), 0)))
    def prop(p: Program, plan: tuple[Mesh, int]) -> None:
        no_false_alarm(p, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARED", tuple(map(broken, pipeline.SHARED)))
        with pytest.raises(AssertionError) as found:
            prop()
    return str(found.value)


def no_bias(p: Program) -> Program:
    """Wherever two values are added, the first is returned in their place."""
    return replace(p, ops=tuple(replace(o, target="aten.neg", args=(o.refs[0],)) if o.target == "aten.add.Tensor" and isinstance(o.args[1], Ref) else o for o in p.ops))


def test_a_failure_shrinks_to_a_program_that_opt_accepts() -> None:
    said = failure(no_bias, "canonicalize")
    assert "after pass canonicalize" in said and "is another value than before the pass" in said
    line, _, rest = said[said.index("python -m deepseed opt") :].partition("\n")
    text = rest[: rest.index("END\n")]
    p = parse(text)
    assert len(p.ops) <= 4, f"not shrunk: {len(p.ops)} ops"
    words = line.removesuffix(" << 'END'").split()[3:]
    done: Any = CliRunner().invoke(app, words, input=text)
    assert done.exit_code == 0, done.output
    assert parse(done.stdout).mesh == Mesh((("dp", 2),)) and "grouped" in parse(done.stdout).facts
