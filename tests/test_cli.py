"""The commands, as a user types them: output, files, exit codes, and mistakes answered without a traceback."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deepseed.cli import app
from deepseed.ir.text import parse
from deepseed.pipeline import BY_NAME

LLAMA = "hf:LlamaForCausalLM"
MLP = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    return model, torch.randn(8, 8), dict(loss_fn=lambda m, x: m(x).square().mean(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

def no_loss():
    return nn.Linear(8, 8), torch.randn(8, 8)
"""


def deepseed(*words: str, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, list(words))
    if ok:
        assert result.exit_code == 0, result.output
    return result


def refusal(*words: str) -> str:
    """What is said on stderr; nothing else, and exit code 2."""
    result = deepseed(*words, ok=False)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.stderr


@pytest.fixture
def mlp(tmp_path: Path) -> str:
    (tmp_path / "mlp.py").write_text(MLP)
    return f"{tmp_path}/mlp.py:build"


def test_help_names_every_command() -> None:
    out = deepseed("--help").output
    assert all(f" {word} " in out for word in ("dump", "opt", "diff", "explain", "plan", "verify", "run"))


def test_python_m_deepseed() -> None:
    done = subprocess.run([sys.executable, "-m", "deepseed", "plan", "tp2"], capture_output=True, text=True, check=True)
    assert "mesh(tp=2)" in done.stdout


# plan ----------------------------------------------------------------------------------------------------------------


def test_plan_says_mesh_and_meaning() -> None:
    out = deepseed("plan", "zero3+tp2", "--world-size", "8").output
    assert "mesh(dp=4, tp=2)" in out and "0.1250" in out and "3*Psi*(N - 1)/(N*t)" in out
    assert "next: deepseed explain TARGET --plan zero3+tp2 --world-size 8" in out


