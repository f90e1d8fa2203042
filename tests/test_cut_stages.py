"""cut_stages: what crosses in real models, homes of weights, pins and refusals; texts in and out; and what verify refuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest

from deepseed import pipeline
from deepseed.boundaries import boundaries
from deepseed.cost import flops
from deepseed.ir.contract import PassError
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, ProgramError, Ref
from deepseed.ir.schedule import kind_of
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.passes.cut_stages import cut_stages
from deepseed.passes.loop_microbatches import loop_microbatches
from deepseed.target import load
from deepseed.verify import verify as verify_beside_eager

# Two layers and a tied head over four microbatches, mean squared error, plain gradient descent with the weights' gradients summed over time.
TIED = """program step mesh(mb=2) facts(canonical, captured, explicit, lowered, placed)
%w : f64[8, 8] param "w"
%v : f64[8, 8] param "v"
%x : f64[4@mb, 8] batch "x"
%t : f64[4@mb, 8] batch "t"
%h = aten.mm(%x, %w) : f64[4@mb, 8] {at="first", phase="forward"}
%a = aten.mm(%h, %v) : f64[4@mb, 8] {at="middle", phase="forward"}
%y = aten.mm(%a, %w) : f64[4@mb, 8] {at="last", phase="forward"}
%d = aten.sub.Tensor(%y, %t) : f64[4@mb, 8] {at="loss", phase="forward"}
%sq = aten.mul.Tensor(%d, %d) : f64[4@mb, 8] {at="loss", phase="forward"}
%s = sum(%sq, dims=[0, 1], keepdim=false) : f64[] sum@mb {at="loss", phase="forward"}
%loss = accumulate(%s, axis="mb") : f64[] {phase="forward"}
%g = aten.mul.Tensor(%d, 2.0) : f64[4@mb, 8] {at="loss", phase="backward"}
%a.t = permute(%a, dims=[1, 0]) : f64[8, 4@mb] {at="last", phase="backward"}
%dw.last = aten.mm(%a.t, %g) : f64[8, 8] sum@mb {at="last", phase="backward"}
%w.t = permute(%w, dims=[1, 0]) : f64[8, 8] {at="last", phase="backward"}
%da = aten.mm(%g, %w.t) : f64[4@mb, 8] {at="last", phase="backward"}
%h.t = permute(%h, dims=[1, 0]) : f64[8, 4@mb] {at="middle", phase="backward"}
%dv = aten.mm(%h.t, %da) : f64[8, 8] sum@mb {at="middle", phase="backward"}
%v.t = permute(%v, dims=[1, 0]) : f64[8, 8] {at="middle", phase="backward"}
%dh = aten.mm(%da, %v.t) : f64[4@mb, 8] {at="middle", phase="backward"}
%x.t = permute(%x, dims=[1, 0]) : f64[8, 4@mb] {at="first", phase="backward"}
%dw.first = aten.mm(%x.t, %dh) : f64[8, 8] sum@mb {at="first", phase="backward"}
%dw = aten.add.Tensor(%dw.last, %dw.first) : f64[8, 8] sum@mb {phase="backward"}
%dw.whole = accumulate(%dw, axis="mb") : f64[8, 8] {phase="backward"}
%dv.whole = accumulate(%dv, axis="mb") : f64[8, 8] {phase="backward"}
%n.w = sum_of_squares(%dw.whole) : f64[] {phase="update"}
%n.v = sum_of_squares(%dv.whole) : f64[] {phase="update"}
%n = aten.add.Tensor(%n.w, %n.v) : f64[] {phase="update"}
%norm = aten.sqrt(%n) : f64[] {phase="update"}
%cw = aten.div.Tensor(%dw.whole, %norm) : f64[8, 8] {phase="update"}
%cv = aten.div.Tensor(%dv.whole, %norm) : f64[8, 8] {phase="update"}
%w.new = aten.sub.Tensor(%w, %cw) : f64[8, 8] {phase="update"}
%v.new = aten.sub.Tensor(%v, %cv) : f64[8, 8] {phase="update"}
return %loss loss "loss"
return %norm norm "norm"
return %w.new param "w"
return %v.new param "v"
"""
UNTIMED = TIED.replace(" sum@mb", "").replace("@mb", "").replace("(mb=2)", "()")
UNTIMED = re.sub(r'accumulate\((%\S+), axis="mb"\)', r"aten.mul.Scalar(\1, 1.0)", UNTIMED)
MODELS = {
    "Llama": "LlamaForCausalLM(num_hidden_layers=4)",
    "tied Llama": "LlamaForCausalLM(num_hidden_layers=4, tie_word_embeddings=True)",
    "GPT2": "GPT2LMHeadModel(num_hidden_layers=4)",
    "Qwen3": "Qwen3ForCausalLM(num_hidden_layers=4)",
    "T5": "T5ForConditionalGeneration(num_layers=2, num_decoder_layers=2)",
    "BERT": "BertForMaskedLM(num_hidden_layers=4)",
    "ViT": "ViTForImageClassification(num_hidden_layers=4)",
}
TIES = ("tied Llama", "GPT2", "BERT", "T5")
wide = pytest.mark.wide
CASES = [pytest.param(name, stages, marks=() if name == "tied Llama" else wide) for name in MODELS for stages in (2, 4)]
TIMED = Mesh((("mb", 4),))


@cache
def captured(name: str) -> Program:
    import torch

    from deepseed.capture import capture
    from deepseed.target import load

    pytest.importorskip("transformers")
    found = load(f"hf:{MODELS[name]}", meta=True)
    return capture(found.model, found.batch, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0).program


@cache
def looped(name: str, mesh: Mesh = TIMED, zero: int = 0) -> Program:
    args = pipeline.arguments(mesh, zero, {})
    args["loop_microbatches"] = {"staged": True}
    names = [each.name for each in pipeline.SHARED]
    return pipeline.run(captured(name), args, pipeline.SHARED[: names.index("cut_stages")], check=False)[-1].program


def cut(p: Program, stages: int, schedule: str = "1f1b", chunks: int = 1, pins: Sequence[str] = ()) -> Program:
    """The staged program, verified, typed, followed value by value from the one before it, and read back from its text."""
    out = cut_stages(p, stages, schedule, chunks, pins)
    pipeline.check_program(out, "cut_stages", execute=False)
    numbering = pipeline.check_translation(p, out, "cut_stages")
    assert numbering is not None and not numbering.unproved
    assert parse(str(out)) == out
    return out


def tied() -> Program:
    return loop_microbatches(parse(TIED), staged=True)


def transfers(p: Program) -> list[Op]:
    return [op for op in p.ops if op.target == "transfer"]


def test_a_tied_weight_and_its_gradient_cross_once_a_step(golden: Callable[[object], None]) -> None:
    golden(cut(tied(), 2, pins=["last"]))


def test_zero_bubble_puts_weight_gradients_in_a_part_of_their_own(golden: Callable[[object], None]) -> None:
    golden(cut(tied(), 2, "zb", pins=["last"]))


@pytest.mark.parametrize(("name", "stages"), CASES)
def test_one_activation_and_one_gradient_cross_a_boundary(name: str, stages: int) -> None:
    p = looped(name)
    out = cut(p, stages)
    found = boundaries(out)
    assert len(found) == stages - 1
    if name != "T5":  # whose decoder layers all read what the encoder gave
        for boundary in found:
            assert (len(boundary["forward"]), len(boundary["backward"])) == (1, 1), boundary
    weights = {i.name: i for i in out.inputs if i.role == "param"}
    sent = [op for op in transfers(out) if op.refs[0].name in weights]
    assert all(op.part == "once.0" and op.kw("source") == weights[op.refs[0].name].stage for op in sent)
    if name != "T5":
        assert len({op.refs[0].name for op in sent}) == (name in TIES)
    last = f"once.{out.schedule.loops}" if out.schedule is not None else ""
    assert sum(op.part == last and op.type.numel > 1 for op in transfers(out)) >= (name in TIES)
    assert {op.stage for op in out.ops} == set(range(stages))


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("zb", 1), ("interleaved", 2)])
def test_every_schedule_cuts_and_runs_to_its_end(schedule: str, chunks: int) -> None:
    out = cut(looped("tied Llama"), 2, schedule, chunks)
    assert out.schedule is not None
    assert (out.schedule.name, out.schedule.stages, out.schedule.microbatches, len(out.schedule.lanes)) == (schedule, 2 * chunks, 4, 2)
    assert all(len(b["forward"]) == len(b["backward"]) == 1 for b in boundaries(out))


def test_zero_bubble_leaves_half_of_the_backward_for_the_bubble() -> None:
    """Of the matmuls, the gradients of weights are put off; attention's own gradients are not."""
    out = cut(looped("tied Llama"), 4, "zb")
    work: Counter[tuple[str, int]] = Counter()
    for op in out.ops:
        work[kind_of(op.part), op.stage] += flops(op, [out.types[r.name] for r in op.refs])
    for stage in range(4):
        assert 0.35 < work["weights", stage] / (work["weights", stage] + work["backward", stage]) <= 0.5


