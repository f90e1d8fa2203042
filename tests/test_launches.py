"""How many kernels a step launches, counted: a block of a Llama beside eager PyTorch's ops, and the update."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepseed
from deepseed import build
from deepseed import kernels as back_ends
from deepseed.codegen import autotune, inductor
from deepseed.explain_kernels import explain_kernels
from deepseed.ir.program import Program
from deepseed.ir.text import parse

transformers = pytest.importorskip("transformers")


class Counted(TorchDispatchMode):
    """Ops that make or change numbers: what only views or allocates is left out."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.n += not views and func.overloadpacket.__name__ not in ("empty", "empty_strided", "empty_like", "detach", "_unsafe_view", "_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def llama(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    ids = torch.randint(0, 64, (2, 16))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def eager(layers: int, plan: str) -> int:
    model, batch = llama(layers)
    with Counted() as counted, torch.autocast("cpu", torch.bfloat16, enabled=plan == "bf16"):
        model(**batch).loss.backward()
    return counted.n


def program(layers: int, plan: str, optimizer: Any) -> Program:
    model, batch = llama(layers)
    step = deepseed.compile(model, plan, optimizer=optimizer(model.parameters()), example_batch=batch, codegen="functions")
    return step.passes[-1].program


@pytest.mark.parametrize(("plan", "codegen", "most"), [("fp32", "functions", 0.34), ("bf16", "functions", 0.27), ("fp32", "triton", 0.34), ("bf16", "triton", 0.253)])
def test_a_block_launches_two_fifths_of_what_eager_does(plan: str, codegen: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of one block, the update's casts and its share of the update too: two layers less one, so that embedding and head fall out. Kernels that Triton
    writes are counted one by one."""
    if codegen == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(build, "PRODUCTS", {"functions": "joined"})
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    programs = [program(layers, plan, lambda p: torch.optim.SGD(p, lr=0.1)) for layers in (1, 2)]
    one, two = (explain_kernels(p, p, back_ends.traffic(codegen)).launches for p in programs)
    of_eager = eager(2, plan) - eager(1, plan)
    assert (two - one) / of_eager <= most, (one, two, of_eager)


class Written(TorchDispatchMode):
    """Of ops that make numbers: how many, and the bytes of their operands, what broadcasting repeats once, and of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.read, self.written = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None for r in func._schema.returns) and func.overloadpacket.__name__ not in ("empty", "_unsafe_view"):
            self.n += 1
            read = {id(x): x for x in args if isinstance(x, torch.Tensor)}.values()
            self.read += sum(prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.itemsize for x in read)
            self.written += out.nbytes
        return out


ODD = """program step mesh() facts(canonical, placed, explicit, lowered, captured)
%x : f32[8, 64] batch "x"
%w : f32[64, 8] param "w"
%b : f32[64] param "b"
%t = permute(%w, dims=[1, 0]) : f32[8, 64] {phase="forward", kernel="d"}
%y = aten.mul.Tensor(%x, %t) : f32[8, 64] {phase="forward", kernel="d"}
%z = aten.digamma(%y) : f32[8, 64] {phase="forward", kernel="d"}
%e = expand(%b, sizes=[8, 64]) : f32[8, 64] {phase="forward", kernel="d"}
%a = aten.add.Tensor(%z, %e) : f32[8, 64] {phase="forward", kernel="d"}
%t2 = permute(%w, dims=[1, 0]) : f32[8, 64] {phase="forward", kernel="d2"}
%y2 = aten.mul.Tensor(%a, %t2) : f32[8, 64] {phase="forward", kernel="d2"}
%z2 = aten.digamma(%y2) : f32[8, 64] {phase="forward", kernel="d2"}
%e2 = expand(%b, sizes=[8, 64]) : f32[8, 64] {phase="forward", kernel="d2"}
%a2 = aten.add.Tensor(%z2, %e2) : f32[8, 64] {phase="forward", kernel="d2"}
%r = aten.relu(%a2) : f32[8, 64] {phase="forward", kernel="r"}
%s = aten.exp(%r) : f32[8, 64] {phase="forward", kernel="r"}
return %s output "s"
"""


@needs.compiler
@pytest.mark.parametrize("codegen", ["triton", "cpp"])
def test_a_group_that_no_kernel_computes_launches_its_ops(codegen: str, tmp_path: Path) -> None:
    """As many as its Python function runs, which move as many bytes; it is the one that the back end says it runs so, for the reason that it says."""
    if codegen == "triton":
        pytest.importorskip("triton")
    p = parse(ODD)
    report = explain_kernels(p, p, back_ends.traffic(codegen))
    (odd, relu) = report.kernels
    assert (odd.calls, odd.runs_as, relu.calls, relu.launches, relu.runs_as, relu.why) == (2, "python", 1, 1, "kernel", "")
    given = autotune.operands(report.made[odd.name], torch.device("cpu"))
    with Written() as ran:
        inductor.python(report.made[odd.name])(*given)
    assert (odd.launches, odd.bytes_read, odd.bytes_written) == (2 * ran.n, ran.read, ran.written) == (6, (2 + 1 + 1) * 2048 + 256, 3 * 2048)
    assert odd.bytes_minimum == 2 * 2048 + 256 + 2048 and (report.launches, report.launches_ungrouped) == (6 + 1, 6 + 2)
    said = list[str]()
    inductor._told.clear()
    back_ends.BACK_ENDS[codegen](list(report.made.values()), tmp_path, said.append)
    assert [line.splitlines()[0] for line in said] == [f"{odd.name} runs as plain Python: {odd.why}"]
    assert f"\n  1 of them runs as plain Python, a launch each op; no kernel is written:\n    {odd.name}: {odd.why}\n" in f"{report}\n"
    assert [(k["calls"], k["runs_as"], k["why"]) for k in report.to_json()["kernels"]] == [(2, "python", odd.why), (1, "kernel", "")]


class Odd(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for w in group["params"]:
                w.add_(torch.digamma(w.grad.abs() + 1), alpha=-group["lr"])


@needs.compiler
@pytest.mark.parametrize("codegen", ["triton", "cpp"])
def test_an_update_that_no_kernel_computes_launches_its_ops_of_each_tensor(codegen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if codegen == "triton":
        pytest.importorskip("triton")
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    model = torch.nn.Linear(8, 16)
    step = deepseed.compile(model, "zero0", optimizer=Odd(model.parameters()), loss_fn=lambda m, x: m(x).square().mean(), example_batch=torch.randn(8, 8), codegen="functions")
    p = step.passes[-1].program
    report = explain_kernels(p, p, back_ends.traffic(codegen))
    (k,) = (k for k in report.kernels if k.name in report.updates)
    formulas, floats = report.updates[k.name].formulas, (8 * 16 + 16) * 4
    assert (k.calls, k.launches, k.runs_as) == (1, 2 * len(k.ops), "python") and "aten.digamma" in k.why
    assert k.bytes_written == sum(floats if op.type.shape else 2 * op.type.nbytes for op in formulas[0].program.ops) and k.bytes_read > k.bytes_minimum
    said = list[str]()
    inductor._told.clear()
    back_ends.update(formulas, codegen, False, said.append)
    assert [line.splitlines()[0] for line in said] == [f"{k.name} is torch's, one tensor after another: {k.why}"]


def test_updates_of_two_stages_on_a_rank_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are of one call, and calls are of a step: together they are what a step moves."""
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    model = torch.nn.Sequential(*[torch.nn.Linear(n, m) for n, m in ((8, 16), (16, 24), (24, 32), (32, 8))])
    step = deepseed.compile(
        model, "pp2(cut=[1, 2, 3])+interleaved2+mb2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, x: m(x).square().mean(), example_batch=torch.randn(8, 8),
        codegen="functions", backend="simulate",
    )  # fmt: skip
    report = explain_kernels(step.passes[-1].program, step.passes[-1].program)
    each = [k for k in report.kernels if k.name in report.updates]
    assert [k.name for k in each] == [each[0].name, f"{each[0].name}#2"] and all(k.calls == k.launches == 1 for k in each)
    of_layer = [sum(x.numel() for x in layer.parameters()) * 4 for layer in model]
    assert sum(k.bytes_written for k in each) in (of_layer[0] + of_layer[2], of_layer[1] + of_layer[3])


@pytest.mark.parametrize("codegen", ["functions", "triton"])
@pytest.mark.parametrize("plan", ["zero0", "zero1+dp2", "zero3+dp2", "zero2+dp2+bf16", "bf16", "fp16", "chunked4", "chunked4+bf16", "mb2+bf16", "zero3+dp2+bf16+remat", "tp2+dp2+bf16", "zero2+dp2+bf16+offload(optimizer)"])
@pytest.mark.turn
def test_the_update_is_one_kernel(plan: str, codegen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all parameters, which have one dtype, whatever the gradients', clipping included; and nothing is widened or scaled for it. What the source calls is what `explain` counts."""
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    if codegen == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(build, "PRODUCTS", {"functions": "joined"})
    model, batch = llama(2)
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), clip_grad_norm=1.0, example_batch=batch, codegen="functions", backend="simulate")
    for e in step.programs.current().executables:
        assert len(re.findall(r"\n    update_adamw_\w+\(params, ", e.source)) == 1 and "torch._fused_" not in e.source
    p = step.passes[-1].program
    report = explain_kernels(p, p, back_ends.traffic(codegen))
    (update,) = (k for k in report.kernels if k.name in report.updates)
    elements = sum(x.numel() for x in model.parameters()) // (2 if "zero" in plan and "dp2" in plan else 1) // (2 if "tp2" in plan else 1)
    narrow, shared = 2 if "16" in plan else 0, 12 + ("fp16" in plan)
    (sizes,) = report.updates[update.name].sizes
    tensors = len(sizes)
    assert update.launches == 1 and not any(op.startswith("optim.") for op in report.alone)
    if "tp2" not in plan:  # of which some parameters are whole on each rank
        assert update.bytes_read == elements * (16 - narrow) + 4 * tensors + shared and update.bytes_written == elements * 12
    grads = {op.refs[1].name for op in p.ops if op.target == "optim.adamw"}
    assert len(grads) == tensors and all(p.types[g].dtype == (("fp16" in plan and "f16") or ("bf16" in plan and "bf16") or "f32") for g in grads)


def test_squares_of_16_bit_gradients_are_one_kernel_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are a CPU's, one a gradient, as its caches hold it."""
    pytest.importorskip("triton")
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    alone = []
    for products in ("joined", ""):
        monkeypatch.setattr(build, "PRODUCTS", {"functions": products})
        with torch.device("meta"):
            config = transformers.LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, use_cache=False)
            model, ids = transformers.LlamaForCausalLM(config), torch.empty(2, 16, dtype=torch.int64)
        step = deepseed.compile(model, "bf16", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), clip_grad_norm=1.0, example_batch={"input_ids": ids, "labels": ids}, codegen="functions")
        p = step.passes[-1].program
        alone.append(explain_kernels(p, p, back_ends.traffic("triton" if products else "functions")).alone)
    device, cpu = alone
    assert "sum_of_squares" not in device and cpu["sum_of_squares"] == len(list(model.parameters())), (cpu, device)