def test_plan_says_stages_and_microbatches() -> None:
    out = deepseed("plan", "zero2+dp2+pp2+mb4+interleaved2").output
    assert "4 stages, 2 on each of 2 ranks" in out and "4 microbatches" in out and "idle 11.1%" in out  # (2 - 1) / (2 * 4 + 2 - 1)
    assert "1.2500" in out and "Psi*(N - 1)*(m + 1)/(N*t)" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "zer3"], "did you mean zero3"),
        (["plan", "zero3+tp4", "--world-size", "6"], "6 = 4 * 1 + 2"),
        (["plan", "auto"], "not yet supported"),
        (["explain", "hf:LamaForCausalLM"], "did you mean LlamaForCausalLM"),
        (["explain", LLAMA, "--optimizer", "adamz"], "did you mean adam"),
        (["explain", LLAMA, "--plan", "sp17"], "sequence has 16 tokens, fewer than the 17 ranks"),
        (["explain", "nothing"], "path/to/file.py:name"),
        (["dump", LLAMA, "--after", "solve_placement"], "did you mean solve_placements"),
        (["opt", "/nowhere/a.ir"], "/nowhere/a.ir"),
        (["verify", LLAMA, "--backend", "mpi"], "one of simulate, gloo, nccl"),
        (["explain", f"{LLAMA}(hidden_size=33)", "--kernels"], "hf:LlamaForCausalLM(hidden_size=33) cannot be built: StrictDataclassClassValidationError: "),
        (["run", "/nowhere/train.py"], "no file /nowhere/train.py"),
    ],
)
def test_mistakes(words: list[str], says: str) -> None:
    pytest.importorskip("transformers")
    assert says in refusal(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["explain", "nothere.py:make"], "no file nothere.py in .* \\(target 'nothere.py:make'\\)\n  fix: give a path that is there"),
        (["explain", "/nothere/model.py:make"], "no file /nothere/model.py \\(target"),
        (["explain", "nothere.txt:make"], "no file nothere.txt .*\n  fix: write path/to/file.py:name, or hf:ClassName"),
        (["explain", "nothing"], "'nothing' is no target\n  fix: write path/to/file.py:name"),
        (["diff", "a.ir", "b.ir"], "a.ir: No such file or directory\n  fix: give a path that is there"),
        (["explain", "words.txt:x"], "words.txt is no Python file\n  fix: write path/to/file.py:name"),
        (["explain", "broken.py:x"], "importing broken.py:1 raised ZeroDivisionError: division by zero\n  fix: make `python broken.py` run by itself"),
        (["explain", "mlp.py:xyzzy"], "mlp.py has no 'xyzzy'\n  fix: name a function of mlp.py that returns model, batch"),
        (["explain", "mlp.py:buidl"], "mlp.py has no 'buidl'\n  fix: did you mean mlp.py:build"),
        (["explain", "mlp.py:build", "--optimizer", "xyzzy"], "no optimizer 'xyzzy'\n  fix: one of adadelta, .*adamw, "),
        (["explain", "mlp.py:build", "--why", "(((("], "no value %\\(\\(\\(\\(\n  fix: name a parameter, or a value of `deepseed dump"),
        (["dump", "mlp.py:build", "--after", "xyzzy"], "no pass is called 'xyzzy'\n  fix: one of capture, canonicalize"),
        (["opt", "p.ir", "--passes", "xyzzy"], "no pass is called 'xyzzy'\n  fix: one of canonicalize"),
    ],
)
def test_what_is_not_there_has_a_fix(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlp.py").write_text(MLP)
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "p.ir").write_text("program p mesh() facts(captured)\n")
    assert re.search(says, refusal(*words))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kernels", "--html", "x.html"], "--kernels does not go with --html: each asks for an answer of its own\n  fix: leave --kernels or --html out"),
        (["--kernels", "--cuda-graphs"], "--kernels does not go with --cuda-graphs"),
        (["--kernels", "--why", "x"], "--why does not go with --kernels"),
        (["--why", "x", "--json"], "--why does not go with --json"),
        (["--html", "x.html", "--json"], "--html does not go with --json"),
        (["--codegen", "triton"], "--codegen does not go without --kernels: it is the back end whose kernels are counted\n  fix: add --kernels, or leave --codegen out"),
        (["--gpu", "sm_90"], "--gpu does not go without --kernels"),
        (["--measure"], "--measure does not go without --kernels"),
    ],
)
def test_options_of_explain_that_would_not_be_heard_are_refused(options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refusal("explain", "/nowhere/file.py:build", *options) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("word", ["rows", "triton_rows", "cobol", ""])
@pytest.mark.parametrize("command", [["explain", "--kernels"], ["verify"], ["profile"]])
def test_a_back_end_is_one_of_the_public_words(command: list[str], word: str) -> None:
    assert f"codegen={word!r}: no such back end\n  fix: one of python, cpp, inductor, triton, auto\n" in refusal(command[0], "/nowhere/file.py:build", *command[1:], "--codegen", word)


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_DEBUG", "1")
    assert type(deepseed("plan", "zer3", ok=False).exception).__name__ == "PlanError"


def test_a_model_without_a_loss(mlp: str) -> None:
    assert "loss" in refusal("explain", mlp.replace(":build", ":no_loss"))


# programs ------------------------------------------------------------------------------------------------------------


def test_dump_opt_and_diff_fit_together(mlp: str, tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    out = deepseed("dump", mlp, "--plan", "zero1", "--world-size", "2", "-o", str(folder)).output
    files = sorted(f.name for f in folder.iterdir())
    assert files == [f"{n:02d}-{name}.ir" for n, name in enumerate(["capture", *BY_NAME])]
    assert all(name in out for name in BY_NAME) and "/rank" in out and out.splitlines()[-1].startswith("next: deepseed diff ")
    for f in folder.iterdir():
        assert deepseed("opt", str(f)).output == f.read_text()  # an empty list of passes parses and prints
    again = deepseed("opt", str(folder / "01-canonicalize.ir"), "--passes", "solve_placements,insert_reshards,lower_reshards", "--plan", "zero1+dp2").output
    assert again == (folder / "04-lower_reshards.ir").read_text()
    changed = deepseed("diff", str(folder / "03-insert_reshards.ir"), str(folder / "04-lower_reshards.ir")).output
    assert "all_gather over dp" in changed and "reshard" in changed
    assert "no pass is called" in refusal("opt", str(folder / "00-capture.ir"), "--passes", "solve")
    assert "did you mean" in refusal("opt", str(folder / "01-canonicalize.ir"), "--passes", "solve_placements", "--plan", "dpp2")


def test_stages_are_dumped_and_each_pass_can_be_run_again(mlp: str, tmp_path: Path) -> None:
    plan = ("--plan", "dp2+pp2+mb2", "--world-size", "4")
    out = deepseed("dump", mlp, *plan, "-o", str(tmp_path)).output
    assert "localize" in out
    for n, name in enumerate(list(BY_NAME)[1:], 2):
        before = next(tmp_path.glob(f"{n - 1:02d}-*.ir"))
        assert deepseed("opt", str(before), "--passes", name, *plan).output == (tmp_path / f"{n:02d}-{name}.ir").read_text(), name
    staged = deepseed("dump", mlp, *plan, "--after", "cut_stages", "-o", "-").output
    assert "schedule 1f1b stages=2 microbatches=2 loops=" in staged and "lane 1: " in staged


def test_dump_of_one_pass(mlp: str, tmp_path: Path) -> None:
    out = deepseed("dump", mlp, "--after", "canonicalize", "-o", str(tmp_path / "one")).output
    assert [f.name for f in (tmp_path / "one").iterdir()] == ["01-canonicalize.ir"] and "wrote 1 file to" in out
    text = deepseed("dump", mlp, "--after", "canonicalize", "-o", "-").output
    assert "canonical" in parse(text).facts


def test_a_text_that_is_no_program_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.ir").write_text("program p mesh() facts(captured)\n%x : f32[8 batch\n")
    assert "line 2" in refusal("opt", str(tmp_path / "bad.ir"))


# targets that are wrong ----------------------------------------------------------------------------------------------

MISTAKES = """
import torch
from torch import nn

model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(8, 8)
class Bare(nn.Module):
    def __init__(self): self.x = 1
def loss(m, x):
    return m(x).square().mean()
def given(*words, **more):
    return lambda: (*words, dict(loss_fn=loss) | more) if len(words) == 2 else words
def raises():
    return 1 / 0
def leaves():
    raise SystemExit(3)
def needs(batch):
    return model, batch

floats_for_ids = given(nn.Embedding(8, 8), torch.ones(4, 2))
too_large_ids = given(nn.Embedding(8, 8), torch.full((4,), 9))
too_wide = given(model, torch.randn(8, 9))
no_entry = given(model, {"y": x}, loss_fn=None)
loss_raises = given(model, x, loss_fn=lambda m, x: m(x).nope())
loss_of_output = given(model, x, loss_fn=lambda out: out.mean())
loss_by_name = given(model, x, loss_fn="mse")
not_scalar = given(model, x, loss_fn=lambda m, x: m(x))
no_optimizer = given(model, x, optimizer="adamw")
none_at_all = given(model, x, optimizer=[])
of_another = given(model, x, optimizer=torch.optim.SGD([nn.Parameter(x)], lr=0.1))
of_the_model = given(model, x, optimizer=lambda m: torch.optim.SGD(m.parameters()))
gives_a_number = given(model, x, optimizer=lambda parameters: 3)
norm_by_name = given(model, x, clip_grad_norm="one")
norm_below = given(model, x, clip_grad_norm=-1.0)
odd_words = lambda: (model, x, {1: loss, "los_fn": loss})
bare = given(Bare(), x)
generator = given((layer for layer in model), x)
no_parameters = given(nn.ReLU(), x)
script = lambda: (torch.jit.script(model), x)
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("floats_for_ids", r"^deepseed: Embedding cannot run on this batch: RuntimeError: Expected tensor .*Long.*\n  batch: input f32\[4, 2\]\n  .*wrong\.py:9\n  fix: give the batch"),
        ("too_wide", r"^deepseed: Sequential cannot run on this batch: RuntimeError: .*\[8, 9\] X \[8, 16\].*\n  batch: input f32\[8, 9\]\n  .*last op at 0, wrong\.py:9\n  fix: "),
        ("no_entry", r"^deepseed: Sequential cannot run on this batch: TypeError: .*unexpected keyword argument 'y'\n  batch: y f32\[8, 8\]\n  .*\n  fix: "),
        ("loss_raises", r"^deepseed: Sequential cannot run on this batch: AttributeError: .*'nope'\n  batch: .*\n  .*wrong\.py:\d+\n  fix: "),
        ("loss_of_output", r"wrong\.py:loss_of_output: loss_fn is called as loss_fn\(model, batch\), and this is a function: too many positional arguments\n  fix: "),
        ("loss_by_name", r"loss_fn is called as loss_fn\(model, batch\), and this is a str: .*\n  fix: "),
        ("not_scalar", r"the loss of Sequential is f32\[8, 8\], not one float\n  fix: "),
        ("no_optimizer", r"optimizer is a str, no optimizer of torch\.optim\n  fix: torch\.optim\.AdamW\(model\.parameters\(\)\)"),
        ("none_at_all", r"optimizer is a list, no optimizer of torch\.optim\n  fix: "),
        ("of_another", r"1 of the 1 parameters of its optimizer are none of its model's\n  fix: "),
        ("of_the_model", r"its function optimizer raised AttributeError: 'list' object has no attribute 'parameters'\n  fix: optimizer=lambda parameters: "),
        ("gives_a_number", r"its function optimizer gives a int, no optimizer of torch\.optim\n  fix: "),
        ("norm_by_name", r"clip_grad_norm is 'one', no norm\n  fix: "),
        ("norm_below", r"clip_grad_norm is -1\.0, no norm\n  fix: "),
        ("odd_words", r"the third value is a dict with loss_fn, optimizer, clip_grad_norm; this one has 'los_fn', 1\n  fix: "),
        ("bare", r"Bare does not call nn\.Module's __init__\n  fix: "),
        ("generator", r"gives a tuple of generator, Tensor, dict, not a model and a batch\n  fix: "),
        ("no_parameters", r"--optimizer adamw: the model has no parameters\n  fix: "),
        ("script", r"its model is a script of torch\.jit, whose code is not Python\n  fix: "),
        ("raises", r"calling raises\(\) at .*wrong\.py:13 raised ZeroDivisionError: division by zero\n  fix: "),
        ("leaves", r"calling leaves\(\) at .*wrong\.py:15 raised SystemExit: 3\n  fix: "),
        ("needs", r"calling needs\(\) at .*wrong\.py raised TypeError: .*'batch'\n  fix: "),
    ],
)
def test_a_mistake_in_a_targets_file_is_said_with_its_place_and_fix(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(MISTAKES)
    assert re.search(says, refusal("explain", f"{tmp_path}/wrong.py:{name}"))


@pytest.mark.parametrize("words", [("verify",), ("profile", "--backend", "simulate"), ("profile", "--backend", "simulate", "--codegen", "cpp")])
def test_an_index_out_of_range_is_a_mistake_of_the_batch(words: tuple[str, ...], tmp_path: Path) -> None:
    """Which only a run sees."""
    (tmp_path / "wrong.py").write_text(MISTAKES)
    said = refusal(words[0], f"{tmp_path}/wrong.py:too_large_ids", *words[1:])
    which = r'batch entry "input" has 9 at \[0\], and embedding at the top .* picks one of 8\n  batch: input i64\[4\]\n  fix: it must be 0 to 7; look'
    assert re.search(r"^deepseed: Embedding cannot run on this batch: IndexError: " + ("index out of range in self" if words[0] == "verify" else which), said, re.M)  # eager PyTorch comes first in verify
    assert "\n  batch: input i64[4]\n" in said and said.count("fix: ") == 1


def test_a_file_that_leaves_is_named(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(2)\n")
    assert "leaves.py:2 raised SystemExit: 2\n  fix: leave only under if __name__" in refusal("explain", f"{tmp_path}/leaves.py:build")
    (tmp_path / "syntax.py").write_text("x = 1\ndef build(:\n")
    assert "syntax.py:2 raised SyntaxError: " in refusal("explain", f"{tmp_path}/syntax.py:build")


def test_an_optimizer_may_be_a_function_of_the_parameters(tmp_path: Path, mlp: str) -> None:
    """As --optimizer is: a class of torch.optim, or a function that makes one."""
    whole = json.loads(deepseed("explain", mlp, "--json").output)["ranks"]
    for n, made in enumerate(("lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)", "torch.optim.AdamW")):
        (tmp_path / f"made{n}.py").write_text(re.sub(r"torch\.optim\.SGD\(model.*momentum=0\.9\)", made, MLP))
        found = json.loads(deepseed("explain", f"{tmp_path}/made{n}.py:build", "--json").output)["ranks"]
        assert (found == whole) if n == 0 else found[0]["optimizer_bytes"] > 2 * found[0]["param_bytes"]
    deepseed("verify", f"{tmp_path}/made0.py:build", "--plan", "zero1", "--world-size", "2")


# explain and verify --------------------------------------------------------------------------------------------------


def test_explain_kernels_as_a_table_and_as_json(mlp: str) -> None:
    words = ["explain", mlp, "--plan", "zero3", "--world-size", "2", "--kernels"]
    shown = deepseed(*words).output
    assert "launches a step" in shown and " launches are of no kernel above: " in shown and ", 3 aten.mm, 2 aten.addmm, " in shown
    found = json.loads(deepseed(*words, "--json").output)
    assert 0 < found["launches"] <= found["launches_ungrouped"]
    assert found["launches"] == sum(k["launches"] for k in found["kernels"]) + sum(found["alone"].values()) and found["alone"]["aten.mm"] == 3
    assert "computes no groups" in refusal(*words, "--codegen", "python")
    for kernel in found["kernels"]:
        assert {"name", "ops", "bytes_read", "bytes_written", "bytes_minimum", "calls", "launches", "intensity"} <= kernel.keys() and (kernel["runs_as"], kernel["why"]) == ("kernel", "")
        assert len(kernel["ops"]) > 1 and kernel["bytes_minimum"] <= kernel["bytes_read"] + kernel["bytes_written"]


def test_explain_kernels_of_auto_are_those_of_cpp(tmp_path: Path) -> None:
    """What `compile` makes of the word on a CPU with a compiler, products among them."""
    (tmp_path / "wide.py").write_text(MLP.replace("(8, 16)", "(256, 256)").replace("(16, 8)", "(256, 256)").replace("randn(8, 8)", "randn(128, 256)"))
    words = ["explain", f"{tmp_path}/wide.py:build", "--kernels", "--json"]
    found = json.loads(deepseed(*words).output)
    assert found == json.loads(deepseed(*words, "--codegen", "cpp").output)
    assert any("aten.addmm" in k["ops"] for k in found["kernels"])


def test_explain_kernels_says_calls_of_a_step_and_bytes_of_a_call(mlp: str) -> None:
    """Of two microbatches each has a call: half of the rows, so that both move what the whole batch does."""
    words = ["explain", mlp, "--kernels", "--json", "--codegen", "triton"]
    whole, half = ({k["ops"][0]: k for k in json.loads(deepseed(*words, "--plan", plan).output)["kernels"] if "aten.threshold_backward" in k["ops"]} for plan in ("zero0", "mb2"))
    assert whole and whole.keys() == half.keys()
    for name, k in half.items():
        assert (k["calls"], whole[name]["calls"]) == (2, 1) and k["launches"] == 2 * whole[name]["launches"] and 2 * k["bytes_written"] == whole[name]["bytes_written"]


def test_explain_as_a_table_and_as_json(mlp: str) -> None:
    words = ["explain", mlp, "--plan", "zero3", "--world-size", "2"]
    table = deepseed(*words).output
    assert "closed form" in table and table.splitlines()[-1].startswith("next: deepseed explain ")
    found = json.loads(deepseed(*words, "--json").output)
    assert len(found["ranks"]) == 2 and set(found["seconds"]) >= {"capture", "solve_placements"}
    psi = (8 * 16 + 16 + 16 * 8 + 8) * 4
    assert found["ranks"][0]["param_bytes"] == psi // 2 == found["ranks"][0]["optimizer_bytes"]  # the file's own SGD: one momentum


def test_options_win_over_the_file(mlp: str) -> None:
    found = json.loads(deepseed("explain", mlp, "--optimizer", "adamw", "--clip", "0", "--json").output)
    assert found["ranks"][0]["optimizer_bytes"] > 2 * found["ranks"][0]["param_bytes"]


def test_explain_why(mlp: str) -> None:
    out = deepseed("explain", mlp, "--plan", "tp2", "--why", "0.weight").output
    assert "chosen" in out and "a step" in out
    assert "did you mean" in refusal("explain", mlp, "--plan", "tp2", "--why", "0.wieght")


def test_verify_locally(mlp: str) -> None:
    out = deepseed("verify", mlp, "--plan", "zero2", "--world-size", "2", "--json").output
    found = json.loads(out)
    assert found["ok"] and found["param_max_rel_error"] <= 1e-10 and found["instances_checked"] > 0
    assert {"loss_rel_error", "grad_max_rel_error", "seconds"} <= set(found)
    assert "equal to eager PyTorch" in deepseed("verify", mlp, "--plan", "tp2", "--steps", "1").output


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "deepseed", *words], capture_output=True, text=True, timeout=240, env=env, check=False)


@pytest.mark.turn
def test_verify_on_gloo_runs_the_program_that_simulate_ran(mlp: str) -> None:
    here = json.loads(shell("verify", mlp, "--plan", "zero3", "--world-size", "2", "--json").stdout)
    done = shell("verify", mlp, "--plan", "zero3", "--world-size", "2", "--backend", "gloo", "--json")
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert there["ok"] and there["backend"] == "gloo" and there["program_hash"] == here["program_hash"]
    assert all(f"rank {rank} of 2: program sha256 {here['program_hash']}" in done.stderr for rank in range(2))


def test_run_starts_ranks_and_gives_the_script_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os, sys\nopen(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w').write(' '.join(sys.argv[2:]))\nsys.exit(3 if sys.argv[-1] == 'fail' else 0)\n")
    done = shell("run", "--num_gpus", "2", str(script), str(tmp_path), "--lr", "0.1")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["--lr 0.1"] * 2
    assert shell("run", str(script), str(tmp_path), "fail").returncode == 3


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--num_gpus", "2", "--help"], ["config", "check", "--help"]])
def test_help_needs_no_torch(words: list[str]) -> None:
    """A quarter of a second instead of two; and so does ``import deepseed``."""
    code = f"import sys; sys.argv = ['deepseed', *{words!r}]\nfrom deepseed.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("False") and "sage:" in done.stdout, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 1.0, "seconds of a core"
