"""Two memories of a rank: the host's and the device's, in types, text and typing; and the moves between them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from deepseed import ops
from deepseed.check.translation import TranslationError, follow, number
from deepseed.check.typing import TypingError, check_types
from deepseed.ir.collective import step
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.memory import memory
from deepseed.runtime.arena import Arena
from deepseed.runtime.simulate import simulate

MOVED = """program p mesh(dp=2) facts(lowered, placed)
%w : f32[8@dp, 4] host param "w"
%m : f32[8@dp, 4] host state "m/w"
%g : f32[8@dp, 4] batch "g"
%w.device.start = to_device.start(%w) : f32[8@dp, 4] {phase="forward"}
%w.device = wait(%w.device.start) : f32[8@dp, 4] {phase="forward"}
%d = aten.mul.Tensor(%g, %w.device) : f32[8@dp, 4] {phase="backward"}
%d.host.start = to_host.start(%d) : f32[8@dp, 4] host {phase="update"}
%d.host = wait(%d.host.start) : f32[8@dp, 4] host {phase="update"}
%m.new = aten.add.Tensor(%m, %d.host) : f32[8@dp, 4] host {phase="update"}
%w.new = aten.sub.Tensor(%w, %m.new) : f32[8@dp, 4] host {phase="update"}
return %w.new param "w"
return %m.new state "m/w"
"""


def test_the_memory_of_a_value_is_in_the_text_and_comes_back():
    p = verify(parse(MOVED))
    assert str(p) == MOVED and p.types["w"].host and not p.types["w.device"].host
    assert hash(p.types["w"]) != hash(p.types["w.device"]) and p.types["w"].on(False) == p.types["w.device"]


def test_moves_are_well_typed_and_mean_nothing():
    p = parse(MOVED)
    check_types(p)
    plain = "\n".join(line for line in MOVED.split("\n") if "start" not in line and "wait" not in line)
    plain = plain.replace("%w.device", "%w").replace("%d.host", "%d").replace(" host", "")
    follow(number(parse(plain)), p)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [("to_host.start(%d)", "to_host.start(%g)"), ("aten.sub.Tensor(%w, %m.new)", "aten.sub.Tensor(%w, %m)"), ("%g, %w.device)", "%g, %g)")],
)
def test_a_move_of_another_value_is_found(line, wrong):
    p = parse(MOVED)
    with pytest.raises(TranslationError, match="another value"):
        follow(number(p), parse(MOVED.replace(line, wrong)))


@pytest.mark.parametrize(
    ("line", "wrong", "said"),
    [
        ("%m.new = aten.add.Tensor(%m, %d.host)", "%m.new = aten.add.Tensor(%m, %d)", "%d lies on the device"),
        ("%d = aten.mul.Tensor(%g, %w.device)", "%d = aten.mul.Tensor(%g, %w)", "%w lies on the host"),
        ("to_host.start(%d) : f32[8@dp, 4] host", "to_host.start(%d) : f32[8@dp, 4]", "on the device"),
        ("to_device.start(%w) :", "to_device.start(%g) :", "%g lies on the device"),
        ("%w.device = wait(%w.device.start) : f32[8@dp, 4]", "%w.device = wait(%w.device.start) : f32[8@dp, 4] host", "%w.device lies on the host"),
    ],
)
def test_an_op_runs_in_one_memory(line, wrong, said):
    assert line in MOVED
    with pytest.raises(TypingError, match=said):
        check_types(parse(MOVED.replace(line, wrong)))


def test_ranks_exchange_what_lies_on_the_device():
    text = 'program p mesh(dp=2) facts(lowered, placed)\n%w : f32[8@dp] host param "w"\n%s = all_gather.start(%w, axis="dp") : f32[8] host {phase="forward"}\n%f = wait(%s) : f32[8] host {phase="forward"}\nreturn %f output "f"\n'
    with pytest.raises(TypingError, match=r"all_gather.start runs on the device, and %w lies on the host"):
        check_types(parse(text))


def test_memory_counts_both_memories_apart():
    m = memory(parse(MOVED))
    part = 4 * 4 * 4  # bytes of a rank's half
    assert m.peak_bytes == 3 * part  # g, w.device, d
    assert m.host_bytes == 4 * part  # w and m, the gradient and the new m, then that and the new w


DRAWS = [
    ("f32[6, 50]", (6, 50), [[(6,)], [(50,)]]),
    ("f32[8@dp, 50]", (4, 50), [[(2, 0, 1), (4,)], [(50,)]]),
    ("f32[6, 8@dp, 50]", (6, 4, 50), [[(6,)], [(2, 0, 1), (4,)], [(50,)]]),
    ("bf16[600, 8@dp, 51]", (600, 4, 51), [[(600,)], [(2, 0, 1), (4,)], [(51,)]]),
    ("f32[300, 10@dp]", (300, 5), [[(300,)], [(2, 0, 1), (5,)]]),
    ("f32[300, 400@dp]", (300, 200), [[(300,)], [(2, 0, 1), (200,)]]),
    ("f32[60000]", (60000,), [[(60000,)]]),
]  # fmt: skip


@pytest.mark.parametrize("target", ["bernoulli", "uniform"])
@pytest.mark.parametrize(("said", "shape", "index"), DRAWS, ids=[said for said, _, _ in DRAWS])
def test_what_a_draw_works_on_is_counted(target: str, said: str, shape: tuple[int, ...], index: list[list[tuple[int, ...]]]):
    """Whole runs, runs that a split cuts out, and runs that end within a random word: as the arena counts it, but for a few counters."""
    numbers = {"bernoulli": "p=0.5", "uniform": "low=0.0, high=1.0"}[target]
    p = parse(f'program p mesh(dp=2) facts(lowered, placed)\n%s : i64[2] rng "rng"\n%m = {target}(%s, {numbers}, site="d") : {said} {{phase="forward"}}\nreturn %m output "m"\n')
    arena, rng = Arena(0), torch.tensor([1, 2])
    with arena.step([rng], [False]):
        numbers = {"bernoulli": (0.5,), "uniform": (0.0, 1.0)}[target]
        getattr(ops, target)(rng, shape, *numbers, "d", torch.bfloat16 if "bf16" in said else torch.float32, index)
    assert abs(memory(p).peak_bytes - arena.peak) <= 0.01 * arena.peak + 256, (memory(p).peak_bytes, arena.peak)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", ["sdpa", "sdpa_backward"])
def test_what_attention_works_on_is_counted(target: str, heads: int, masked: bool):
    """Copies of keys and values for heads that share them, of their gradients, and of a mask as numbers; one head for all is copied only as a gradient."""
    q, k, lse = "f32[2, 4, 8, 16]", f"f32[2, {heads}, 8, 16]", "f32[2, 4, 8]"
    mask = ['%mask : bool[2, 1, 8, 8] batch "mask"'] if masked else []
    given = [f'%q : {q} batch "q"', f'%k : {k} batch "k"', f'%v : {k} batch "v"', *mask]
    arguments = f"{'%mask' if masked else 'none'}"
    if target == "sdpa":
        op = f'%o, %l = sdpa(%q, %k, %v, {arguments}, causal=false, scale=0.5) : {q}, {lse} {{phase="forward"}}\nreturn %o output "o"'
    else:
        given += [f'%g : {q} batch "g"', f'%o : {q} batch "o"', f'%l : {lse} batch "l"']
        op = f'%dq, %dk, %dv = sdpa_backward(%g, %q, %k, %v, {arguments}, %o, %l, causal=false, scale=0.5) : {q}, {k}, {k} {{phase="backward"}}\nreturn %dq output "o"'
    p = parse("\n".join(["program p mesh() facts(lowered, placed)", *given, op, ""]))
    tensors = {i.key: torch.ones(i.type.shape, dtype=torch.bool) if i.type.dtype == "bool" else torch.randn(i.type.shape) for i in p.inputs}
    arena = Arena(0)
    with arena.step(list(tensors.values()), [False] * len(tensors)):
        attention = [tensors[key] for key in ("q", "k", "v")] + [tensors.get("mask")]
        if target == "sdpa":
            ops.sdpa(*attention, False, 0.5)
        else:
            ops.sdpa_backward(tensors["g"], *attention, tensors["o"], tensors["l"], False, 0.5)
    assert abs(memory(p).peak_bytes - arena.peak) <= 64, (memory(p).peak_bytes, arena.peak)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[7@dp, 60]", "[7, 60]"), ("[60, 7@dp]", "[60, 7]"), ("[7, 60] sum@dp", "[7@dp, 60]"), ("[60, 7] sum@dp", "[60, 7@dp]"), ("[7@dp, 80]", "[7, 80@dp]"), ("[80@dp, 6]", "[80, 6@dp]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("members", [1, 2])
def test_what_ranks_pad_is_counted(before: str, after: str, members: int):
    """Parts of unequal size, gathered, reduced and exchanged, by themselves and in a bucket: as each rank's arena counts it."""
    n = 3
    given = [f'%x{i} : f32{before} batch "x{i}"' for i in range(members)]
    kind = "all_gather" if "@dp" not in after else "reduce_scatter" if "sum" in before else "all_to_all"
    starts, operands = (", ".join(f"%{c}{i}" for i in range(members)) for c in "sx")
    lines = [f'{starts} = {kind}.start({operands}, axis="dp") : {", ".join([f"f32{after}"] * members)} {{phase="forward"}}']
    lines += [f'%y{i} = wait(%s{i}) : f32{after} {{phase="forward"}}' for i in range(members)]
    p = parse("\n".join([f"program p mesh(dp={n}) facts(lowered, placed)", *given, *lines, *(f'return %y{i} output "{i}"' for i in range(members)), ""]))
    arenas = [Arena(rank) for rank in range(n)]
    local = [p.mesh.seen_from({"dp": rank}) for rank in range(n)]
    how = step(p.types["x0"].shape, p.types["x0"].layout, p.types["s0"].layout, "dp", p.mesh)

    def run(rt: Any, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        take, put = ([place.numbers] * members if place is not None else [] for place in (how.take, how.put))
        with arenas[rt.rank].step(inputs, [False] * members):
            caller = list(inputs) if "sum" in before else []  # what is not cut is the caller's
            xs = [inputs.pop() for _ in range(members)]
            if members == 1:
                handles = [getattr(rt, f"{kind}_start")(xs[0], "dp", *take, *put)]
            else:
                handles = rt.bucket_start(kind, xs, "dp", take=take, put=put)
            xs.clear()
            out = []
            while handles:
                out.append(rt.wait(handles.pop(0)))
            del caller
            return tuple(out)

    simulate(p.mesh, [run] * n, [[torch.randn(p.types["x0"].local(mesh)) for _ in range(members)] for mesh in local], arenas=arenas)
    for mesh, arena in zip(local, arenas, strict=True):
        said = memory(replace(p, mesh=mesh)).peak_bytes
        assert said == arena.peak, (kind, arena.rank, said, arena.peak)
