"""Weights in safetensors files: a model on the meta device begins with them, under any plan, each rank reading its own part; and back."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import strategies as ours
import torch
from gloo import weights as ranks_do
from gloo.checkpoint import Tagger, batches, everything, made, trained
from gloo.launch import ranks
from gloo.stages import LATER, LOOPS, ZERO3, Cut, staged, stored_by
from gloo.weights import empty, filed, read_by_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import same, stored
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.build import CompileError
from deepseed.check.shards import coordinates, shards
from deepseed.ir.layout import Layout
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Input, Type
from deepseed.ops import torch_dtype
from deepseed.pieces import Piece, Source
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.host import SimulatedHost
from deepseed.runtime.safetensors import DTYPES, Stored, make, mapped
from deepseed.runtime.safetensors import stored as header
from deepseed.runtime.saved import Entry, share_out
from deepseed.runtime.state import State, shard
from deepseed.target import load
from deepseed.weights import Weights

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_waiting_for_the_disk")]
torch.set_num_threads(1)


def wide(*values: Any) -> list[Any]:
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.wide) for v in values]


def quiet(plan: str, **options: Any) -> TrainStep:
    return made(plan, backend="simulate", **options)


@cache
def files() -> tuple[Path, dict[str, Tensor]]:
    folder = Path(tempfile.mkdtemp()) / "w"
    return folder, filed(folder)


def real() -> nn.Module:
    """The model that those files are of, with memory."""
    model = Tagger().double()
    model.load_state_dict(files()[1])
    return model


# the format -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(stored(), st.sampled_from(["f64", "bf16", "i32", "bool"]), st.sampled_from([100, 10**6]))
def test_every_layout_reads_what_any_other_wrote(drawn: Any, dtype: str, largest: int) -> None:
    """And the safetensors library reads it, with other tensors beside it."""
    shape, ((mesh, layout), (other, wanted)) = drawn
    whole = (torch.arange(torch.Size(shape).numel()).reshape(shape) % 100).to(torch_dtype(dtype))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        make(path, {"odd": (torch.bool, (3,)), "x": (whole.dtype, shape), "one": (torch.float64, ())})
        file, at = mapped(path, write=True), header(path)["x"]
        entry = Entry(shape, whole.dtype, layout, shards(whole, Type(dtype, shape, layout), mesh))
        for rank, share in enumerate(share_out({"x": entry}, mesh, largest)):
            for _, box in share:
                at.part(file, box).copy_(box.of(entry.parts[rank]))  # type: ignore[arg-type]
        del file
        assert torch.equal(load_file(path)["x"], whole)
        weights = Weights(path, {("param", "x"): [Source.whole("x", at)]}, (), ())
        states = [State(other, c, torch.device("cpu")) for c in coordinates(other)]
        for state in states:
            state.reserve(Input("x", Type(dtype, shape, wanted), "param", "x"))
        weights.read(SimulatedHost(other), states, [("param", "x")])
        for state, part in zip(states, shards(whole, Type(dtype, shape, wanted), other), strict=True):
            assert torch.equal(state.tensors["param", "x"], part)


def test_a_vocabulary_that_ranks_do_not_divide(tmp_path: Path) -> None:
    table = torch.randn(50257, 3, dtype=torch.bfloat16)
    save_file({"wte.weight": table}, tmp_path / "x.safetensors")
    mesh = Mesh((("tp", 2),))
    type_ = Type("f32", (50257, 3), Layout.of(tp=ours.Split(0, 1, 50257)))
    states = [State(mesh, c, torch.device("cpu")) for c in coordinates(mesh)]
    for state in states:
        state.reserve(Input("x", type_, "param", "x"))
    source = Source.whole("wte.weight", header(tmp_path / "x.safetensors")["wte.weight"])
    with read_by_rank() as counted:
        Weights(tmp_path, {("param", "x"): [source]}, (), ()).read(SimulatedHost(mesh), states, [("param", "x")])
    assert counted == {0: 25129 * 6, 1: 25128 * 6}
    for state in states:
        assert torch.equal(state.tensors["param", "x"], shard(table.float(), type_, mesh, state.coordinate))


def test_every_dtype_of_the_library(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = header(tmp_path / "theirs.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, (2, 3)) for n, t in tensors.items()}
    make(tmp_path / "ours.safetensors", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert {n: file.get_tensor(n).dtype for n in file.keys()} == {n: t.dtype for n, t in tensors.items()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(CheckpointError, match="x is complex128, which safetensors cannot hold"):
        make(tmp_path / "none.safetensors", {"x": (torch.complex128, (2,))})


def test_a_file_that_aligns_nothing(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    text = json.dumps({"x": {"dtype": "F32", "shape": [5, 4], "data_offsets": [1, 81]}, "b": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + x.numpy().tobytes())
    at = header(path)["x"]
    from deepseed.runtime.saved import Box

    assert torch.equal(at.part(mapped(path), Box((1, 2), (), (3, 2))), x[1:4, 2:])
    assert bool(header(path)["b"].part(mapped(path), Box((), (), ())))


# a model without values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero3+dp3", *wide("zero3+dp2", "tp2", "zero1+pp2+dp1")])
def test_it_trains_as_the_model_that_was_saved(plan: str) -> None:
    """Bit for bit: tied weight, buffers that are in the file and those that are not, uneven parts (3 ranks)."""
    step, other = (quiet(plan, model=model, **options) for model, options in ((empty(), {"weights": files()[0]}), (real(), {})))
    losses, values = trained(step, batches())
    wanted, reference = trained(other, batches())
    assert losses == wanted
    same(values, reference)
    same(dict(step.model.state_dict()), dict(other.model.state_dict()))
    assert step.model.head.weight is step.model.embed.weight and not any(t.is_meta for t in [*step.model.parameters(), *step.model.buffers()])  # type: ignore[union-attr]


def test_each_rank_reads_its_own_part() -> None:
    whole = sum(t.nbytes for name, t in files()[1].items() if name != "head.weight")
    step = quiet("zero3+tp2+dp2", model=empty(), weights=files()[0])
    with read_by_rank() as counted:
        step.compile(batches()[0])
    assert len(counted) == 4 and max(counted.values()) <= 0.28 * whole, f"{dict(counted)} of {whole} bytes"


@pytest.mark.parametrize("cut", [ZERO3, LATER, LOOPS])
def test_each_stage_reads_its_own_layers(cut: Cut, tmp_path: Path) -> None:
    own = {name: t for name, t in files()[1].items() if name != "head.weight"}
    with read_by_rank() as counted:
        step = staged(cut, model=empty(), weights=files()[0])
    assert stored_by(step, cut)
    for pipeline_rank in range(2):
        here = sum(t.nbytes for name, t in own.items() if cut.stage(name) % 2 == pipeline_rank)
        read = [n for rank, n in counted.items() if step.mesh.coordinate(rank)["pp"] == pipeline_rank]
        assert len(read) == 2 and max(read) <= (0.53 if cut is not LOOPS else 1.0) * here, f"{read} of {here} bytes on pipeline rank {pipeline_rank}"
    same(step.state_dict(), files()[1])
    step.save_pretrained(tmp_path / "out", max_shard_size=3000)
    same({n: t for path in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(path).items()}, own)


def test_a_narrower_file_and_a_wider_model(tmp_path: Path) -> None:
    values = filed(tmp_path / "w", torch.bfloat16)
    step = quiet("zero3+dp2", model=empty(), weights=tmp_path / "w" / "model.safetensors", dtype=torch.float32)
    step.compile(batches()[0])
    same(step.state_dict(), {name: t.float() if t.is_floating_point() else t for name, t in values.items()})


def test_what_has_values_keeps_them_where_the_files_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = filed(tmp_path / "w")
    save_file({**{n: t for n, t in values.items() if n not in ("head.weight", "up.weight")}, "pooler.weight": torch.zeros(2)}, tmp_path / "w" / "model.safetensors")
    model = real()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    step = quiet("zero3+dp2", model=model, weights=tmp_path / "w")
    step.compile(batches()[0])
    same(step.state_dict(), {**values, "up.weight": torch.full_like(values["up.weight"], 0.5)})
    same(dict(step.model.state_dict()), dict(step.state_dict()))
    said = capsys.readouterr().err
    assert "1 tensors of the model are not there and keep their values, such as up.weight" in said
    assert "1 tensors there are not in the model, such as pooler.weight" in said


def test_a_model_without_an_optimizer() -> None:
    step = deepseed.compile(empty().double().eval(), "tp2", loss_fn=lambda m, b: m(b).sum(), backend="simulate", weights=files()[0])
    ids = batches()[0]["ids"]
    assert isinstance(step, deepseed.api.Module)
    torch.testing.assert_close(step(ids), real().eval()(ids), rtol=1e-12, atol=1e-12)


def test_meta_keeps_buffers_and_ties() -> None:
    model = empty()
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert model.head.weight is model.embed.weight and isinstance(model.head.weight, nn.Parameter)  # type: ignore[union-attr]
    with deepseed.meta():
        shared = nn.Parameter(torch.ones(3), requires_grad=False)
        a, b = nn.Linear(3, 1), nn.Module()
        a.weight, b.weight = shared, shared  # type: ignore[assignment]
        b.register_parameter("none", None)
    assert a.weight is b.weight and not a.weight.requires_grad and not nn.Linear(2, 2).weight.is_meta


# what does not fit ------------------------------------------------------------------------------------------------------


def refused(says: str, path: Path, model: nn.Module | None = None) -> None:
    with pytest.raises(CheckpointError, match=says):
        quiet("zero3+dp2", model=empty() if model is None else model, weights=path)


def changed(folder: Path, **changes: Any) -> Path:
    """The files with some tensors changed (None: without it)."""
    folder.mkdir(exist_ok=True)
    mine = {n: changes.get(n.replace(".", "_"), t) for n, t in files()[1].items() if n != "head.weight"}
    more = {n.replace("__", "."): t for n, t in changes.items() if n.replace("_", ".") not in mine}
    save_file({n: t for n, t in {**mine, **more}.items() if t is not None}, folder / "model.safetensors")
    return folder


def test_names_shapes_and_kinds_that_do_not_fit(tmp_path: Path) -> None:
    w = tmp_path / "w"
    refused(r"w does not fit Tagger: 1 tensors have no values, 0 another shape or dtype, 1 in the files are not in the model\n  no values: up.weight; "
            r"the files have up.weigth\n  not in the model: up.weigth\n  fix: build the model with the configuration", changed(w, up_weight=None, up__weigth=torch.zeros(48, 16)))  # fmt: skip
    refused(r"up.weight: float64\[4, 4\] in the files, float64\[48, 16\] in the model", changed(w, up_weight=torch.zeros(4, 4).double()))
    refused(r"version: float64\[\] in the files, int64\[\] in the model", changed(w, version=torch.tensor(1.0).double()))
    refused(r"7 tensors have no values", changed(w, **{n.replace(".", "_"): None for n in files()[1]}, other=torch.zeros(1)), empty())
    with torch.device("meta"):
        lost = Tagger()
    refused(r"no values: scale, a buffer that no file holds: the model's constructor computes it\n  fix: build it in `with deepseed.meta\(\):`", files()[0], lost)
    model = real()
    with pytest.raises(CheckpointError, match="does not fit Tagger: 0 tensors have no values, 0 another shape or dtype, 1 in the files"):
        quiet("zero0", model=model, weights=changed(w, **{n.replace(".", "_"): None for n in files()[1]}, other=torch.zeros(1)))


def test_a_tied_weight_under_either_name_or_both(tmp_path: Path) -> None:
    values = files()[1]
    table = values["embed.weight"]
    for n, (first, second) in enumerate(((None, table), (table, table.clone()))):
        step = quiet("zero0+dp1", model=empty(), weights=changed(tmp_path / str(n), embed_weight=first, head__weight=second))
        step.compile(batches()[0])
        same(step.state_dict(), values)
    step = quiet("zero0+dp1", model=empty(), weights=changed(tmp_path / "w", head__weight=table + 1))
    with pytest.raises(CheckpointError, match=r"embed.weight and head.weight are one tensor in the model, and differ in the files"):
        step.compile(batches()[0])


def sharded(folder: Path) -> Path:
    """Two files and their index."""
    folder.mkdir()
    names = [n for n in files()[1] if n != "head.weight"]
    place = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for name in set(place.values()):
        save_file({n: files()[1][n] for n in names if place[n] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    damages: list[tuple[Callable[[Path], Any], str]] = [
        (lambda f: torn(f / "model-00001-of-00002.safetensors"), r"model-00001-of-00002.safetensors is torn: its header tells of \d+ bytes, \d+ are there"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), r"model-00002-of-00002.safetensors is missing: .*names 2 files, 1 of them"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"1234"), r"00002.safetensors is no safetensors file, or torn: 4 bytes"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"\2" + bytes(7) + b"[]"), "has a damaged header: AttributeError|TypeError"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), r"model.safetensors.index.json is damaged: JSONDecodeError"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}'), r"says that x lies in model-00001"),
        (lambda f: [p.unlink() for p in f.iterdir() if p.suffix != ".json"] and (f / "model.safetensors.index.json").rename(f / "pytorch_model.bin"),
         r"has neither model.safetensors nor model.safetensors.index.json: it holds pytorch_model.bin"),
        (lambda f: f.rename(f.with_name("elsewhere")), r"no such file or folder(.|\n)*huggingface_hub.snapshot_download"),
    ]  # fmt: skip
    for n, (damage, says) in enumerate(damages):
        folder = sharded(tmp_path / str(n))
        damage(folder)
        refused(says, folder)
    folder = sharded(tmp_path / "whole")
    late = quiet("zero3+dp2", model=empty(), weights=changed(tmp_path / "late"))
    changed(tmp_path / "late", up_weight=torch.zeros(49, 16))
    with pytest.raises(CheckpointError, match=r"late/model.safetensors is another file than compile\(weights=\) has seen"):
        late.compile(batches()[0])
    step = quiet("zero3+dp2", model=empty(), weights=folder)
    step.compile(batches()[0])
    same(step.state_dict(), files()[1])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_header_with_one_byte_changed_is_refused_or_tells_of_what_is_there(data: st.DataObject) -> None:
    path = files()[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, length - 1))
    content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        other = Path(name) / "x.safetensors"
        other.write_bytes(content)
        try:
            found = header(other)
        except CheckpointError:
            return
        assert all(t.at > 0 and t.at + t.bytes <= len(content) for t in found.values())


def test_without_files_it_says_what_to_do() -> None:
    step = quiet("zero3+dp2", model=empty())
    with pytest.raises(CompileError, match=r"parameter 'embed.weight' of Tagger is on the meta device(.|\n)*fix: compile\(\.\.\., weights=PATH\)"):
        step(batches()[0])
    with pytest.raises(CheckpointError, match=r"embed.weight is on the meta device: nothing can be written into it"):
        step.load_state_dict(files()[1])
    with pytest.raises(CheckpointError, match=r"embed.weight is on the meta device: it has no values to save"):
        step.save_pretrained("nowhere")


# and back ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero3+dp3", *wide("zero3+dp2", "tp2", "zero1+pp2+dp1")])
def test_what_is_saved_is_what_the_ranks_hold(plan: str, tmp_path: Path) -> None:
    step = quiet(plan, model=empty(), weights=files()[0])
    step(batches()[0])
    step.save_pretrained(tmp_path / "out", max_shard_size=3000)
    own = {n: t for n, t in step.state_dict().items() if n != "head.weight"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    found = {n: load_file(tmp_path / "out" / n) for n in names}
    same({n: t for each in found.values() for n, t in each.items()}, own)
    assert all(n in found[name] for n, name in index["weight_map"].items()) and set(index["weight_map"]) == set(own)
    assert index["metadata"] == {"total_parameters": sum(t.numel() for t in own.values()), "total_size": sum(t.nbytes for t in own.values())}
    assert names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)] and len(names) > 3
    assert all(len(each) == 1 or sum(t.nbytes for t in each.values()) <= 3000 for each in found.values())
    other = quiet("tp2", model=empty(), weights=tmp_path / "out")
    other.compile(batches()[0])
    same(other.state_dict(), step.state_dict())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, out = quiet("zero3+dp2", model=empty(), weights=files()[0]), tmp_path / "out"
    step(batches()[0])
    step.save_pretrained(out, max_shard_size=3000)
    (out / "tokenizer.json").write_text("mine")
    former = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    step(batches()[1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match=r"saving to .*OSError: \[Errno 28\] No space left on device"):
            step.save_pretrained(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == former and [p.name for p in tmp_path.iterdir()] == ["out"]
    step.save_pretrained(out, max_shard_size="1MB")
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "model.safetensors", "tokenizer.json"] and (out / "tokenizer.json").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"was written by step.save_pretrained: it holds weights, no state(.|\n)*fix: deepseed.compile\(..., weights="):
        step.load(out)
    with pytest.raises(CheckpointError, match=r"holds 2 files that step.save has not written"):
        step.save(out)
    step.save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"files that step.save_pretrained has not written, such as"):
        step.save_pretrained(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"max_shard_size='5 apples' is no amount of memory: 256MiB"):
        step.save_pretrained(out, max_shard_size="5 apples")


def test_a_flipped_bit_in_what_was_saved_is_found(tmp_path: Path) -> None:
    step = quiet("zero0+dp2", model=real())
    step.save_pretrained(tmp_path / "out")  # before anything is compiled
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    refused(r"model.safetensors is damaged: sha256 .* was written, .* is there\n  nothing was loaded", tmp_path / "out")
    content[-5] ^= 1
    path.write_bytes(content)
    (tmp_path / "out").rename(tmp_path / "out.old-0123abcd")  # cut off between two renames
    step = quiet("tp2", model=empty(), weights=tmp_path / "out")
    step.compile(batches()[0])
    same(step.state_dict(), files()[1])


@pytest.mark.parametrize(("first", "then"), [("zero3+dp2", "zero3+dp2"), *wide(("zero3+dp2", "tp2"), ("tp2", "zero3+pp2+dp1"))])
def test_a_model_without_values_goes_on_from_a_checkpoint(first: str, then: str, tmp_path: Path) -> None:
    step = quiet(first, model=real())
    trained(step, batches()[:2])
    step.save(tmp_path / "c", extra=3)
    want = everything(step)
    losses = [float(step(b)) for b in batches()[2:]]
    other = quiet(then, model=empty())
    assert other.load(tmp_path / "c") == 3
    with pytest.raises(CheckpointError, match=r"parameters and optimizer state of .*c are read with the first batch"):
        other.save(tmp_path / "d")
    other.compile(batches()[0])
    same(everything(other), want)
    assert [float(other(b)) for b in batches()[2:]] == pytest.approx(losses, rel=1e-12)
    only = quiet(then, model=empty(), weights=files()[0])  # what is loaded later counts
    only.load(tmp_path / "c", optimizer=False)
    only.compile(batches()[0])
    same(dict(only.state_dict()), {n: want[n] for n in only.state_dict()})
    assert only.steps == 0


# transformers -----------------------------------------------------------------------------------------------------------


def bare(model: Any) -> Any:
    with deepseed.meta():
        return type(model)(model.config)


def there_and_back(target: str, plan: str, tmp_path: Path) -> None:
    """HF's own files into a model without values, a step, and back into HF's."""
    found = load(target)
    found.model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    model = bare(found.model)
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), backend="simulate", weights=tmp_path / "hf")
    step.compile(found.batch)
    same(step.state_dict(), dict(found.model.state_dict()))
    assert not step.weights.unused and not step.weights.kept  # type: ignore[union-attr]
    step(found.batch)
    step.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    again, info = type(found.model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    same(dict(again.state_dict()), step.state_dict())
    theirs, mine = ({n for p in (tmp_path / f).glob("*.safetensors") for n in header(p)} for f in ("hf", "out"))
    assert mine == theirs
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(found.model).__name__] and config["dtype"] == "float32"


@pytest.mark.parametrize(("target", "plan"), [("hf:MixtralForCausalLM(num_hidden_layers=1, tie_word_embeddings=True)", "ep2"), *wide(("hf:LlamaForCausalLM", "zero3+dp2"))])
def test_from_transformers_and_back(target: str, plan: str, tmp_path: Path) -> None:
    there_and_back(target, plan, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("plan", ["zero3+dp2", "tp2", "pp2", "zero3+tp2+dp2"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BertForMaskedLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_more_of_transformers_and_back(name: str, plan: str, tmp_path: Path) -> None:
    there_and_back(f"hf:{name}", plan, tmp_path)


def test_files_of_the_base_model(tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no prefix; and a base model takes the files of one with a head."""
    found = load("hf:GPT2LMHeadModel")
    found.model.transformer.save_pretrained(tmp_path / "base")  # type: ignore[union-attr, operator]
    found.model.save_pretrained(tmp_path / "head")  # type: ignore[operator]
    from deepseed.weights import fitted

    for source, model in ((tmp_path / "base", bare(found.model)), (tmp_path / "head", bare(found.model.transformer))):
        weights = fitted(source, header(source / "model.safetensors"), model)
        assert {n for _, n in weights.found} == {n for n, _ in model.named_parameters()} and not weights.unused


