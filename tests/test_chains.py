"""Chains: what runs between two ops that are no kernel is one call, and makes the same bits as the lines that it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from placed import new_state
from strategies import batches, captured, plans
from torch import Tensor

import deepseed
from deepseed import kernels as back_ends
from deepseed import pipeline
from deepseed.codegen import chains, cpp_chain, cpp_files, inductor
from deepseed.codegen.places import ALIGNED, Places
from deepseed.codegen.python import generate
from deepseed.ir.contract import PassError
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.passes.localize import localize
from deepseed.runtime.executable import Executable
from deepseed.runtime.simulate import simulate
from deepseed.tiny import tiny_model

pytestmark = [pytest.mark.skipif(not inductor.compiler(), reason="no C++ compiler"), pytest.mark.usefixtures("one_thread")]
wide = pytest.mark.wide
RUN, CHAIN = cpp_chain.Chain.__call__, "made := "


@pytest.fixture(autouse=True)
def short_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kernels, and products on any processor."""
    monkeypatch.setattr(chains, "LEAST", 2)
    monkeypatch.setattr(cpp_files, "pays", lambda: True)


# models ---------------------------------------------------------------------------------------------------------------


def trained(model: str, plan: str, **fields: int) -> tuple[list[Tensor], str]:
    """Losses and parameters of three steps, and the first rank's source. 128 rows a microbatch and more, so that products are in it."""
    torch.manual_seed(0)
    made, batch = tiny_model(model, {"batch_size": 8, **({"sequence_length": 64} if "ViT" not in model else {}), **fields})
    made.eval()
    if fields:
        del batch["attention_mask"]
    step = deepseed.compile(made, plan, optimizer=torch.optim.AdamW(made.parameters(), lr=1e-3), codegen="cpp", backend="simulate", clip_grad_norm=1.0)
    shown = [step(batch) for _ in range(3)]
    return [*shown, *step.state_dict().values()], step.programs.current().executables[0].source


QUICK = {("LlamaForCausalLM", "zero0"), ("LlamaForCausalLM", "zero1+dp2+mb2"), ("GPT2LMHeadModel", "mb2"), ("ViTForImageClassification", "zero3+dp2"), ("BertForMaskedLM", "tp2+mb2"), ("T5ForConditionalGeneration", "pp2+mb2")}
MODELS = [
    pytest.param(model, plan, {}, id=f"{model}-{plan}", marks=[] if (model, plan) in QUICK else [wide])
    for model in ("LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification")
    for plan in ("zero0", "mb2", "zero1+dp2+mb2", "zero3+dp2", "tp2+mb2", "pp2+mb2", "bf16+zero2+dp2+mb2")
]


WIDER = {"LlamaForCausalLM": {"hidden_size": 256, "intermediate_size": 512}, "GPT2LMHeadModel": {"n_embd": 256, "n_inner": 512}}  # products that are worth a kernel, and attention without a mask


