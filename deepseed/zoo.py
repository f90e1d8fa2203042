"""Which models work under which plans? Every TARGET under every plan beside eager PyTorch, and a table of what came out.

Each target runs in a process of its own (``python -m deepseed.zoo TARGET PLAN...`` prints a JSON line a finding), so that a crash
or a timeout of one costs only that one. What is refused is said in a line, with the whole text in a log.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from deepseed.ir.program import Program
from deepseed.verify import LOSS_TOLERANCE, TOLERANCE

TARGETS = (
    *(f"hf:{name}ForCausalLM" for name in ("Llama", "Qwen3Moe", "Mixtral", "DeepseekV3", "GptOss", "OPT", "GPTNeoX", "GPTJ", "Mpt", "Bloom", "Phi3", "Olmo2", "Gemma3", "Llama4", "Mamba", "Jamba")),
    "hf:GPT2LMHeadModel", "hf:XLNetLMHeadModel", "hf:BertForMaskedLM", "hf:ModernBertForMaskedLM", "hf:AlbertForMaskedLM",
    "hf:T5ForConditionalGeneration", "hf:WhisperForConditionalGeneration",
    "hf:ViTForImageClassification", "hf:SwinForImageClassification", "hf:ConvNextForImageClassification",
    'hf:ResNetForImageClassification(layer_type="basic", depths=[2, 2, 2, 2], embedding_size=16, hidden_sizes=[16, 32, 64, 128])',
    "hf:CLIPModel", "examples/zoo.py:dit", "examples/zoo.py:dlrm",
)  # fmt: skip
PLANS = ("zero1x2", "zero2x3", "zero3x4", "tp2", "sp2", "zero3+tp2x4")
TIMEOUT = 900.0
Tell = Callable[[str], None]


class ZooError(ValueError):
    """A plan of the list that cannot be read."""


@dataclass
class Outcome:
    """One target under one plan. ``verdict``: equal, differs, refused (DeepSeed said why), failed (anything else), none (the
    plan does not apply). ``repeated``: the part of all ranks' matmul flops that others compute too."""

    plan: str
    verdict: str
    loss_error: float = 0.0
    grad_error: float = 0.0
    param_error: float = 0.0
    repeated: float = 0.0
    seconds: float = 0.0
    why: str = ""


@dataclass
class Result:
    """One target. ``unruled``: op -> how many; ``unruled_share``: of the step's compute (flops of an op, or the bytes of its
    results where it has none), what every rank repeats for lack of a rule."""

    target: str
    parameters: int = 0
    captured: bool = False
    ops: int = 0
    unruled: dict[str, int] = field(default_factory=dict)
    unruled_share: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    verdict: str = "failed"  # of plans that were not reached
    why: str = ""  # it was not built or not captured, or its process ended
    log: str = ""

    @property
    def ok(self) -> bool:
        return self.captured and all(o.verdict in ("equal", "none") for o in self.outcomes)

    @property
    def wrong(self) -> bool:
        return any(o.verdict in ("differs", "failed") for o in self.outcomes)


def parse_plans(text: str) -> list[tuple[str, int | None]]:
    """``zero1x2,tp2`` -> plan and number of ranks (None: what the plan says)."""
    from deepseed.plan import parse_plan

    out: list[tuple[str, int | None]] = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(.+?)(?:x(\d+))?\s*", word)
        if found is None:
            raise ZooError(f"--plans {text!r} has an empty plan\n  fix: plans joined by commas, with xN for N ranks: zero3x4,tp2")
        plan, ranks = found[1], int(found[2]) if found[2] else None
        parse_plan(plan).mesh(ranks)
        out.append((plan, ranks))
    return out


# one target, in its own process --------------------------------------------------------------------------------------


def examine(target: str, plans: Sequence[str], steps: int = 3) -> Iterator[dict[str, Any]]:
    """What is found, piece by piece, as fields of Result and, under ``"outcome"``, of Outcome."""
    import torch

    from deepseed import target as targets
    from deepseed.capture import capture

    torch.set_num_threads(1)
    found = targets.load(target)
    yield {"parameters": sum(p.numel() for p in found.model.parameters())}
    factory: Any = targets.like(found.optimizer, found.model) if found.optimizer is not None else targets.optimizer_factory("adamw")
    common = {"optimizer_factory": factory, "loss_fn": found.loss_fn, "clip_grad_norm": found.clip_grad_norm or 1.0}
    captured = capture(found.model, found.batch, loss_fn=found.loss_fn, optimizer=factory(list(found.model.parameters())), clip_grad_norm=common["clip_grad_norm"])
    yield {"captured": True, **_compute(captured.program)}
    for text in plans:
        if re.search(r"\bsp\d", text) and not _has_sequence(found.batch):
            yield {"outcome": asdict(Outcome(text, "none", why="the batch has no sequence"))}
            continue
        yield {"outcome": asdict(_under(found, text, {**common, "steps": steps}))}


