"""``deepseed checkpoint ls | verify | import | export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deepseed.friendly import UsageError, friendly

app = typer.Typer(no_args_is_help=True, help="List checkpoints, check them, bring them here from elsewhere and back.")

DirArg = Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint, or a folder of checkpoints")]
JsonOption = Annotated[bool, typer.Option("--json", help="as JSON")]


@app.command("ls")
@friendly
def ls(folder: DirArg, as_json: JsonOption = False) -> None:
    """Say which checkpoints are there, from which step, and whether each is complete, by the sizes of its files."""
    from dataclasses import asdict

    from deepseed.importing.listing import listed

    found = listed(folder)
    if as_json:
        return typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    rows = [("tag", "step", "plan", "ranks", "bytes", "state")]
    rows += [(each.tag, _said(each.step), each.plan, _said(each.ranks), f"{each.bytes:,}", each.state + (", latest" if each.latest else "")) for each in found]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.rjust(w) if n in (1, 3, 4) else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip())
    for line in (line for each in found for line in each.why):
        typer.echo(f"  {line}")
    typer.echo(f"next: deepseed checkpoint verify {folder}")


@app.command("verify")
@friendly
def verify(folder: DirArg, as_json: JsonOption = False) -> None:
    """Read every byte and compare checksums. Exit code 1 where a file is missing, torn or damaged, or a checkpoint is partial; each is named."""
    from dataclasses import asdict

    from deepseed.importing.listing import listed

    found = listed(folder, read=True)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        for each in found:
            typer.echo(f"{each.tag}: {each.state}" + (f", {each.bytes:,} bytes" if each.state == "complete" else ""))
            for line in each.why:
                typer.echo(f"  {line}")
    raise typer.Exit(0 if all(each.state == "complete" for each in found) else 1)


@app.command("import")
@friendly
def bring(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a folder of DeepSpeed, torch.distributed.checkpoint or transformers, or a file of weights")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="the folder for the checkpoint")],
    format: Annotated[str, typer.Option(help="deepspeed, dcp, hf or auto")] = "auto",
    tag: Annotated[str | None, typer.Option(help="which folder in SOURCE  [default: what its file latest says]")] = None,
    optimizer: Annotated[str | None, typer.Option(help="whose state it is, where SOURCE does not say: AdamW, or module.Class; none leaves it out")] = None,
) -> None:
    """Make a checkpoint of ours of one that another program wrote; any plan loads it. Nothing that its files say is run."""
    from deepseed.importing import bring as convert

    found = convert(source, dest, format, optimizer, tag)
    total = sum(t.bytes for t in [*found.model.values(), *found.slots.values()])
    name = (found.optimizer or "").rpartition(".")[2]
    state = f", {len(found.slots)} of the state of {name} in {len(found.groups)} group{'s' if len(found.groups) != 1 else ''}" if found.groups else ", no optimizer state"
    typer.echo(f"{found.kind}, step {found.step}: {len(found.model)} tensors of the model{state}, {total:,} bytes")
    for note in found.notes:
        typer.echo(f"  {note}")
    typer.echo(f"next: step.load({str(dest)!r}{'' if found.groups else ', optimizer=False'})")


@app.command("export")
@friendly
def export(
    folder: DirArg,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="a folder; for torch a file")],
    to: Annotated[str, typer.Option(help="hf, torch or dcp")],
    dtype: Annotated[str | None, typer.Option(help="of the weights: float32, bfloat16, float16  [default: as they are]")] = None,
    config: Annotated[Path | None, typer.Option(help="for hf: a config.json, or its folder, which is copied")] = None,
    max_shard_size: Annotated[str, typer.Option(help="for hf: of a file")] = "5GB",
    tag: Annotated[str | None, typer.Option(help="which checkpoint in DIR  [default: what its file latest says]")] = None,
) -> None:
    """Write the weights (dcp: and the optimizer's state) as transformers, plain PyTorch or FSDP load them."""
    import torch

    from deepseed.importing.export import export as convert

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    known |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype is not None and dtype not in known:
        raise UsageError(f"--dtype {dtype}: not known\n  fix: one of {', '.join(known)}")
    found = convert(folder, dest, to, known[dtype] if dtype is not None else None, config, max_shard_size, tag)
    total = sum(t.bytes for t in found.model.values())
    typer.echo(f"wrote {len(found.model)} tensors of the model, {total:,} bytes, to {dest}")
    if to == "hf" and config is None:
        typer.echo("  there is no config.json in it: from_pretrained needs one (--config)")


def _said(value: int | None) -> str:
    return "-" if value is None else str(value)
