"""``deepseed dump | opt | diff | explain | plan``: look at a program, change it, compare two, ask about one. And the options that all commands with a target share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from deepseed.friendly import UsageError
from deepseed.friendly import friendly as _friendly
from deepseed.ir.program import Program

TargetArg = Annotated[str, typer.Argument(metavar="TARGET", help="path/to/file.py:name, or hf:ClassName(field=value, ...)")]
PlanOption = Annotated[str, typer.Option("--plan", help="such as zero3+tp2")]
RanksOption = Annotated[int | None, typer.Option("--world-size", help="number of ranks; left out, what the plan says")]
OptimizerOption = Annotated[str | None, typer.Option("--optimizer", help="of torch.optim, such as sgd(momentum=0.9), or none  [default: the target's, else adamw]")]
ClipOption = Annotated[float | None, typer.Option("--clip", help="global gradient norm; 0: no clipping  [default: the target's, else 1.0]")]
JsonOption = Annotated[bool, typer.Option("--json", help="as JSON")]
CheckOption = Annotated[bool, typer.Option("--check/--no-check", help="check the program after each pass")]


@_friendly
def dump(
    target: TargetArg,
    plan: PlanOption = "zero0",
    world_size: RanksOption = None,
    after: Annotated[str, typer.Option(help="a pass, or all")] = "all",
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for NN-pass.ir; - prints")] = Path("dump"),
    optimizer: OptimizerOption = None,
    clip: ClipOption = None,
    check: CheckOption = True,
) -> None:
    """Write the program after each pass as text, NN-pass.ir."""
    from deepseed import pipeline
    from deepseed.asked import captured, passed, passes_table

    names = ["capture", *pipeline.BY_NAME]
    if after not in ("all", *names):
        raise UsageError(f"no pass is called {after!r}{_nearest(after, names)}\n  fix: one of {', '.join(names)}")
    p, said, ranks, seconds = captured(target, plan, world_size, optimizer, clip)
    done = passed(p, said, ranks, seconds, list(pipeline.PIPELINE), check)
    chosen = [(n, each) for n, each in enumerate(done) if after in ("all", each.name)]
    if str(out) == "-":
        for _, each in chosen:
            typer.echo(str(each.program), nl=False)
        return
    out.mkdir(parents=True, exist_ok=True)
    for n, each in chosen:
        (out / f"{n:02d}-{each.name}.ir").write_text(str(each.program))
    typer.echo("\n".join(passes_table(done)))
    first, last = chosen[0], chosen[-1]
    typer.echo(f"wrote {len(chosen)} file{'s' if len(chosen) > 1 else ''} to {out}/")
    if len(chosen) > 1:
        typer.echo(f"next: deepseed diff {out}/{last[0] - 1:02d}-{done[last[0] - 1].name}.ir {out}/{last[0]:02d}-{last[1].name}.ir")
    else:
        typer.echo(f"next: deepseed opt {out}/{first[0]:02d}-{first[1].name}.ir --passes {','.join(n for n in names[first[0] + 1 :][:1])}")


@_friendly
def opt(
    file: Annotated[Path, typer.Argument(metavar="FILE.ir", help="a program as text; - reads stdin")],
    passes: Annotated[str, typer.Option(help="names joined by commas; none: parse and print")] = "",
    plan: PlanOption = "",
    world_size: RanksOption = None,
    rank: Annotated[int, typer.Option(help="for localize: the rank")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="a file instead of stdout")] = None,
    check: CheckOption = True,
) -> None:
    """Run passes on a program text, as a plan would have them run, and print what comes out."""
    from deepseed import pipeline
    from deepseed.ir.verify import verify
    from deepseed.machines import measured
    from deepseed.memory import live_bytes
    from deepseed.meshes import program_mesh, ranks_of
    from deepseed.plan import parse_plan

    p = verify(_read(file))
    names = [name.strip() for name in passes.split(",") if name.strip()]
    for name in names:
        if name not in pipeline.BY_NAME:
            raise UsageError(f"no pass is called {name!r}{_nearest(name, list(pipeline.BY_NAME))}\n  fix: one of {', '.join(pipeline.BY_NAME)}")
    said = parse_plan(plan)
    ranks = said.mesh(world_size) if plan else ranks_of(p)
    args = pipeline.arguments(
        p.mesh if "placed" in p.facts else program_mesh(p, said, ranks), said.stage, ranks.coordinate(rank) if ranks.axes else {}, plan=said
    )
    args["schedule_collectives"] = {"machine": measured(ranks.ranks), "live": live_bytes}
    done = pipeline.run(p, args, [pipeline.BY_NAME[name] for name in names], check=check)
    text = str(done[-1].program if done else p)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)


@_friendly
def diff(
    a: Annotated[Path, typer.Argument(metavar="A.ir")],
    b: Annotated[Path, typer.Argument(metavar="B.ir")],
    full: Annotated[bool, typer.Option("--all", help="every line of each section")] = False,
) -> None:
    """Say what changed from one program to another, in ops, layouts and collectives."""
    from deepseed.ir.diff import diff as compare

    typer.echo(compare(_read(a), _read(b), limit=None if full else 12), nl=False)


@_friendly
def explain(
    target: TargetArg,
    plan: PlanOption = "zero0",
    world_size: RanksOption = None,
    why: Annotated[str | None, typer.Option("--why", metavar="NODE", help="why this value (or parameter) lies as it does")] = None,
    optimizer: OptimizerOption = None,
    clip: ClipOption = None,
    as_json: JsonOption = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="OUT.html", help="write a page: timeline, memory, mesh, collectives")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="what each group of ops that one kernel computes reads and writes, and how many a step launches; --codegen, --gpu and --measure say more")] = False,
    codegen: Annotated[str | None, typer.Option(help="with --kernels: the back end that writes them, cpp, inductor, triton or auto, which is cpp: a CPU with a compiler  [default: auto]")] = None,
    gpu: Annotated[list[str] | None, typer.Option("--gpu", metavar="sm_80|sm_90|gfx942", help="with --kernels --codegen triton: compile each for this GPU, which need not be here, and say registers, spilled bytes, shared memory, and where the assembly lies; may be given several times")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="with --kernels: run each on this machine, and say seconds a call and the share of the roofline: the time that its bytes (column least) or its matrix products need at --machine's rates over its own; operands that fit in the processor's caches can come out above 100 %")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="whether a CUDA device could replay a rank's step as one graph, and if not why")] = False,
    machine: Annotated[str, typer.Option(help="what the times assume of a rank: measured, a .json of calibrate, or words as flops=300e12,memory=3e12,link=100e9  [default: measured, where it was]")] = "",
) -> None:
    """Say what is split where, what is sent and what it costs. Makes no tensors: a model of any size can be asked about."""
    from deepseed import pipeline
    from deepseed.asked import captured, passed
    from deepseed.explain import explain as count
    from deepseed.kernels import AUTO, PRODUCTS, PYTHON, known
    from deepseed.machines import machine_of
    from deepseed.meshes import program_mesh
    from deepseed.runtime.host import refined

    _fit({"--why": why, "--kernels": kernels, "--html": html, "--json": as_json, "--cuda-graphs": cuda_graphs, "--codegen": codegen, "--gpu": gpu, "--measure": measure})
    asked = codegen
    codegen = "auto" if codegen is None else codegen
    known(codegen)
    codegen = AUTO if codegen == "auto" else codegen
    if kernels and codegen == PYTHON:
        raise UsageError("codegen='python' computes no groups: it calls torch once an op\n  fix: --codegen cpp, inductor, triton or auto")
    if gpu:
        from deepseed.assembled import check_targets

        check_targets(asked, gpu)
    if measure:
        from deepseed.timed import device_of

        device = device_of(codegen)
    p, said, ranks, seconds = captured(target, plan, world_size, optimizer, clip)
    of = machine_of(machine, ranks.ranks)
    if why is not None:
        from deepseed.why import why as answer

        typer.echo(answer(pipeline.run(p, {}, pipeline.PIPELINE[:1], check=False)[-1].program, program_mesh(p, said, ranks), said.stage, why))
        return
    done = passed(p, said, ranks, seconds, list(pipeline.SHARED), check=False, machine=of if machine else None, kernels=kernels, products=PRODUCTS.get(codegen, ""))
    if kernels:
        from deepseed.explain_kernels import explain_kernels
        from deepseed.kernels import traffic

        report = explain_kernels(done[-1].program, pipeline.BY_NAME["group_kernels"](done[-2].program), traffic(codegen))
        if gpu:
            from deepseed.assembled import assembled

            report = assembled(report, gpu)
        if measure:
            from deepseed.asked import tell
            from deepseed.timed import machine_for, timed

            report = timed(report, codegen, of if machine else machine_for(device, tell), device, tell)
        return typer.echo(json.dumps(report.to_json(), indent=1) if as_json else str(report))
    ranks = refined(ranks, done[-1].program.mesh)
    graphs = None
    if cuda_graphs:
        from deepseed.graphs import refusal, told

        graphs = told((), refusal(done[-1].program, collectives=True))
    found = count(done[-1].program, seconds={each.name: each.seconds for each in done}, zero=said.stage, ranks=ranks, machine=of, graphs=graphs)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    if html is not None:
        from deepseed.view import page, view

        html.write_text(page(view(done[-1].program, found, ranks=ranks, title=target, plan=plan, machine=of, budget=said.budget)))
        return typer.echo(f"wrote {html} ({html.stat().st_size / 1024:.0f} KiB): open it in a browser")
    typer.echo(str(found))
    name = next((w.key for w in found.weights if w.use), found.weights[0].key if found.weights else "NODE").replace("*", "0")
    typer.echo(f"\nnext: deepseed explain '{target}' --plan {plan}{f' --world-size {world_size}' if world_size else ''} --why {name}")


@_friendly
def plan(text: Annotated[str, typer.Argument(metavar="PLAN")], world_size: RanksOption = None) -> None:
    """Print the mesh of a plan and what it means."""
    from deepseed.plan import parse_plan
    from deepseed.plan_text import meaning

    parsed = parse_plan(text)
    typer.echo("\n".join(meaning(parsed, parsed.resolve(world_size), parsed.mesh(world_size))))


# helpers -------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> Program:
    from deepseed.ir.text import parse

    return parse(sys.stdin.read() if str(file) == "-" else file.read_text())


# Of explain: options of which each asks for another answer, and those that say more of a kernel.
_ONE_OF = (("--why", "--kernels"), ("--why", "--html"), ("--why", "--json"), ("--why", "--cuda-graphs"), ("--kernels", "--html"), ("--kernels", "--cuda-graphs"), ("--html", "--json"))
_OF_KERNELS = {"--codegen": "it is the back end whose kernels are counted", "--gpu": "it compiles the kernels", "--measure": "it runs the kernels"}


def _fit(options: Mapping[str, object]) -> None:
    """Raises UsageError where an option of explain would not be heard."""
    given = {name for name, value in options.items() if value not in (None, False, [])}
    for one, other in _ONE_OF:
        if {one, other} <= given:
            raise UsageError(f"{one} does not go with {other}: each asks for an answer of its own\n  fix: leave {one} or {other} out")
    for name, what in _OF_KERNELS.items():
        if name in given and "--kernels" not in given:
            raise UsageError(f"{name} does not go without --kernels: {what}\n  fix: add --kernels, or leave {name} out")


def _nearest(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