@pytest.mark.parametrize(("model", "plan", "fields"), [*MODELS, *[pytest.param(model, plan, fields, id=f"wider-{model}-{plan}") for model, fields in WIDER.items() for plan in ("zero0", "mb2")]])
def test_a_model_trains_to_the_same_bits(model: str, plan: str, fields: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {True: 0, False: 0}

    def call(self: cpp_chain.Chain, given: list[Any]) -> Any:
        made = RUN(self, given)
        counts[made is not None] += 1
        return made

    monkeypatch.setattr(cpp_chain.Chain, "__call__", call)
    chained, source = trained(model, plan, **fields)
    assert counts[False] == 0 and counts[True] >= 3 * source.count(CHAIN) > 0
    monkeypatch.setattr(cpp_chain.Chain, "__call__", lambda self, given: None)
    alone, same = trained(model, plan, **fields)
    assert source == same and all(torch.equal(a, b) for a, b in zip(chained, alone, strict=True))


def test_a_layer_of_llama_is_in_one_chain() -> None:
    """No kernel of a layer's forward or backward is called beside it; nor is a sum of a weight's gradient."""
    _, source = trained("LlamaForCausalLM", "mb2", **WIDER["LlamaForCausalLM"])
    outside = [line for line in source.splitlines() if line.startswith("    ") and line[4] != " " and "chain_" not in line and "given = " not in line]
    assert not [line for line in outside if "layers_" in line and (" = kernel_" in line or "rt.accumulate(" in line or "rt.accumulate_mm(" in line) and "_update_" not in line]
    assert sorted(int(n) for n in re.findall(r"# (\d+) kernels", source))[-2:] == [28, 52]


RETURNED = """program p mesh() facts(explicit, lowered, placed)
%w : f32[4, 8] param "w"
%x : f32[4, 8] batch "x"
%a = aten.exp(%x) : f32[4, 8] {phase="forward"}
%b = aten.neg(%a) : f32[4, 8] {phase="forward"}
%old = reshape(%w) : f32[32] {phase="forward"}
%c = aten.exp(%b) : f32[4, 8] {phase="forward"}
%e = aten.neg(%c) : f32[4, 8] {phase="forward"}
%d = aten.mul.Tensor(%e, %w) : f32[4, 8] {phase="forward"}
return %d param "w"
return %old output "old"
return %b output "b"
"""


def test_what_is_copied_before_it_is_written_over_stands_outside() -> None:
    """A returned view of a parameter that the program writes."""
    p = verify(parse(RETURNED))
    p = replace(p, ops=tuple(replace(op, kernel="" if op.target == "reshape" else f"k{n}") for n, op in enumerate(p.ops)))
    x, w, known = torch.randn(4, 8), torch.randn(4, 8), dict[str, Any]()
    kernels = back_ends.made(p, "cpp", known, False, lambda line: None)
    found = []
    for chaining in (None, kernels.chaining):
        source, stored = generate(p, kernels=kernels.functions, chaining=chaining), w.clone()
        (shown,) = simulate(p.mesh, [Executable(source, kernels=kernels.calls, codegen="cpp")], [[stored, x]])
        found.append([stored, *shown])
        assert torch.equal(shown[0], w.reshape(-1))
    assert source.count(CHAIN) == 2 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_buffer_that_is_a_sum_over_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends where it is added up, and is no name of the function."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(256, 256) for _ in range(3)])
            self.register_buffer("load", torch.zeros(256))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.nn.functional.gelu(layer(x))
            with torch.no_grad():
                self.load.copy_(torch.softmax(x, -1).sum(0))
            for layer in self.layers:
                x = torch.tanh(layer(x) * x.exp())
            return (x * x).mean()

    found = []
    for call in (RUN, lambda self, given: None):
        monkeypatch.setattr(cpp_chain.Chain, "__call__", call)
        torch.manual_seed(0)
        model = Model()
        step = deepseed.compile(model, "mb2", optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), codegen="cpp", backend="simulate")
        found.append([step(torch.randn(512, 256)), *step.state_dict().values()])
    assert CHAIN in step.programs.current().executables[0].source and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert float(model.load.sum()) == pytest.approx(512, rel=1e-5)


# drawn programs -------------------------------------------------------------------------------------------------------


def run(p: Program, inputs: dict[str, Tensor], chained: bool, known: dict[str, Any]) -> tuple[list[Tensor], int]:
    """What ranks return and store, and how many chains their source has."""
    sources, states = [], [new_state(p, inputs, rank) for rank in range(p.mesh.ranks)]
    for rank in range(p.mesh.ranks):
        mine = localize(p, p.mesh.coordinate(rank))
        kernels = back_ends.made(mine, "cpp", known, False, lambda line: None)
        sources.append(Executable(generate(mine, kernels=kernels.functions, chaining=kernels.chaining if chained else None), kernels=kernels.calls, codegen=f"cpp {chained}"))
    returned = simulate(p.mesh, sources, [s.inputs(p, inputs) for s in states])
    return [t for r in returned for t in r] + [t for s in states for t in s.tensors.values()], sum(s.source.count(CHAIN) for s in sources)