SHARED = (("dp", 2), ("mb", 2))


@pytest.mark.parametrize(("axes", "zero"), [(SHARED, 1), pytest.param(SHARED, 2, marks=wide), pytest.param((*SHARED, ("tp", 2)), 3, marks=wide)])
def test_stages_of_sharded_states(axes: tuple[tuple[str, int], ...], zero: int) -> None:
    """A stage stores and updates what it uses; from zero2 on a tied gradient crosses as a shard, before it as each rank's summand."""
    out = cut(looped("tied Llama", Mesh(axes), zero), 2)
    stage = {(i.role, i.key): i.stage for i in out.inputs}
    for (role, key), at in stage.items():
        if role == "state":
            assert at == stage["param", key.partition("/")[2]], key
    assert {at for (role, _), at in stage.items() if role == "param"} == {0, 1}
    assert all(len(b["forward"]) == len(b["backward"]) == 1 for b in boundaries(out))
    weights = {i.name for i in out.inputs if i.role == "param"}
    (gradient,) = (op for op in transfers(out) if kind_of(op.part) == "once" and len(op.type.shape) == 2 and op.refs[0].name not in weights)
    assert gradient.type.local_bytes(out.mesh) * (2 if zero >= 2 else 1) <= gradient.type.nbytes


def test_without_microbatches_a_stage_runs_once() -> None:
    out = cut(loop_microbatches(parse(UNTIMED), staged=True), 2, pins=["last"])
    assert out.schedule is not None and out.schedule.microbatches == 1
    (boundary,) = boundaries(out)
    assert (boundary["forward"], boundary["backward"]) == (["a"], ["da", "dw.whole.s1"])  # no sum over time puts the gradient off


