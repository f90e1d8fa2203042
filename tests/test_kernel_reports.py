"""`explain --kernels --gpu` and `--measure`: what is said of a kernel is what the assembler counted, and what a clock saw of a kernel that ran."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from deepseed import assembled, timed
from deepseed import kernels as back_ends
from deepseed.cli import app
from deepseed.codegen import autotune
from deepseed.codegen.ahead_of_time import Compiled
from deepseed.explain_kernels import KernelReport, explain_kernels
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.machines import path_of, save
from deepseed.speed import Machine

# Two products that differ in how their weight lies, and so have one source; a sum over rows; and a group that Triton does not write.
STEP = """program step mesh() facts(canonical, placed, explicit, lowered, captured)
%x : f32[8, 64] batch "x"
%w : f32[64, 64] param "w"
%t = permute(%w, dims=[1, 0]) : f32[64, 64] {phase="forward"}
%s = aten.pow.Tensor_Scalar(%x, 2) : f32[8, 64] {phase="forward", kernel="n"}
%n = sum(%s, dims=[0], keepdim=true) : f32[1, 64] {phase="forward", kernel="n"}
%m = aten.mm(%x, %w) : f32[8, 64] {phase="forward", kernel="y"}
%y = aten.relu(%m) : f32[8, 64] {phase="forward", kernel="y"}
%m2 = aten.mm(%x, %t) : f32[8, 64] {phase="forward", kernel="z"}
%z = aten.relu(%m2) : f32[8, 64] {phase="forward", kernel="z"}
%c = aten.cumsum(%y, 1) : f32[8, 64] {phase="forward", kernel="c"}
%e = aten.exp(%c) : f32[8, 64] {phase="forward", kernel="c"}
return %n output "n"
return %z output "z"
return %e output "e"
"""
# One thread of a warp holds 256 numbers, each read before the first is written: more than there are registers.
SPILLS = '''
import triton
import triton.language as tl

@triton.jit
def kernel_0(x, o):
    at = tl.arange(0, 8192)
    a = tl.load(x + at)
    tl.debug_barrier()
    b = tl.load(x + 8192 + at)
    tl.debug_barrier()
    tl.store(o + 8192 + at, a * b)
    tl.debug_barrier()
    tl.store(o + at, a + b)

KERNELS = {"kernel_0": ({"x": "*fp32", "o": "*fp32"}, 1)}
'''


def report(text: str = STEP) -> KernelReport:
    p = parse(text)
    return explain_kernels(p, p, back_ends.traffic("triton"))


def run(code: str, *words: str, folder: Path) -> str:
    """A process of its own, where kernels are not interpreted; what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"DEEPSEED_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton_cache"), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# --gpu ----------------------------------------------------------------------------------------------------------------

ASSEMBLE = """
import json
from pathlib import Path
import deepseed.assembled as module
from deepseed.codegen.triton import source
from test_kernel_reports import SPILLS, report
given, asked, compiled = report(), [], module.compiled
module.compiled = lambda text, target, folder: asked.append([text, target]) or compiled(text, target, folder)
found = module.assembled(given, ["sm_90", "gfx942", "sm_90"])
sources = {name: source(k.fragment) for name, k in given.made.items() if "cumsum" not in name}
of_source = [[text, t, [[c.kernel, c.registers, c.spilled, c.shared] for c in compiled(text, t, Path("alone"))]] for text in set(sources.values()) for t in ("sm_90", "gfx942")]
said = {"report": found.to_json(), "text": str(found), "asked": list(asked), "sources": sources, "of_source": of_source}
module._source = lambda k: SPILLS if "pow" in k.name else ""
print(json.dumps({**said, "spilling": module.assembled(given, ["sm_90"]).to_json()}))
"""