def test_pieces_that_do_not_fit_together() -> None:
    from deepseed.hf_names import Made

    def at(*shape: int) -> Stored:
        return Stored(Path("x"), torch.float32, shape, 0)

    files = {"a": at(2, 3), "b": at(2, 3), "c": at(2, 3), "d": at(2, 3), "short": at(1, 3)}
    made = Source.made("w", Made((("a", "b"), ("c", "d")), 0, 1), files)
    assert made.shape == (2, 4, 3) and [p.at for p in made.pieces] == [(0, 0, 0), (1, 0, 0), (0, 2, 0), (1, 2, 0)]
    assert [p.sizes for p in made.pieces] == [(1, 2, 3)] * 4 and all(isinstance(p, Piece) for p in made.pieces)
    assert Source.made("w", Made((("a",), ("short",)), None, 0), files).shape == (3, 3)
    for groups in ((("a", "b"), ("c",)), (("a", "short"), ("c", "d"))):
        with pytest.raises(CheckpointError, match=r"w is made of \d tensors that do not fit together, such as a \[2, 3\]"):
            Source.made("w", Made(groups, 0, 1), files)


# real ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero3", *wide("tp2", "pp2+mb2")])
def test_real_ranks_read_and_write_their_parts(plan: str, tmp_path: Path) -> None:
    """Two ranks, no more than the half of the model on each at any time; and one simulated process takes what they saved."""
    values = filed(tmp_path / "w", width=64)
    out = str(tmp_path / "out")
    got = ranks(2, ranks_do.begins, plan, str(tmp_path / "w"), out, 64)
    for each in got:
        if "pp" not in plan:  # its stages are what they are
            assert each["read"] <= 0.52 * each["whole"], f"{each['read']} of {each['whole']} bytes"
            for held in ("held", "held by resuming"):
                assert 0.49 * each["whole"] <= each[held] <= 0.55 * each["whole"] + 20_000, f"{held}: {each[held]} of {each['whole']} bytes"
        assert each["held by saving"] <= 0.3 * each["whole"], f"{each['held by saving']} of {each['whole']} bytes: more than a part of one tensor"
        same(torch.load(io.BytesIO(each["begun"])), values)
        assert each["losses"] == got[0]["losses"] and each["on"][0] == each["on"][1]
        same(torch.load(io.BytesIO(each["resumed"])), torch.load(io.BytesIO(each["values"])))
    other = quiet("tp2", model=empty(64), weights=out)
    other.compile(batches()[0])
    same(other.state_dict(), {n: t for n, t in torch.load(io.BytesIO(got[0]["values"])).items() if n in other.state_dict()})
    assert 0 < sum(each["sent"] for each in got) <= got[0]["whole"], "each byte travels once at most"
    assert sum(each["read"] for each in got) >= got[0]["whole"] and len(list(Path(out).glob("*.safetensors"))) >= 3


def test_a_rank_in_trouble_is_heard_by_all(tmp_path: Path) -> None:
    for name, cut in (("w", 0), ("w-torn", 9)):
        filed(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    got = ranks(2, ranks_do.troubles, str(tmp_path / "w"))
    says = {
        "torn": r"CheckpointError: .*w-torn/model.safetensors is torn",
        "missing": r"CheckpointError: .*w-none: no such file or folder",
        "other folders": r"AgreementError: ranks disagree: weights= = ",
        "unreadable": r"CheckpointError: rank 1: reading .*Input/output error",
        "disk full": r"CheckpointError: rank 1: saving to .*No space left on device",
        "other shards": r"AgreementError: ranks disagree: max_shard_size = 1000",
    }  # fmt: skip
    for rank, each in enumerate(got):
        for name, pattern in says.items():
            assert re.search(pattern, each["messages"][name], re.DOTALL), f"rank {rank}, {name}: {each['messages'][name]}"
            assert each["seconds"][name] < 20, f"{name}: {each['seconds'][name]} s"
        assert each["goes on"] == got[0]["goes on"] and each["and on"] == got[0]["and on"]
        assert each["still"] == ["manifest.json", "model.safetensors"]
