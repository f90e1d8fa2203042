"""``deepseed dump | opt | diff | explain | plan | verify | profile | calibrate | zoo | generate | serve | bench serve | run | config | checkpoint | env``: look at a program, change it, ask about it, prove it, start it.

A TARGET is ``path/to/file.py:name`` or ``hf:ClassName(field=value, ...)``, see deepseed.target. A mistake of the user's is
answered by its message alone and exit code 2; ``DEEPSEED_DEBUG=1`` shows where it was found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from deepseed.checkpoint_cli import app as checkpoints
from deepseed.friendly import UsageError
from deepseed.friendly import friendly as _friendly
from deepseed.inference.cli import generate
from deepseed.program_cli import ClipOption, JsonOption, OptimizerOption, PlanOption, RanksOption, TargetArg, diff, dump, explain, opt, plan
from deepseed.serve.cli import bench, serve

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Look at a training step as a program, change it, ask about it, prove it, start it.")
configs = typer.Typer(no_args_is_help=True, help="Read a DeepSpeed config.")
app.add_typer(configs, name="config")
app.add_typer(checkpoints, name="checkpoint")
for command in (dump, opt, diff, explain, plan, generate):
    app.command()(command)
app.command()(serve)
app.add_typer(bench, name="bench")
BACKENDS = ("simulate", "gloo", "nccl")


@app.command()
@_friendly
def verify(
    target: TargetArg,
    plan: PlanOption = "zero0",
    world_size: RanksOption = None,
    backend: Annotated[str, typer.Option(help="simulate (all ranks in this process), gloo or nccl (one process a rank)")] = "simulate",
    steps: Annotated[int, typer.Option(min=1)] = 3,
    optimizer: OptimizerOption = None,
    clip: ClipOption = None,
    codegen: Annotated[str, typer.Option(help="what computes groups of ops: python, cpp, inductor, triton or auto")] = "python",
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="replay steps as CUDA graphs from the third on; give --steps 4 or more")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train some steps in float64 beside eager PyTorch and compare. Exit code 0 only where all agree."""
    from deepseed.asked import clip_of, factory_of, fitting, tell_notes
    from deepseed.calibrate import unfit
    from deepseed.kernels import known
    from deepseed.plan import parse_plan
    from deepseed.target import load
    from deepseed.verify import VerifyReport
    from deepseed.verify import verify as check
    from deepseed.verify_ranks import verify_ranks

    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}\n  fix: one of {', '.join(BACKENDS)}")
    known(codegen)
    found = load(target)
    tell_notes(parse_plan(plan), world_size)
    if backend == "simulate":
        with fitting(found):
            report = check(
                found.model, found.batch, plan, world_size=world_size, optimizer_factory=factory_of(found, optimizer), loss_fn=found.loss_fn,
                clip_grad_norm=clip_of(found, clip), steps=steps, backend=backend, codegen=codegen, cuda_graphs=cuda_graphs,
            )  # fmt: skip
    else:
        if (why := unfit(parse_plan(plan).mesh(world_size).ranks, backend)) is not None:
            raise UsageError(why)

        def tell(rank: int, each: VerifyReport) -> None:
            typer.echo(f"rank {rank} of {each.world_size}: program sha256 {each.program_hash}", err=True)

        report = verify_ranks(
            target, plan, world_size=world_size, backend=backend, optimizer=optimizer, clip_grad_norm=clip_of(found, clip), steps=steps, codegen=codegen, cuda_graphs=cuda_graphs, tell=tell
        )  # fmt: skip
    typer.echo(json.dumps(report.to_json(), indent=1) if as_json else str(report))
    if not as_json:
        typer.echo(f"next: deepseed explain '{target}' --plan {plan}{f' --world-size {world_size}' if world_size else ''}")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
@_friendly
def profile(
    target: TargetArg,
    plan: PlanOption = "zero0",
    world_size: RanksOption = None,
    backend: Annotated[str, typer.Option(help="gloo or nccl (one process a rank), or simulate (all ranks in this process, in turns)")] = "gloo",
    steps: Annotated[int, typer.Option(min=1, help="the last of them is shown")] = 3,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="TRACE.json", help="write the trace, for ui.perfetto.dev or chrome://tracing")] = None,
    optimizer: OptimizerOption = None,
    clip: ClipOption = None,
    codegen: Annotated[str, typer.Option(help="what computes groups of ops: python (no groups: a line an op), cpp, inductor, triton or auto")] = "python",
    as_json: JsonOption = False,
) -> None:
    """Train some steps and say where the time of the last one went, by phase, op and module; as a trace, node by node on every rank."""
    from deepseed.asked import clip_of, tell_notes
    from deepseed.calibrate import unfit
    from deepseed.kernels import known
    from deepseed.on_ranks import on_ranks
    from deepseed.plan import parse_plan
    from deepseed.profiles import of_target
    from deepseed.target import load

    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}\n  fix: one of {', '.join(BACKENDS)}")
    known(codegen)
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"no folder {out.absolute().parent} for the trace\n  fix: make it, or write elsewhere")
    said = parse_plan(plan)
    tell_notes(said, world_size)
    ranks = said.mesh(world_size).ranks
    if (why := unfit(ranks, backend)) is not None:
        raise UsageError(why)
    given = (target, plan, world_size, "simulate" if ranks == 1 else backend, steps, optimizer, clip_of(load(target, meta=True), clip), codegen)
    found = of_target(*given) if given[3] == "simulate" else on_ranks(of_target, ranks, *given)[0]
    if out is not None:
        found.save(out)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))
    if out is not None:
        typer.echo(f"wrote {out}: open it at https://ui.perfetto.dev or chrome://tracing", err=as_json)