def _under(found: Any, text: str, settings: dict[str, Any]) -> Outcome:
    import traceback

    from deepseed.verify import verify

    ((plan, ranks),) = parse_plans(text)
    started = perf_counter()
    try:
        report = verify(found.model, found.batch, plan, world_size=ranks, backend="simulate", **settings)
    except Exception as error:
        traceback.print_exc()
        return Outcome(text, _verdict(error), seconds=perf_counter() - started, why=f"{type(error).__name__}: {error}")
    if not report.ok:
        print(f"{text}\n{report}", file=sys.stderr)
    return Outcome(
        text, "equal" if report.ok else "differs", report.loss_rel_error, report.grad_max_rel_error, report.param_max_rel_error, report.repeated,
        perf_counter() - started, "" if report.ok else report.blame,
    )  # fmt: skip


def _verdict(error: Exception) -> str:
    return "refused" if type(error).__module__.split(".")[0] == "deepseed" else "failed"


def _compute(captured: Program) -> dict[str, Any]:
    """Ops without a rule, and their part of the step's compute."""
    from deepseed import cost, pipeline
    from deepseed.check.typing import operand_types
    from deepseed.rules import signature

    program = pipeline.run(captured, {}, pipeline.PIPELINE[:1], check=False)[-1].program
    unruled: Counter[str] = Counter()
    whole = without = 0
    for op in program.ops:
        amount = cost.flops(op, [program.types[r.name] for r in op.refs]) or sum(t.nbytes for t in op.types)
        whole += amount
        if signature(op, operand_types(program, op)) is None:
            unruled[op.target] += 1
            without += amount
    return {"ops": len(program.ops), "unruled": dict(unruled), "unruled_share": without / whole if whole else 0.0}


def _has_sequence(batch: Any) -> bool:
    """Whether some tensor of the batch is a table of ids, rows by tokens."""
    import torch

    from deepseed.capture.batch import tensors

    return any(t.dim() == 2 and t.dtype in (torch.int64, torch.int32) for t in tensors(batch).values())


# all targets ---------------------------------------------------------------------------------------------------------


def run(
    targets: Sequence[str] = TARGETS, plans: Sequence[str] = PLANS, *, steps: int = 3, jobs: int = 1, timeout: float = TIMEOUT, tell: Tell = lambda line: None, keep: Path | None = None,
) -> list[Result]:
    """Every target under every plan, ``jobs`` targets at a time, ``timeout`` seconds for each. ``tell`` gets a line a target.
    ``keep``: a file that gets a JSON line a target; a target that it has under these plans is not run again."""
    parse_plans(",".join(plans))
    logs = Path(tempfile.mkdtemp(prefix="deepseed-zoo-"))
    done: list[Result] = []
    kept = {r.target: r for r in read_results(keep) if [o.plan for o in r.outcomes] == list(plans)} if keep is not None and keep.exists() else {}

    def one(target: str) -> Result:
        result = kept.get(target)
        if result is None:
            result = _in_a_process(target, plans, steps, timeout, logs)
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
        done.append(result)
        tell(f"[{len(done):{len(str(len(targets)))}}/{len(targets)}] {line(result)}")
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, targets))


