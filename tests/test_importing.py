"""Checkpoints that DeepSpeed, FSDP2 and transformers wrote: imported, they go on as their own would have, under any plan; nothing in them is run.

``tests/data/deepspeed`` has checkpoints that DeepSpeed 0.19.8 wrote on two ranks, and the losses of its own next three steps; ``make.py`` there makes them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tarfile
import weakref
from collections.abc import Callable
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from gloo import fsdp
from gloo.launch import ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import deepseed
from deepseed.api import TrainStep
from deepseed.cli import app
from deepseed.importing import bring, find
from deepseed.importing import found as founds
from deepseed.importing.export import export
from deepseed.importing.found import Lazy
from deepseed.lr_schedules import WarmupLR
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.saved import Box, cut

small = fsdp.small
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_waiting_for_the_disk")]
torch.set_num_threads(1)

DATA = Path(__file__).parent / "data" / "deepspeed"
SAID = json.loads((DATA / "losses.json").read_text())
F32 = 1e-6  # float32 has 24 bits: a relative rounding of 6e-8 a sum, and sums are in another order than on DeepSpeed's two ranks
NAMES = ["zero1", "zero1-config", "zero2", "zero2-elastic", "zero2-universal", "zero3", "zero3-universal", "llama-zero3"]
PLANS = ["zero0", "zero3+dp2", "tp2"]
EVERY = [(name, plan) for name in NAMES for plan in PLANS]
DEFAULT = [("zero1", "zero0"), ("zero1", "zero3+dp2"), ("zero1", "tp2"), ("zero2", "zero3+dp2"), ("zero3", "zero0"), ("zero3", "zero3+dp2"), *((n, "zero0") for n in NAMES if n not in ("zero1", "zero2", "zero3"))]


def wide(every: list[Any], default: list[Any]) -> list[Any]:
    return [*default, *(pytest.param(*each, marks=pytest.mark.wide) for each in every if each not in default)]


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(DATA / f"{name}.tar.xz") as tar:
        tar.extractall(folder / name, filter="data")
    return folder / name


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[[str], Path]:
    return partial(unpacked, folder=tmp_path)


def made(name: str, plan: str) -> tuple[TrainStep, Any, Callable[[Tensor], Any]]:
    """A step as DeepSpeed's was, its scheduler, and how it takes a batch."""
    options: dict[str, Any] = {"clip_grad_norm": 1.0, "backend": "simulate"}
    if name.startswith("llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        model: Any = LlamaForCausalLM(LlamaConfig(**small.LLAMA))
    else:
        model, options["loss_fn"] = small.model(), lambda model, rows: model(rows)
    with torch.no_grad():
        for t in model.parameters():
            t.fill_(torch.nan)  # what is not read is seen
    if name.endswith("config"):
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        scheduler: Any = WarmupLR(optimizer, 0.0, 1e-2, 5, "linear")
    else:
        optimizer = small.adamw(model)
        scheduler = small.schedule(optimizer)
    if name.endswith("fp16"):
        options["loss_scale"] = deepseed.LossScale(initial=2.0**4, window=2)
    step = deepseed.compile(model, plan, optimizer=optimizer, **options)
    return step, scheduler, (lambda rows: {"input_ids": rows, "labels": rows}) if name.startswith("llama") else (lambda rows: rows)


def resumed(name: str, plan: str, folder: Path) -> tuple[list[float], list[Any], dict[str, Any], TrainStep]:
    step, scheduler, batch = made(name, plan)
    extra = step.load(folder)
    assert step.steps == 3
    scheduler.load_state_dict(extra["lr_scheduler"])
    losses, rates = [], []
    for rows in small.batches()[3:]:
        losses.append(float(step(batch(rows))))
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    return losses, rates, extra, step


def differ(got: list[float], want: list[float]) -> float:
    assert len(got) == len(want)
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


# DeepSpeed's ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "plan"), wide(EVERY, DEFAULT))
def test_next_losses_are_deepspeeds_own(name: str, plan: str, theirs: Callable[[str], Path], tmp_path: Path) -> None:
    bring(theirs(name), tmp_path / "ours", optimizer="AdamW" if name == "zero2-elastic" else None)
    losses, rates, extra, _ = resumed(name, plan, tmp_path / "ours")
    want = SAID[name.removesuffix("-universal")]
    assert differ(losses, want["losses"]) < F32
    assert rates == [pytest.approx(each, rel=1e-12) for each in want["rates"][3:]]
    assert extra["client_state"] == {"epoch": 5, "note": "from DeepSpeed"} and extra["global_samples"] == 12


def test_the_losses_see_the_optimizers_state(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """The comparison above would find state that was not read: without it the second loss differs a thousand times as much."""
    bring(theirs("zero1"), tmp_path / "ours", optimizer="none")
    step, _, _ = made("zero1", "zero0")
    step.load(tmp_path / "ours", optimizer=False)
    losses = [float(step(rows)) for rows in small.batches()[3:]]
    assert differ(losses[:1], SAID["zero1"]["losses"][:1]) < F32 and differ(losses[1:], SAID["zero1"]["losses"][1:]) > 1000 * F32


HALF = [("zero1-bf16", "zero1+dp2+bf16"), ("zero3-bf16", "zero3+dp2+bf16"), ("zero1-bf16-fp32sums", "zero1+dp2+bf16+grads(fp32)"), ("zero2-fp16", "zero2+dp2+fp16")]


@pytest.mark.parametrize(("name", "plan"), HALF)
def test_next_losses_in_16_bits(name: str, plan: str, theirs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many ranks gradients are the same 16-bit sums of the same two summands, so that the losses are as near as in float32. DeepSpeed's stage 3 puts a
    function of its own into the place of ``linear``, which rounds before it adds the bias: from its first step on its losses in 16 bits are not those of its stage 1."""
    if name.startswith("zero3"):
        assert abs(SAID[name]["before"][0] - SAID["zero1-bf16"]["before"][0]) > 1e-3
        monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: x.matmul(w.t()) if b is None else x.matmul(w.t()) + b)
    bring(theirs(name), tmp_path / "ours")
    losses, _, extra, step = resumed(name, plan, tmp_path / "ours")
    assert differ(losses, SAID[name]["losses"]) < F32
    if "fp16" in name:  # it grew by one of the three steps, as DeepSpeed's did
        assert step.loss_scale == SAID[name]["scale"] == 1024 and step.skipped == extra["skipped_steps"] == 0


def test_masters_are_read_not_the_16_bits(theirs: Callable[[str], Path]) -> None:
    found = find(theirs("zero3-bf16"))
    t = found.model["up.weight"].whole()
    assert t.dtype == torch.float32 and not torch.equal(t, t.bfloat16().float())
    assert found.model["frozen.weight"].dtype == torch.float32 == found.model["shift"].dtype


def test_every_way_finds_the_same(theirs: Callable[[str], Path]) -> None:
    """Stages 1 to 3 and universal checkpoints of two of them: the same values of the same training, bit for bit as far as stages compute alike."""
    every = {name: find(theirs(name)) for name in ("zero1", "zero2", "zero2-universal", "zero3", "zero3-universal")}
    one = every["zero1"]
    for name, other in every.items():
        assert other.tied == {"head.weight": "embed.weight"} and set(other.model) == set(one.model) and set(other.slots) == set(one.slots), name
        assert other.groups == one.groups and other.optimizer == one.optimizer == "torch.optim.adamw.AdamW" and other.step == 3
        for key in one.model:
            torch.testing.assert_close(other.model[key].whole(), one.model[key].whole(), rtol=1e-5, atol=1e-6)
        for key in one.slots:
            torch.testing.assert_close(other.slots[key].whole(), one.slots[key].whole(), rtol=1e-4, atol=1e-7)
    for stage in ("zero2", "zero3"):
        for key, t in every[stage].slots.items():
            assert torch.equal(t.whole(), every[f"{stage}-universal"].slots[key].whole())


def test_the_engine_loads_it(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """``engine.load_checkpoint(dir, tag)`` takes an imported one as one of its own; checked here by what it reads of ``extra``."""
    bring(theirs("zero1-config"), tmp_path / "tags" / "global_step3")
    _, _, extra, _ = resumed("zero1-config", "zero0", tmp_path / "tags" / "global_step3")
    assert {"client_state", "lr_scheduler", "micro_steps", "global_steps", "global_samples"} <= set(extra) and extra["micro_steps"] == extra["global_steps"] == 3


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def poisoned(path: Path, value: Any) -> None:
    found = torch.load(path, weights_only=False) if path.exists() and path.suffix == ".pt" else {}
    torch.save({**found, "more": value}, path)


@pytest.mark.parametrize("file", ["zero2-universal/global_step3/zero/up.weight/exp_avg.pt", "zero2-universal/global_step3/mp_rank_00_model_states.pt"])
def test_a_pickle_that_runs_code_is_refused_by_name(file: str, theirs: Callable[[str], Path], tmp_path: Path) -> None:
    theirs("zero2-universal")
    path, ran = tmp_path / file, tmp_path / "ran"
    poisoned(path, Malice(ran))
    assert isinstance(torch.load(path, weights_only=False), dict) and ran.exists()  # it is malicious
    ran.unlink()
    with pytest.raises(CheckpointError, match=r"posix\.system") as caught:
        bring(tmp_path / "zero2-universal", tmp_path / "ours")
    assert str(path) in str(caught.value) and "fix:" in str(caught.value)
    assert not ran.exists() and not (tmp_path / "ours").exists()


def test_weights_and_indices_that_run_code_are_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Malice(ran)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin names posix\.system"):
        bring(tmp_path, tmp_path / "ours")
    folder = tmp_path / "dcp"
    dcp.save({"model": {"w": torch.ones(2)}, "hook": Malice(ran)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError, match="hook is no plain data"):
        bring(folder, tmp_path / "ours")
    (folder / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        bring(folder, tmp_path / "ours")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["deepspeed.runtime.engine.DeepSpeedEngine", "argparse.Namespace"])
def test_objects_without_their_package_are_inert(name: str, theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """A client's object of a class that is not there is left out, and that is said."""
    folder = theirs("zero1") / "global_step3"
    module, _, kind = name.rpartition(".")
    fake = type(kind, (), {"__module__": module})
    thing = fake()
    thing.lr = 1.0
    parts = module.split(".")
    modules = {m: type(sys)(m) for m in (".".join(parts[: n + 1]) for n in range(len(parts))) if m not in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        for m, value in modules.items():
            patch.setitem(sys.modules, m, value)
        patch.setattr(sys.modules[module], kind, fake, raising=False)
        poisoned(folder / "mp_rank_00_model_states.pt", thing)
    found = bring(folder, tmp_path / "ours")
    assert "more" in found.notes[0] and found.extra is not None and found.extra["client_state"] == {"epoch": 5, "note": "from DeepSpeed"}


RANK0, RANK1 = (f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in range(2))


def drop(folder: Path) -> None:
    (folder / RANK1).unlink()


def more(folder: Path) -> None:
    shutil.copy(folder / RANK1, folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt")


def torn(folder: Path) -> None:
    path = folder / RANK1
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def parallel(folder: Path) -> None:
    shutil.copy(folder / RANK1, folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt")


def short(folder: Path) -> None:
    state = torch.load(folder / RANK1, weights_only=False, pickle_module=_inert())
    state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][:50].clone()
    state["optimizer_state_dict"] = {k: v for k, v in state["optimizer_state_dict"].items() if k not in ("loss_scaler", "zero_stage", "param_slice_mappings")} | {"zero_stage": 2}
    torch.save(state, folder / RANK1)


def counted(folder: Path) -> None:
    state = {"optimizer_state_dict": {"partition_count": [4, 4], "zero_stage": 2}}
    torch.save(state, folder / RANK1)


def no_model(folder: Path) -> None:
    (folder / "mp_rank_00_model_states.pt").unlink()


def _inert() -> Any:
    import pickle

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return type(name, (), {"__init__": lambda self, *a: None}) if module.startswith("deepspeed") else super().find_class(module, name)

    module = type(sys)("inert")
    module.Unpickler, module.load = Unpickler, pickle.load  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (drop, f"{RANK1} is missing: 2 ranks wrote this checkpoint, files of 1"), (more, "zero_pp_rank_2_mp_rank_00_optim_states.pt belongs to another checkpoint: 2 ranks wrote"),
        (torn, rf"{RANK1} is torn, .*\d+ bytes"), (parallel, "2 tensor- or pipeline-parallel ranks"), (short, "fp32 of embed.weight and 2 more has 244 elements, its 3 parameters have 387"),
        (counted, r"is of 2 ranks, .*_1_.* of 4: files of two checkpoints are mixed"), (no_model, "mp_rank_00_model_states.pt is missing"),
    ],
)  # fmt: skip
def test_what_is_missing_or_torn_is_named(harm: Callable[[Path], None], says: str, theirs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = theirs("zero2")
    harm(folder / "global_step3")
    with pytest.raises(CheckpointError, match=says) as caught:
        bring(folder, tmp_path / "ours")
    assert "\n  fix: " in str(caught.value) and not list(tmp_path.glob("ours*"))


def test_a_part_of_a_universal_checkpoint_is_missing(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = theirs("zero3-universal")
    shutil.rmtree(folder / "global_step3" / "zero" / "up.weight")
    with pytest.raises(CheckpointError, match=r"up.weight/fp32.pt is missing: 7 parameters were trained, 1 of them"):
        bring(folder, tmp_path / "ours")


def test_which_optimizer_it_is_must_be_said_where_no_file_says_it(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not say which optimizer .*\n  fix: --optimizer AdamW"):
        bring(theirs("zero2-elastic"), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"torch\.optim has no such class"):
        bring(tmp_path / "zero2-elastic", tmp_path / "ours", optimizer="Adan")


# boxes ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=3), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(8, 40))
def test_boxes_of_flat_parts(shape: list[int], lengths: list[int], largest: int) -> None:
    need = prod(shape)
    lengths = [*lengths, max(0, need - sum(lengths))]
    flat = torch.arange(sum(lengths), dtype=torch.float64)
    t = Lazy.joined(tuple(shape), list(flat.split(lengths)), "t")
    out = torch.full(shape, -1.0, dtype=torch.float64)
    for box in cut(Box((0,) * len(shape), (0,) * len(shape), tuple(shape)), 8, largest):
        Box((), box.at, box.sizes).of(out).copy_(t.part(box)) if 0 not in box.sizes else None
    assert torch.equal(out, flat[:need].view(shape))


def test_no_tensor_is_read_whole(theirs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a box is at most 100 bytes no more is read at once, and what is written is the same."""
    folder = theirs("zero3")
    bring(folder, tmp_path / "whole")
    sizes: list[int] = []
    part = Lazy.part
    monkeypatch.setattr(founds, "share_out", partial(founds.share_out, largest=100))
    monkeypatch.setattr(founds, "write_metadata", partial(founds.write_metadata, largest=100))
    monkeypatch.setattr(Lazy, "part", lambda self, box: (sizes.append(prod(box.sizes) * self.dtype.itemsize), part(self, box))[1])
    bring(folder, tmp_path / "cut")
    assert len(sizes) > 20 and max(sizes) <= 100
    assert resumed("zero3", "zero0", tmp_path / "cut")[0] == resumed("zero3", "zero0", tmp_path / "whole")[0]


def test_nothing_that_was_written_is_held(tmp_path: Path) -> None:
    """Of 40 tensors that are made when they are read, at most two are alive at any moment."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def make(box: Box) -> Tensor:
        nonlocal most
        t = torch.ones(box.sizes)
        alive.append(weakref.ref(t))
        most = max(most, sum(r() is not None for r in alive))
        return t

    founds.write(founds.Found("test", tmp_path, {f"w{n}": Lazy((8,), torch.float32, make) for n in range(40)}), tmp_path / "ours")
    assert len(alive) == 40 and most <= 2


# FSDP2's -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_fsdp_there_and_back(flat: bool, tmp_path: Path) -> None:
    """Three steps by FSDP2 on two ranks, imported, three more; exported again and read by FSDP2: the same losses in float64."""
    want = ranks(2, fsdp.rank, str(tmp_path / "theirs"), None, flat)[0]
    found = bring(tmp_path / "theirs", tmp_path / "ours")
    assert found.tied == {"head.weight": "embed.weight"} and found.step == 3 and found.extra is not None and found.extra["client_state"] == {"epoch": 5, "scheduler": {"last_epoch": 3}}
    for plan in ("zero3+dp2", "tp2"):
        model = small.model().double()
        step = deepseed.compile(model, plan, optimizer=small.adamw(model), loss_fn=lambda model, rows: model(rows), clip_grad_norm=1.0, backend="simulate")
        step.load(tmp_path / "ours")
        assert differ([float(step(rows)) for rows in small.batches()[3:]], want) < 1e-12
    export(tmp_path / "ours", tmp_path / "back", "dcp")
    if not flat:
        assert differ(ranks(2, fsdp.rank, "", str(tmp_path / "back"), flat)[0], want) < 1e-12


def test_a_file_of_a_rank_is_missing_or_torn(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(64)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "dcp" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is torn: .metadata tells of \d+ bytes, \d+ are there"):
        bring(tmp_path / "dcp", tmp_path / "ours")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing"):
        bring(tmp_path / "dcp", tmp_path / "ours")


# transformers' -------------------------------------------------------------------------------------------------------


@cache
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**small.LLAMA, "tie_word_embeddings": True}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_huggingface_there_and_back(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = llama()
    model.save_pretrained(tmp_path / "hf", max_shard_size="2KB")
    if kind == "bin":
        for path in (tmp_path / "hf").glob("*.safetensors*"):
            path.unlink()
        torch.save({n.removeprefix("model."): t for n, t in model.state_dict().items() if n != "lm_head.weight"}, tmp_path / "hf" / "pytorch_model.bin")
    found = bring(tmp_path / "hf", tmp_path / "ours")
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    fresh = LlamaForCausalLM(model.config)
    step = deepseed.compile(fresh, "zero3+dp2", optimizer=torch.optim.SGD(fresh.parameters(), lr=0.0), backend="simulate")
    step.load(tmp_path / "ours", optimizer=False)
    rows = small.batches()[0]
    assert abs(float(step({"input_ids": rows, "labels": rows})) - float(model(input_ids=rows, labels=rows).loss)) < F32
    export(tmp_path / "ours", tmp_path / "back", "hf", config=tmp_path / "hf", max_shard_size="2KB")
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    export(tmp_path / "ours", tmp_path / "half", "hf", dtype=torch.bfloat16, config=tmp_path / "hf" / "config.json")
    half = LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16 and torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    export(tmp_path / "ours", tmp_path / "weights.pt", "torch")
    assert not fresh.load_state_dict(torch.load(tmp_path / "weights.pt")).missing_keys


def test_experts_are_stacked_and_taken_apart(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**{**small.LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}))
    model.save_pretrained(tmp_path / "hf")
    found = bring(tmp_path / "hf", tmp_path / "ours")
    assert all(torch.equal(t.whole(), model.state_dict()[name]) for name, t in found.model.items()) and set(found.model) == set(model.state_dict())
    export(tmp_path / "ours", tmp_path / "back", "hf", config=tmp_path / "hf")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_directory_without_a_config_has_its_own_names(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    bring(tmp_path / "model.safetensors", tmp_path / "ours")
    fresh = nn.Linear(3, 2)
    step = deepseed.compile(fresh, optimizer=torch.optim.SGD(fresh.parameters()), loss_fn=lambda model, x: model(x).sum(), backend="simulate")
    step.load(tmp_path / "ours", optimizer=False)
    assert torch.equal(fresh.weight, model.weight)
    with pytest.raises(CheckpointError, match="has no optimizer state"):
        step.load(tmp_path / "ours")


# the commands --------------------------------------------------------------------------------------------------------


def command(*words: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return result


def test_the_commands(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    source, series = theirs("zero3"), tmp_path / "run"
    out = command("import", source, series / "a").output
    assert "deepspeed zero3, step 3: 9 tensors of the model, 21 of the state of AdamW in 2 groups" in out and f"next: step.load('{series / 'a'}')" in out
    command("import", source, series / "b", "--tag", "global_step3", "--format", "deepspeed")
    (series / "latest").write_text("b")
    assert re.search(r"^b +3 +deepspeed zero3 +1 +[\d,]+ +complete, latest$", command("ls", series).output, re.M)
    assert [(each["tag"], each["state"], each["latest"]) for each in json.loads(command("ls", series, "--json").output)] == [("a", "complete", False), ("b", "complete", True)]
    assert command("verify", series).output.count(": complete") == 2

    path = series / "a" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert "a: damaged" in (out := command("verify", series, code=1).output) and f"{path} is damaged: crc32" in out and "b: complete" in out
    assert [each["state"] for each in json.loads(command("ls", series, "--json").output)] == ["complete", "complete"]  # sizes are as they were
    assert "is damaged" in command("export", series / "a", tmp_path / "x", "--to", "torch", code=2).stderr
    path.write_bytes(content[:-1])
    assert "is torn" in command("ls", series).output
    (series / "a" / "manifest.json").unlink()
    (series / "a").rename(series / "a.tmp-0123abcd")
    assert re.search(r"^a.tmp-0123abcd .* partial$", command("ls", series).output, re.M) and "partial" in command("verify", series, code=1).output

    shutil.copytree(series / "b", series / "c")
    (series / "c" / "manifest.json").unlink()  # beside others of ours it is no checkpoint of somebody else's
    assert re.search(r"^c .* partial$", command("ls", series).output, re.M) and "c: partial" in command("verify", series, code=1).output
    assert "is partial: it has lost its manifest.json" in command("import", series / "c", tmp_path / "y", code=2).stderr
    shutil.rmtree(series / "c")
    shutil.copytree(series / "a.tmp-0123abcd", series / "b.tmp-89abcdef")  # beside one that is whole
    assert re.search(r"^b.tmp-89abcdef .* partial$", command("ls", series).output, re.M) and "b: complete" in command("verify", series, code=1).output
    shutil.rmtree(series / "b.tmp-89abcdef")
    (series / "latest").write_bytes(b"\xff\xfe../..")
    for words in (("ls", series), ("verify", series)):
        assert "latest is damaged: it holds" in command(*words, code=int(words[0] == "verify")).output
    assert "latest is damaged: it holds" in command("export", series, tmp_path / "x", "--to", "torch", code=2).stderr
    (series / "latest").write_text("b")
    assert "fix: such as 5GB" in command("export", series, tmp_path / "x", "--to", "hf", "--max-shard-size", "foo", code=2).stderr

    out = command("export", series, tmp_path / "weights.pt", "--to", "torch", "--dtype", "bf16").output
    assert "wrote 9 tensors of the model" in out and torch.load(tmp_path / "weights.pt")["head.weight"].dtype == torch.bfloat16
    assert "--config" in command("export", series / "b", tmp_path / "hf", "--to", "hf").output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("import", "nowhere", "x"), "nowhere: no such file or folder"), (("import", "empty", "x"), "is no checkpoint that is known: it holds nothing"),
        (("ls", "empty"), "holds no checkpoint of deepseed"), (("ls", "nowhere"), "no such folder"), (("import", "empty", "x", "--format", "zip"), "--format zip: not known"),
        (("export", "empty", "x", "--to", "onnx"), "--to onnx: not known"), (("import", "empty", "x", "--tag", "7"), "7 is not there: "), (("export", "empty", "x", "--to", "hf", "--dtype", "int4"), "--dtype int4"),
    ],
)  # fmt: skip
def test_mistakes_are_answered(words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert says in (said := command(*words, code=2).stderr) and "\n  fix: " in said


def test_what_the_system_refuses_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: Callable[[str], Path]) -> None:
    """With the path and a fix; nothing is left of what was begun."""
    monkeypatch.chdir(tmp_path)
    step = deepseed.compile(model := nn.Linear(4, 4), "zero0", optimizer=torch.optim.SGD(model.parameters()), loss_fn=lambda m, x: m(x).sum(), backend="simulate")
    step.save("ours")
    Path("file").write_text("x")
    long, left = "x" * 300, {"file", "ours", *(p.name for p in tmp_path.iterdir())}
    refused = [("ls", "file"), ("verify", "file/x"), ("ls", long), ("import", "ours", "x"), ("import", "file/x", "x"), ("import", long, "x")]
    refused += [("export", "ours", dest, "--to", to) for to in ("hf", "torch", "dcp") for dest in ("file/x", "file/x/y", long)]
    for words in refused:
        said = command(*words, code=2).stderr
        assert "\n  fix: " in said and "[Errno" not in said and words[1 if words[0] in ("ls", "verify") or words[1] != "ours" else 2 if words[0] == "export" else 1][:4] in said, (words, said)
    open_, write = Path.open, os.fsync

    def refuses(number: int) -> None:
        def fails(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "w" in mode and ".tmp-" in str(path):
                raise OSError(number, os.strerror(number), str(path))
            return open_(path, mode, *args, **options)

        monkeypatch.setattr(Path, "open", fails)

    for number in (errno.EACCES, errno.ENOSPC, errno.EROFS):
        refuses(number)
        for words in (("import", theirs("zero1"), "new"), ("export", "ours", "new", "--to", "torch"), ("export", "ours", "new", "--to", "dcp")):
            said = command(*words, code=2).stderr
            assert os.strerror(number) in said and str(tmp_path / "new") in said and "\n  fix: " in said, said
    monkeypatch.setattr(Path, "open", open_)
    assert write is os.fsync and {p.name for p in tmp_path.iterdir()} - {"zero1"} == left - {"zero1"}


def test_an_import_that_fails_leaves_nothing(theirs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(theirs("zero1"), tmp_path / "ours")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "ours").iterdir())

    def full(*_: Any) -> Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Lazy, "part", full)
    with pytest.raises(CheckpointError, match=r"^model\..* cannot be read: .*No space left on device\n  fix: "):
        bring(tmp_path / "zero1", tmp_path / "ours")
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "ours").iterdir()) == before and [p.name for p in tmp_path.glob("ours*")] == ["ours"]


def test_archives_hold_checkpoints_and_nothing_else() -> None:
    assert sum(p.stat().st_size for p in DATA.iterdir() if p.is_file()) < 200_000
    for path in DATA.glob("*.tar.xz"):
        with tarfile.open(path) as tar:
            assert all(re.fullmatch(r"latest(_universal)?|global_step3(/.*)?", m.name) and (m.isdir() or m.name.endswith(".pt") or "latest" in m.name) for m in tar.getmembers())