def same_bits(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    mesh, zero = plan
    try:
        done = pipeline.run(p, pipeline.arguments(mesh, zero, {}, kernels=True, products="alone"), pipeline.SHARED)
    except PassError:
        assume(False)
    inputs, made, known = batches(p, seed), done[-1].program, dict[str, Any]()
    (alone, _), (chained, count) = run(made, inputs, False, known), run(made, inputs, True, known)
    assume(count)
    for a, b in zip(alone, chained, strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def drawn(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@drawn(3)
@given(captured(max_layers=6), plans(), st.integers(0, 99))
def test_drawn_programs_compute_the_same_bits(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    same_bits(p, plan, seed)


@wide
@drawn(100)
@given(captured(max_layers=8, uneven=True), plans(uneven=True), st.integers(0, 99))
def test_drawn_programs_compute_the_same_bits_wide(p: Program, plan: tuple[Mesh, int], seed: int) -> None:
    same_bits(p, plan, seed)


# one chain ------------------------------------------------------------------------------------------------------------


class Fake:
    """Stands for a kernel's C++ function, or a product's: what is called is seen and not done."""

    def __init__(self, name: str) -> None:
        self.name, self.function = name, 0


def chain(seen: Callable[..., int], **said: Any) -> cpp_chain.Chain:
    whole: dict[str, Any] = {"reads": (), "sums": {}, "makes": (), "inside": 0, "calls": (), "results": ()}
    return cpp_chain.Chain(seen, **(whole | said))


def test_what_has_ended_is_let_go_of_between_two_calls() -> None:
    alive: list[list[bool]] = []
    x, y = torch.zeros(4), torch.zeros(4)
    given, known = [x, y], [ref(x), ref(y)]
    del x, y

    def seen(*_: Any) -> int:
        alive.append([r() is not None for r in known])
        return 0

    lies = ((4,), (1,))
    made = chain(
        seen, reads=(lies, lies), makes=((*lies, torch.float32), (*lies, torch.float32)), calls=((Fake("a"), (0, 0), (2, 0)), (None, 0), (Fake("b"), (1, 0), (2, 0), (3, 0)), (None, 1, 2), (Fake("c"), (3, 0))),
        results=((3, 0, *lies),),
    )(given)  # fmt: skip
    assert made is not None and len(made) == 1 and alive == [[True, True], [False, True], [False, False]] and not given
    alive.clear()
    given, known = [torch.zeros(4)], []
    known.append(ref(given[0]))
    chain(seen, reads=(lies,), calls=((Fake("a"), (0, 0)), (None, 0), (Fake("b"),)))(given)
    assert alive == [[True], [False]]


def test_a_step_lets_go_of_what_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing held: each tensor that a backward was given is gone after the call that read it last, and the numbers are the same."""
    whole, source = trained("LlamaForCausalLM", "mb2")
    monkeypatch.setattr(chains, "HELD", 0)
    parts, other = trained("LlamaForCausalLM", "mb2")
    assert "(None, " not in source and other.count("(None, ") > 10 and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("broken", ["threads", "shape", "strides"])
def test_what_a_chain_is_not_made_for_runs_line_by_line(broken: str) -> None:
    """It says so before it has touched anything."""
    one = chain(lambda *_: pytest.fail("it ran"), reads=(((2, 3), (3, 1)),), calls=((Fake("a"), (0, 0)),))
    given: list[Tensor | None] = [torch.zeros(2, 3)]
    if broken == "threads":
        torch.set_num_threads(2)
    else:
        given = [torch.zeros(3, 2).t() if broken == "strides" else torch.zeros(3, 3)]
    assert one(given) is None and len(given) == 1


def test_a_dimension_of_one_may_lie_anyhow() -> None:
    one = chain(lambda *_: 0, reads=(((1, 3), (3, 1)),), calls=((Fake("a"), (0, 0)),))
    assert one([torch.zeros(1, 3).as_strided((1, 3), (7, 1))]) == []


def test_an_index_out_of_range_names_its_kernel() -> None:
    one = chain(lambda *_: 2, reads=(((2,), (1,)),), calls=((Fake("a"), (0, 0)), (Fake("kernel_b"), (0, 0))))
    with pytest.raises(IndexError, match=r"^kernel_b: an index is out of range\n  fix: labels and ids must be below"):
        one([torch.zeros(2)])


def test_an_index_out_of_range_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compiled kernels: what a chain meets is said as the kernel alone says it, and the step says whose number it is."""
    made, batch = tiny_model("LlamaForCausalLM", {"batch_size": 8, "sequence_length": 64, **WIDER["LlamaForCausalLM"]})
    del batch["attention_mask"]
    step = deepseed.compile(made, "zero0", optimizer=torch.optim.SGD(made.parameters(), lr=0.1), codegen="cpp", backend="simulate")
    step(batch)
    batch["labels"][0, 5] = 10**6
    within: list[bool] = []

    def call(self: cpp_chain.Chain, given: list[Any]) -> Any:
        within.append(True)
        out = RUN(self, given)
        within.pop()
        return out

    monkeypatch.setattr(cpp_chain.Chain, "__call__", call)
    with pytest.raises(IndexError, match=r'batch entry "labels" has 1000000 at \[0, 5\]') as error:
        step(batch)
    assert within == [True], error
    assert re.fullmatch(r"kernel_\w+: an index is out of range\n  fix: labels and ids must be below the size of what they pick from", str(error.value.__cause__))


def test_a_sum_begins_with_nothing_and_goes_on_in_its_own_memory(kernels_folder: Path) -> None:
    lies = ((5,), (1,))
    one = chain(cpp_chain.runner(kernels_folder), reads=(lies, lies), sums={1: 0}, makes=((*lies, torch.float32),), calls=((sum, (0, 0), 1, (2, 0), 5),), results=((2, 0, *lies),))
    x = torch.randn(5)
    (total,) = one([x, None]) or ()
    assert torch.equal(total, x) and total is not x
    (more,) = one([x, total]) or ()
    assert more is total and torch.equal(total, x + x)


def test_a_result_may_be_a_part_of_what_was_given(kernels_folder: Path) -> None:
    """A view of it, in its memory."""
    one = chain(cpp_chain.runner(kernels_folder), reads=(((4, 3), (3, 1)),), results=((0, 3, (3, 2), (1, 3)), (0, 0, (4, 3), (3, 1))))
    x = torch.randn(5, 3)[1:]
    part, whole = one([x]) or ()
    assert whole is x and torch.equal(part, x[1:3].t()) and part.data_ptr() == x[1].data_ptr()


def test_the_last_place_grows() -> None:
    """Of values each larger than the one before no two are there at once."""
    places = Places()
    for n in range(1, 20):
        places.free(*places.take(ALIGNED * n))
    assert places.top == ALIGNED * 19


@drawn(200)
@given(st.lists(st.one_of(st.integers(0, 400), st.tuples(st.integers(0, 20))), max_size=60))
def test_places_that_are_taken_do_not_meet(steps: list[int | tuple[int]]) -> None:
    """And none is larger than all that was ever needed at once, where places are given back in the order in which they were taken."""
    places, held = Places(), list[tuple[int, int]]()
    for do in steps:
        if isinstance(do, int):
            begin, end = places.take(do)
            assert end - begin >= max(do, 1) and begin % ALIGNED == 0 and end <= places.top
            assert all(end <= a or b <= begin for a, b in held)
            held.append((begin, end))
        elif do[0] < len(held):
            places.free(*held.pop(do[0]))
    top = places.top
    for place in held:
        places.free(*place)
    assert places.take(max(top, 1)) == (0, max(top, ALIGNED)) or not steps