def test_no_stages_no_change() -> None:
    p = tied()
    assert replace(cut_stages(p), facts=p.facts, schedule=None) == p
    one = cut_stages(p).schedule
    assert one is not None and len(one.lanes) == 1 and one.microbatches == 2
    assert cut_stages(loop_microbatches(parse(UNTIMED))).schedule is None


def test_a_chain_of_equal_widths_is_cut_in_the_middle() -> None:
    """No place of it has fewer bytes live than its neighbours, but the end."""
    widths = "\n".join(f'%w{n} : f32[512, 512] param "w{n}"' for n in range(6))
    chain = "\n".join(f'%h{n + 1} = aten.mm(%h{n}, %w{n}) : f32[64, 512] {{at="layer{n}", phase="forward"}}' for n in range(6))
    program = f"""program step mesh() facts(canonical, captured, explicit, lowered, placed)
{widths}
%h0 : f32[64, 512] batch "x"
{chain}
%loss = sum(%h6, dims=[0, 1], keepdim=false) : f32[] {{phase="forward"}}
return %loss loss "loss"
"""
    for stages in (2, 3):
        out = cut_stages(loop_microbatches(parse(program), staged=True), stages=stages)
        assert [i.stage for i in out.by_role("param")] == [n // (6 // stages) for n in range(6)]


def test_pins_begin_stages() -> None:
    out = cut(looped("tied Llama"), 2, pins=["model.layers.3"])
    assert boundaries(out)[0]["forward"] == ["model.layers.2.add.1"]
    layers = [i for i in out.inputs if i.role == "param" and ".layers." in i.key]
    assert [i for i in layers if i.stage] == [i for i in layers if ".layers.3." in i.key]


@pytest.mark.parametrize(
    ("stages", "pins", "says"),
    [
        (2, ["midle"], r"cut=midle: no forward op .*\n  fix: did you mean middle"),
        (3, ["last", "middle"], r"cut=middle: its first op is forward op 1, which is not after that of last, op 2"),
        (3, ["middle"], r"3 stages have 2 cuts, 1 are given: middle"),
        (2, ["first"], r"cut=first: its first op is forward op 0, which is not after the first op"),
        (9, [], r"9 stages need 8 cut points, the forward has \d.*\n  fix: use \d stages or fewer"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(stages: int, pins: list[str], says: str) -> None:
    with pytest.raises(PassError, match=says):
        cut_stages(tied(), stages, "1f1b", 1, pins)


def changed(p: Program, name: str, change: Callable[[Op], Op | None]) -> Program:
    return replace(p, ops=tuple(new for op in p.ops if (new := change(op) if op.name == name else op) is not None))


def mutants() -> list[tuple[str, Callable[[Program], Program], str]]:
    def read(name: str, old: str, new: str) -> Callable[[Program], Program]:
        return lambda p: changed(p, name, lambda op: op.map_refs(lambda r: Ref(new) if r.name == old else r))

    def dropped(name: str) -> Callable[[Program], Program]:
        def drop(p: Program) -> Program:
            source = p.producers[name].refs[0]
            return replace(p, ops=tuple(op.map_refs(lambda r: source if r.name == name else r) for op in p.ops if op.name != name))

        return drop

    def put(name: str, **what: object) -> Callable[[Program], Program]:
        return lambda p: changed(p, name, lambda op: replace(op, **what))  # type: ignore[arg-type]

    def inputs(name: str, stage: int) -> Callable[[Program], Program]:
        return lambda p: replace(p, inputs=tuple(replace(i, stage=stage) if i.name == name else i for i in p.inputs))

    return [
        ("activation not sent", dropped("a.s1"), r"%y = aten.mm at last reads %a on stage 1, and it is on stage 0"),
        ("weight not sent", dropped("w.s1"), r"reads %w on stage 1, and it is on stage 0"),
        ("gradient not sent", dropped("da.s0"), r"reads %da on stage 0, and it is on stage 1"),
        ("wrong stage", put("dv", stage=1), r"%dv = aten.mm at middle reads %h.t on stage 1, and it is on stage 0"),
        ("no such stage", put("dv", stage=2), r"%dv = aten.mm at middle stands on stage 2, and there are 2"),
        ("wrong source", put("a.s1", kwargs=(("source", 1),)), r"%a.s1 = transfer at middle on stage 1 has the source 1"),
        ("no part", put("y", part=""), r"has the part ''"),
        ("part after a later one", put("y", part="once.0"), r"%y = aten.mm at last of once.0 stands after ops of forward.1"),
        ("read after the loop", read("n.v", "dv.whole", "dv"), r"%n.v = .* of once.1 reads %dv of backward.1, one value a microbatch"),
        ("sum read in its loop", read("g", "d", "loss"), r"%g = .* of backward.1 reads %loss of all microbatches, .* after forward.1"),
        ("stored elsewhere", inputs("v", 1), r"reads %v on stage 0, and it is on stage 1"),
        ("stored nowhere", inputs("v", 5), r"input param 'v' is stored on stage 5, and there are 2"),
        ("comes back elsewhere", put("v.new", stage=1), r"%v.new = aten.sub.Tensor reads %v on stage 1"),
    ]


@pytest.mark.parametrize(("mutant", "says"), [pytest.param(m, says, id=name) for name, m, says in mutants()])
def test_verify_refuses(mutant: Callable[[Program], Program], says: str) -> None:
    out = cut(tied(), 2, pins=["last"])
    with pytest.raises(ProgramError, match=says):
        verify(mutant(out))


def test_a_cut_inside_a_layer_means_what_eager_means() -> None:
    """The gradient of a layer norm does not read its bias, which is on the other stage."""
    target = load("hf:GPT2LMHeadModel")
    report = verify_beside_eager(target.model, target.batch, "pp2(cut=[transformer.h.1.mlp])", steps=1, backend="simulate")
    assert report.ok, str(report)