def read_results(path: Path) -> list[Result]:
    """What ``keep`` wrote, the last of each target. Raises ZooError."""
    found: dict[str, Result] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(text)
            found[fields["target"]] = Result(**{**fields, "outcomes": [Outcome(**o) for o in fields["outcomes"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise ZooError(f"{path}:{number} is no result of deepseed zoo ({error})\n  fix: remove the line; its target runs again") from None
    return list(found.values())


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """The targets of a file, one a line, and the words that it begins with (lines after ``#``), which head the page. Raises ZooError."""
    lines = [text.strip() for text in path.read_text().splitlines()]
    head = [text.removeprefix("#").strip() for text in itertools.takewhile(lambda text: text.startswith("#"), lines)]
    targets = [text for text in lines if text and not text.startswith("#")]
    if not targets or len(set(targets)) != len(targets):
        twice = next((t for t in targets if targets.count(t) > 1), None)
        raise ZooError(f"{path} names {f'{twice} twice' if twice else 'no target'}\n  fix: one TARGET a line, each once; # begins a remark")
    return targets, head


def _in_a_process(target: str, plans: Sequence[str], steps: int, timeout: float, logs: Path) -> Result:
    started = perf_counter()
    result = Result(target, log=str(logs / (re.sub(r"\W+", "-", short(target)).strip("-") + ".log")))
    command = [sys.executable, "-m", "deepseed.zoo", target, str(steps), *plans]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with open(result.log, "w") as log, tempfile.TemporaryFile("w+") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=log, env=environment, timeout=timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        out.seek(0)
        for text in out:
            if text.startswith("{"):
                found = json.loads(text)
                if "outcome" in found:
                    result.outcomes.append(Outcome(**found.pop("outcome")))
                for name, value in found.items():
                    setattr(result, name, value)
    if code != 0:
        ended = f"stopped after {timeout:.0f} s" if code is None else f"its process ended with code {code}"
        result.why = result.why or ended
        result.outcomes += [Outcome(plan, result.verdict, why=result.why) for plan in plans[len(result.outcomes) :]]
    result.seconds = perf_counter() - started
    return result


# words ---------------------------------------------------------------------------------------------------------------


def short(target: str) -> str:
    """``hf:LlamaForCausalLM(num_hidden_layers=4)`` -> ``LlamaForCausalLM``; a file's name after its colon."""
    return target.partition("(")[0].rpartition(":")[2]


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def line(r: Result) -> str:
    """What came out, on one line; the first cause, and where the rest is."""
    tried = [o for o in r.outcomes if o.verdict != "none"]
    equal = sum(o.verdict == "equal" for o in tried)
    odd = next((o for o in tried if o.verdict != "equal"), None)
    cause = r.why if r.why and not r.captured else f"{odd.plan} {odd.verdict}: {odd.why}" if odd else ""
    unruled = f"{sum(r.unruled.values())} ops unruled" if r.unruled else ""
    head = f"{short(r.target):34} {equal}/{len(tried)} equal  {r.seconds:6.1f} s  {unruled}"
    return head.rstrip() if not cause else f"{head}  {first_line(cause)[:160]}  ({r.log})"


def summary(results: Sequence[Result]) -> str:
    """Counts, and what to do next."""
    tried = [o for r in results for o in r.outcomes if o.verdict != "none"]
    count = Counter(o.verdict for o in tried)
    words = ", ".join(f"{n} {verdict}" for verdict, n in count.most_common())
    odd = next((r for r in results if not r.ok), None)
    if odd is None:
        then = f"deepseed explain '{results[0].target}' --plan zero3+tp2 --world-size 4" if results else "deepseed zoo --help"
    else:
        bad = next((o for o in odd.outcomes if o.verdict not in ("equal", "none")), None)
        plan, ranks = parse_plans(bad.plan)[0] if bad else ("zero0", None)
        then = f"deepseed verify '{odd.target}' --plan {plan}" + (f" --world-size {ranks}" if ranks else "")
    return f"{sum(r.ok for r in results)} of {len(results)} models equal in all plans; {words or 'nothing tried'}\nnext: {then}"


def table(results: Sequence[Result], plans: Sequence[str], head: Sequence[str] = ("Which models work?", "", "<!-- Generated by `make zoo`. -->")) -> str:
    """The page docs/models.md. ``head``: its title and what comes before the table."""
    notes: dict[str, int] = {}

    def cell(r: Result, plan: str) -> str:
        o = next((each for each in r.outcomes if each.plan == plan), None)
        if o is None or o.verdict == "none":
            return "-"
        if o.verdict == "equal":
            return f"{o.loss_error:.0e} / {o.grad_error:.0e}"
        note = notes.setdefault(f"{o.verdict}: {first_line(o.why)}", len(notes) + 1)
        return f"{o.verdict if o.verdict == 'refused' else o.verdict.upper()} [{note}]"

    rows = []
    for r in results:
        unruled = ", ".join(f"{name} x{n}" for name, n in r.unruled.items()) or "-"
        captured = f"{r.ops} ops" if r.captured else "no"
        most = max((o.repeated for o in r.outcomes), default=0.0)
        cells = [short(r.target), f"{r.parameters:,}", captured, *(cell(r, plan) for plan in plans), unruled, f"{r.unruled_share:.1%}", f"{most:.0%}", f"{r.seconds:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    columns = ["model", "parameters", "captured", *(re.sub(r"x(\d+)$", r" x\1", plan) for plan in plans), "ops without a rule", "share repeated for that", "matmuls repeated", "seconds"]
    return "\n".join([
        f"# {head[0]}", *head[1:], "",
        f"Each model is small, random and in training mode with its default dropout. Under each plan three steps of AdamW with clipping run on simulated ranks in float64 beside eager PyTorch: "
        f"the cell is the relative error of the loss (allowed {LOSS_TOLERANCE:.0e}) and the largest of the gradients (allowed {TOLERANCE:.0e}, as for the parameters after the update). "
        "`xN` is the number of ranks. The batch has 8 rows, which three ranks share unevenly. `-`: the plan does not apply (`sp` needs a batch with a sequence).", "",
        "*Ops without a rule* run whole on every rank, never wrongly; the *share repeated for that* is their part of the step's compute (flops, or bytes of the result where an op has none). "
        "*Matmuls repeated* is the largest part, over the plans, of all ranks' matmul flops that another rank computes too, for whatever reason.", "",
        "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows, "",
        summary(results).partition("\n")[0] + ".", "",
        *(f"[{n}] {text}" + "  " for text, n in notes.items()),
    ]).rstrip() + "\n"  # fmt: skip


def _main(target: str, steps: str, *plans: str) -> int:
    import logging

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        for found in examine(target, plans, int(steps)):
            print(json.dumps(found), flush=True)
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(json.dumps({"why": f"{type(error).__name__}: {error}", "verdict": _verdict(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