@needs.triton
def test_numbers_of_a_kernel_are_the_assemblers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers, spills and shared memory as `compiled` says them of the same source, and as ptxas says them of the assembly that is kept; spills of a kernel that must spill."""
    monkeypatch.chdir(tmp_path)
    said = json.loads(run(ASSEMBLE, folder=tmp_path))
    of_source = {(text, target): each for text, target, each in said["of_source"]}
    assert sorted(map(tuple, said["asked"])) == sorted(of_source), "each distinct source once a target"
    kernels = {k["name"]: k["compiled"] for k in said["report"]["kernels"]}
    assert len(said["sources"]) == 3 and len(of_source) == 4 and {*kernels} > {*said["sources"]}
    for name, found in kernels.items():
        if "cumsum" in name:
            assert found == []
            continue
        want = [[t, *each] for t in ("sm_90", "gfx942") for each in of_source[said["sources"][name], t]]
        assert [[c["target"], c["kernel"], c["registers"], c["spilled"], c["shared"]] for c in found] == want
        assert all(Path(c["assembly"]).parent == tmp_path / "triton" and c["registers"] > 0 for c in found)
        for c in found:
            assert c["registers"] == registers(Path(c["assembly"]))
        line = next(line for line in said["text"].split("compiled ahead of time")[1].splitlines() if line.split()[:2] == [name, "sm_90"])
        assert line.split()[2:] == ["/".join(str(c[key]) for c in found if c["target"] == "sm_90") for key in ("registers", "spilled", "shared")]
    assert f"assembly lies in {tmp_path / 'triton'}" in said["text"] and "run as Python, which Triton does not compile: kernel_cumsum_exp" in said["text"]
    (spilling,) = (c for k in said["spilling"]["kernels"] for c in k["compiled"])
    assert spilling["spilled"] > 100 and f"{spilling['spilled']} bytes spill stores" in ptxas(Path(spilling["assembly"]))


def registers(assembly: Path) -> int:
    if assembly.suffix == ".ptx":
        found = re.search(r"Used (\d+) registers", ptxas(assembly))
    else:
        found = re.search(r"\.vgpr_count:\s*(\d+)", assembly.read_text())
    assert found is not None
    return int(found.group(1))


def ptxas(assembly: Path) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return subprocess.run([get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(assembly), "-o", os.devnull], capture_output=True, text=True, check=True).stderr


COMMAND = "import sys; sys.argv[0] = 'deepseed'; from deepseed.cli import main; main()"
TINY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return model, torch.randn(8, 8), dict(loss_fn=lambda m, x: m(x).square().mean(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), clip_grad_norm=0.0)
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(TINY)
    return f"{tmp_path}/tiny.py:build"


@needs.triton
def test_the_command_compiles_each_kernel(tiny: str, tmp_path: Path) -> None:
    found = json.loads(run(COMMAND, "explain", tiny, "--kernels", "--codegen", "triton", "--gpu", "sm_90", "--json", folder=tmp_path))
    assert found["machine"] is None and found["kernels"] and all(k["seconds"] is None and k["share"] is None for k in found["kernels"])
    for k in found["kernels"]:
        assert k["compiled"] and {c["target"] for c in k["compiled"]} == {"sm_90"}
        assert all(c["registers"] == registers(Path(c["assembly"])) and c["spilled"] == 0 for c in k["compiled"])


def test_a_kernel_that_triton_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str, target: str, folder: Path) -> list[Compiled]:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(assembled, "compiled", refuse)
    with pytest.raises(assembled.CompileError, match=r"kernel_\w+ for sm_80: Triton refuses it: RuntimeError: PassManager::run failed\n  fix: "):
        assembled.assembled(report(), ["sm_80"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kernels", "--gpu", "sm_90"], "--gpu sm_90 needs --codegen triton: what is compiled ahead of time is Triton source\n  fix: add --codegen triton, or leave --gpu out"),
        (["--kernels", "--codegen", "cpp", "--gpu", "sm_90"], "--gpu sm_90 with --codegen cpp: what is compiled ahead of time is Triton source\n  fix: --codegen triton"),
        (["--kernels", "--codegen", "auto", "--gpu", "sm_90"], "--gpu sm_90 with --codegen auto: what"),
        (["--kernels", "--gpu", "sm_75"], "sm_75 is no target\n  fix: one of sm_80, sm_90, gfx942"),
        (["--kernels", "--codegen", "cpp", "--gpu", "sm_75"], "sm_75 is no target\n  fix: one of sm_80, sm_90, gfx942"),
        (["--kernels", "--codegen", "triton", "--gpu", "sm_90", "--gpu", "sm_1"], "sm_1 is no target\n  fix: one of sm_80, sm_90, gfx942"),
        (["--kernels", "--codegen", "triton", "--measure"], "on a CUDA device, and there is none here\n  fix: --codegen cpp"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_made(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in refused("explain", "/nowhere/file.py:build", *words)


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 2 and "Traceback" not in done.output and done.stdout == "", done.output
    return done.stderr


def test_without_triton_or_a_compiler_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("explain", "/nowhere/file.py:build", "--kernels", "--codegen")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted, as TRITON_INTERPRET=1 says" in refused(*ask, "triton", "--gpu", "sm_90")
    monkeypatch.delenv("TRITON_INTERPRET")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest))
    assert "triton is not installed\n  fix: pip install" in refused(*ask, "triton", "--gpu", "sm_90")
    monkeypatch.setattr(timed, "compiler", lambda: "")
    assert "--measure with --codegen cpp: no C++ compiler" in refused(*ask, "cpp", "--measure")


@needs.triton
@pytest.mark.parametrize("below", ["", "more/folders"])
def test_a_cache_folder_that_cannot_be_is_refused_before_a_model_is_made(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / below
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(folder))
    said = refused("explain", "/nowhere/file.py:build", "--kernels", "--codegen", "triton", "--gpu", "sm_90")
    assert said == f"deepseed: the cache folder {folder / 'triton'} cannot be written: Not a directory\n  fix: set DEEPSEED_CACHE_DIR to a folder that can\n"


@needs.triton
def test_a_folder_that_takes_no_file_is_no_fault_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(assembled.CompileError, match=rf"the cache folder {tmp_path}/triton cannot be written: No space left on device\n  fix: set DEEPSEED_CACHE_DIR to a folder that can$"):
        assembled.assembled(report(), ["sm_80"])


def test_the_folder_of_tritons_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str, target: str, folder: Path) -> list[Compiled]:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/nope")

    monkeypatch.setattr(assembled, "compiled", refuse)
    with pytest.raises(assembled.CompileError, match=r"for sm_80: Triton cannot keep its files: .*No such file or directory: '/proc/nope'\n  fix: set TRITON_CACHE_DIR to a folder"):
        assembled.assembled(report(), ["sm_80"])


# --measure ------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """A back end whose kernels take the seconds that the test says, by a clock of its own; it keeps what they were called on."""

    def __init__(self, seconds: Callable[[str], float]) -> None:
        self.now, self.seconds, self.given = 0.0, seconds, dict[str, list[Sequence[Tensor]]]()

    def __call__(self) -> float:
        return self.now

    def back_end(self, wanted: Sequence[Any], folder: Path, tell: Callable[[str], object]) -> list[Callable[..., Sequence[Tensor]]]:
        return [self._call(k.name) for k in wanted]

    def _call(self, name: str) -> Callable[..., Sequence[Tensor]]:
        def call(*xs: Tensor) -> Sequence[Tensor]:
            self.now += self.seconds(name)
            self.given.setdefault(name, []).append(xs)
            return xs

        return call


def test_the_share_is_the_least_over_the_seconds_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Stopwatch(lambda name: 0.008 if "mm" in name else 0.002)
    monkeypatch.setitem(back_ends.BACK_ENDS, "clocked", clock.back_end)
    machine = Machine(flops=1.0, memory=1e6, rates=(("bf16", 1.0), ("f32", 2 * 8 * 64 * 64 / 0.006)))  # a product takes 6 ms, 18 KiB and 2 written take 20.48
    given = report()
    found = timed.timed(given, "clocked", machine, torch.device("cpu"), pytest.fail, clock)
    assert {k.name for k in found.kernels} == set(clock.given) == set(given.made)
    for k in found.kernels:
        assert k.seconds == pytest.approx(0.008 if "mm" in k.name else 0.002, rel=1e-9)
        assert k.share == pytest.approx(k.bytes_minimum / 1e6 / k.seconds, rel=1e-9)  # 2.56 of products: they are above 1, as operands in a cache are
        assert len(clock.given[k.name]) > 3
        for xs in clock.given[k.name]:
            assert [(x.shape, x.stride()) for x in xs] == [(i.type.shape, s) for i, s in zip(given.made[k.name].fragment.inputs, given.made[k.name].strides, strict=True)]
    fast = timed.timed(given, "clocked", replace(machine, memory=1e12), torch.device("cpu"), pytest.fail, clock)
    assert [k.share for k in fast.kernels if "mm" in k.name] == [pytest.approx(0.006 / 0.008, rel=1e-9)] * 2
    lines = [line for line in str(fast).splitlines() if "kernel_mm" in line]
    assert len(lines) == 2 and all(line.endswith("8000.0 us       75.0 %") for line in lines)
    assert "a call" not in str(given) and json.loads(json.dumps(given.to_json()))["kernels"][0]["seconds"] is None
    assert json.loads(json.dumps(fast.to_json()))["machine"]["memory"] == 1e12


ATTENTION = """program kernel mesh() facts()
%q : f32[1, 2, {s}, 16] batch "q"
%k : f32[1, 2, {t}, 16] batch "k"
%v : f32[1, 2, {t}, 16] batch "v"
%o, %l = sdpa(%q, %k, %v, causal={causal}, scale=0.25) : f32[1, 2, {s}, 16], f32[1, 2, {s}] {{phase="forward", kernel="a"}}
return %o output "o"
"""


def attention(s: int, t: int, causal: bool) -> Program:
    return parse(ATTENTION.format(s=s, t=t, causal=str(causal).lower()))


@pytest.mark.parametrize(("s", "t"), [(8, 8), (8, 5), (5, 8)])
def test_causal_attention_needs_what_a_query_sees(s: int, t: int) -> None:
    machine = Machine(flops=1e6, memory=1e30)
    pairs = sum(min(i + 1, t) for i in range(s))
    assert timed.least(attention(s, t, False), 1, machine) == pytest.approx(2 * 2 * s * t * 32 / 1e6, rel=1e-12)
    assert timed.least(attention(s, t, True), 1, machine) == pytest.approx(2 * 2 * pairs * 32 / 1e6, rel=1e-12)


def test_causal_attentions_backward_needs_what_a_query_sees() -> None:
    shapes = [f"f32[1, 2, {n}, 16]" for n in (8, 8, 5, 5, 8)]
    named = "\n".join(f'%{name} : {shape} batch "{name}"' for name, shape in zip("gqkvo", shapes, strict=True))
    both = ", ".join([shapes[1], shapes[2], shapes[3]])
    p = parse(f'program kernel mesh() facts()\n{named}\n%l : f32[1, 2, 8] batch "l"\n%a, %b, %c = sdpa_backward(%g, %q, %k, %v, %o, %l, causal=true, scale=0.25) : {both} {{}}\n' + "".join(f'return %{n} output "{n}"\n' for n in "abc"))
    pairs = sum(min(i + 1, 5) for i in range(8))
    assert timed.least(p, 1, Machine(flops=1e6, memory=1e30)) == pytest.approx(2 * 10 * 16 * pairs * 2 / 2 / 1e6, rel=1e-12)


@pytest.mark.parametrize(("s", "kernels"), [(32, 1), (33, 2)])
def test_flops_of_attentions_backward_are_those_of_one_pass(s: int, kernels: int) -> None:
    """docs/design.md: 10 s²d a head, of products alone. One kernel, of as many keys as a program holds, reads its inputs once."""
    d = 16
    shapes = [f'%{name} : f32[1, 2, {s}, {d}] batch "{name}"' for name in ("g", "q", "k", "v", "o")]
    both = ", ".join([f"f32[1, 2, {s}, {d}]"] * 3)
    text = "\n".join(["program step mesh() facts(canonical, placed, explicit, lowered, captured)", *shapes, f'%l : f32[1, 2, {s}] batch "l"',
        f'%a, %b, %c = sdpa_backward(%g, %q, %k, %v, %o, %l, causal=false, scale=0.25) : {both} {{phase="backward", kernel="a"}}', *[f'return %{n} output "{n}"' for n in "abc"]])  # fmt: skip
    (found,) = report(text + "\n").kernels
    assert found.flops == 2 * 10 * s * s * d and found.launches == kernels
    assert (found.bytes_read + found.bytes_written == found.bytes_minimum) is (kernels == 1)


def test_what_has_no_room_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Stopwatch(lambda name: 0.01), list[str]()
    monkeypatch.setitem(back_ends.BACK_ENDS, "clocked", clock.back_end)
    monkeypatch.setattr(timed, "available", lambda: 8 << 10)
    found = timed.timed(report(), "clocked", Machine(), torch.device("cpu"), said.append, clock)
    left = {k.name for k in found.kernels if k.seconds is None}
    assert left == {k.name for k in found.kernels if "mm" in k.name} and not left & set(clock.given) and all(k.share is None for k in found.kernels if k.name in left)
    assert len(said) == 2 and all("its operands and results are 20.0 KiB, and 8.0 KiB are free\n  fix: " in line for line in said) and "not run" in str(found)


def test_the_machine_is_the_calibrated_one_else_measured_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    said, now = list[str](), Machine(memory=7.0)
    monkeypatch.setattr(timed, "alone", lambda device: (now, 0.5))
    assert timed.machine_for(torch.device("cpu"), said.append) is now
    assert "with a core for 50% of the time\n  fix: deepseed calibrate --backend gloo, once" in said[0] and not (tmp_path / "machine").exists()
    save(path_of(1, "cpu"), Machine(memory=9.0), {})
    assert timed.machine_for(torch.device("cpu"), pytest.fail) == Machine(memory=9.0)


@needs.compiler
def test_the_command_runs_the_kernels(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    calls = dict[str, int]()

    def counted(wanted: Sequence[Any], folder: Path, tell: Callable[[str], object]) -> list[Callable[..., Sequence[Tensor]]]:
        def of(name: str, f: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
            def call(*xs: Tensor) -> Sequence[Tensor]:
                calls[name] = calls.get(name, 0) + 1
                return f(*xs)

            return call

        return [of(k.name, f) for k, f in zip(wanted, cpp(wanted, folder, tell), strict=True)]

    cpp = back_ends.BACK_ENDS["cpp"]
    monkeypatch.setitem(back_ends.BACK_ENDS, "cpp", counted)
    ask = ["explain", tiny, "--kernels", "--measure", "--machine", "flops=1e9,memory=2e9"]
    done = CliRunner().invoke(app, [*ask, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (update,) = (k["name"] for k in found["kernels"] if k["name"].startswith("update_sgd_"))
    assert found["machine"]["memory"] == 2e9 and {k["name"] for k in found["kernels"]} - {update} == set(calls) and min(calls.values()) > 3
    for k in found["kernels"]:
        assert 1e-7 < k["seconds"] < 1 and k["compiled"] == [], k
        assert "aten.mm" in k["ops"] or k["share"] == pytest.approx(k["bytes_minimum"] / 2e9 / k["seconds"], rel=1e-9)


def test_operands_may_be_one_number_many_times() -> None:
    p = parse('program kernel mesh() facts()\n%i0 : f32[4, 3] batch "i0"\n%i1 : i64[4, 3] batch "i1"\n%v0 = aten.exp(%i0) : f32[4, 3] {}\nreturn %v0 output "v0"\n')
    x, n = autotune.operands(autotune.Kernel("k", p, ((0, 1), (0, 0)), ""), torch.device("cpu"))
    assert x.stride() == (0, 1) and 0.5 <= float(x.min()) <= float(x.max()) <= 1.5 and n.stride() == (0, 0) and not n.any()