@app.command()
@_friendly
def calibrate(
    world_size: Annotated[int, typer.Option(min=1, help="ranks that are measured together, each in a process of its own")] = 1,
    backend: Annotated[str, typer.Option(help="gloo or nccl  [default: nccl where there is a GPU]")] = "",
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="MACHINE.json", help="a file of one's own; left out, where compile and explain look for it")] = None,
) -> None:
    """Measure this machine: matmuls, memory, starting an op, the host's link, and collectives between ranks. Plans and schedules are chosen by it from then on."""
    from deepseed.calibrate import calibrate as measure
    from deepseed.calibrate import default_backend, unfit
    from deepseed.machines import path_of, save

    backend = backend or default_backend()
    if backend not in BACKENDS[1:]:
        raise UsageError(f"unknown backend {backend!r}\n  fix: one of {', '.join(BACKENDS[1:])}")
    if (why := unfit(world_size, backend)) is not None:
        raise UsageError(why)
    if out is not None and out.suffix != ".json":
        raise UsageError(f"-o {out}: the file of a machine ends in .json\n  fix: -o {out}.json")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"no folder {out.absolute().parent} for the machine\n  fix: make it, or write elsewhere")
    found = measure(world_size, backend)
    path = out or path_of(world_size, found.kind)
    save(path, found.machine, found.about())
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))
    typer.echo(f"wrote {path}" + ("" if out is None else f": use it by --machine {path}"), err=as_json)


@app.command()
@_friendly
def zoo(
    targets: Annotated[list[str] | None, typer.Argument(metavar="[TARGET]...", help="left out, the thirty of docs/models.md")] = None,
    plans: Annotated[str, typer.Option(help="joined by commas, xN for N ranks  [default: zero1x2,zero2x3,zero3x4,tp2,sp2,zero3+tp2x4]")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the table there, as docs/models.md, anew after each target")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="targets at a time")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="seconds for a target")] = 900,
    listed: Annotated[Path | None, typer.Option("--list", help="a file of TARGETs, one a line; the # lines at its top head the table")] = None,
    keep: Annotated[Path | None, typer.Option(help="a file of results, a JSON line a target: a target that it has is not run again")] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify many targets under many plans, each target in its own process. Exit code 1 where one differs or fails."""
    from dataclasses import asdict

    from deepseed import zoo as all_of

    words = [word.strip() for word in plans.split(",")] if plans else list(all_of.PLANS)
    if targets and listed is not None:
        raise UsageError("TARGETs and --list\n  fix: give one of the two")
    these, head = all_of.read_list(listed) if listed is not None else (targets or all_of.TARGETS, [])

    def write(results: Sequence[all_of.Result]) -> None:
        if out is not None:
            out.write_text(all_of.table(results, words, head or all_of.HEAD, len(these)))

    results = all_of.run(these, words, steps=steps, jobs=jobs, timeout=timeout, keep=keep, tell=lambda line: typer.echo(line, err=as_json), so_far=write)
    if out is not None:
        typer.echo(f"wrote {out}", err=as_json)
    typer.echo(json.dumps([asdict(r) for r in results], indent=1) if as_json else all_of.summary(results))
    raise typer.Exit(1 if any(r.wrong for r in results) else 0)


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Say what is installed, which devices there are, and whether they fit together."""
    from deepseed.env import collect, text

    found = collect()
    typer.echo(json.dumps(found, indent=1) if as_json else text(found))


@configs.command("check")
@_friendly
def config_check(
    file: Annotated[str, typer.Argument(metavar="DS_CONFIG.json", help="a file, JSON text or its base64")],
    world_size: RanksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what becomes of each key of a DeepSpeed config, and the plan that equals it. Exit code 1 where a key is rejected, 2 where the file cannot be read."""
    from dataclasses import asdict

    from deepseed.config.checked import checked

    found = checked(file, world_size)
    if as_json:
        typer.echo(json.dumps({key: value for key, value in asdict(found).items() if key != "read"}, indent=1))
    else:
        typer.echo(found if found.read else f"deepseed: {found.error}", err=not found.read)
    raise typer.Exit(0 if found.plan is not None else 1 if found.read else 2)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []})
def run(context: typer.Context) -> None:
    """Start a script on several ranks: deepseed run --num_gpus 2 SCRIPT.py. As deepseed SCRIPT.py, without --local_rank among its arguments."""
    from deepseed.launcher import main as launch

    raise typer.Exit(launch(["--no_local_rank", *context.args]))


def main() -> None:
    """The ``deepseed`` command: a first word that is an option or a script starts the launcher, any other is a subcommand."""
    words = sys.argv[1:]
    if words and words[0] != "--help" and (words[0].startswith("-") or Path(words[0]).suffix == ".py"):
        from deepseed.launcher import main as launch

        sys.exit(launch(words))
    app()
