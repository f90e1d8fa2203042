"""``deepseed serve MODEL`` and ``deepseed bench serve``."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from deepseed.friendly import UsageError, friendly

bench = typer.Typer(no_args_is_help=True, help="Measure.")


@friendly
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder that save_pretrained wrote, with its tokenizer")],
    plan: Annotated[str, typer.Option("--plan", help="such as tp1; dp2: two replicas, each on ranks of its own in dp2+tp2")] = "tp1",
    host: Annotated[str, typer.Option(help="0.0.0.0: every interface")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    name: Annotated[str | None, typer.Option("--served-model-name", help="what requests call the model  [default: the folder's name]")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="DEEPSEED_API_KEY", help="what requests to /v1 must carry")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="outputs that may wait; beyond them the answer is 429")] = 256,
    max_body: Annotated[str, typer.Option(help="bytes of a request")] = "4MiB",
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds of a request, from its first byte to the last of the answer")] = 600.0,
    body_timeout: Annotated[float, typer.Option(min=0.001, help="of these, for the request itself to come")] = 30.0,
    max_unread: Annotated[str, typer.Option(help="bytes of answers that clients have not read, all together; beyond them who has left the most is cut off")] = "64MiB",
    drain: Annotated[float, typer.Option(min=0, help="seconds that requests have to end after SIGTERM")] = 60.0,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16  [default: the files']")] = None,
    cache: Annotated[str | None, typer.Option(help="bytes for keys and values, as 2GiB")] = None,
    budget: Annotated[int, typer.Option(min=1, help="tokens of a step")] = 512,
    sequences: Annotated[int, typer.Option(min=1, help="outputs of a step")] = 64,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens of prompt and output together")] = None,
    speculative: Annotated[bool, typer.Option("--speculative", help="try tokens that followed the same words before, beside the next one: fewer steps where a text repeats itself or its prompt, the same output")] = False,
    draft: Annotated[int, typer.Option(min=1, help="with --speculative: at most so many tokens at a time")] = 8,
    quantize: Annotated[str | None, typer.Option(help="int8 or fp8: the matrices of products in eight bits")] = None,
    log_level: Annotated[str, typer.Option(help="of uvicorn: debug, info, warning, error")] = "warning",
) -> None:
    """Serve a model as OpenAI's API does: /v1/completions, /v1/chat/completions, /v1/models; /health, /metrics and a page at /."""
    try:
        import_module("deepseed.serve.run")
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise UsageError(f"deepseed serve needs {error.name}, which is not installed\n  fix: pip install 'deepseed[serve]'") from None
    from deepseed.serve import ranks

    if log_level not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--log-level {log_level!r} is unknown\n  fix: debug, info, warning or error")
    engine = {"cache": cache and _bytes("--cache", cache), "budget": budget, "sequences": sequences, "max_length": max_length, "speculative": "lookup" if speculative else None, "draft": draft, "quantize": quantize}
    limits = {"api_key": api_key, "queue": max_queue, "body": _bytes("--max-body", max_body), "timeout": timeout, "body_timeout": body_timeout, "unread": _bytes("--max-unread", max_unread), "drain": drain, "log_level": log_level}
    raise typer.Exit(ranks.serve(ranks.Asked(model, plan, dtype, engine, name or Path(model).resolve().name, host, port, limits)))


@bench.command("serve")
@friendly
def bench_serve(
    base_url: Annotated[str, typer.Option("--base-url")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="[default: the server's]")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="DEEPSEED_API_KEY")] = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 100,
    request_rate: Annotated[float, typer.Option(help="requests a second, Poisson arrivals; inf: all at once")] = float("inf"),
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="requests at a time at most")] = None,
    input_len: Annotated[int, typer.Option("--random-input-len", min=1, help="tokens of a prompt")] = 128,
    output_len: Annotated[int, typer.Option("--random-output-len", min=1, help="tokens of an output")] = 64,
    prefix_len: Annotated[int, typer.Option("--random-prefix-len", min=0, help="tokens that all prompts begin with, beside")] = 0,
    goodput: Annotated[list[str] | None, typer.Option(help="ttft:MS, tpot:MS or e2el:MS that a request must keep to count; may be given several times")] = None,
    seed: int = 0,
    vocabulary: Annotated[int | None, typer.Option("--vocab-size", help="prompts are tokens below it  [default: the server's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, with each request's figures")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the JSON there too")] = None,
) -> None:
    """Send random prompts to a server at random times, and say how long tokens took: vLLM's fields and meanings. Exit code 1 where a request failed."""
    from deepseed.serve.bench import Load, measure, table

    load = Load(num_prompts, request_rate, max_concurrency, input_len, output_len, prefix_len, seed, goodput=_limits(goodput or []))
    if out is not None:
        out.open("a").close()  # better now than after the measurement
    found = measure(base_url, load, model, api_key, vocabulary)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))
    typer.echo(json.dumps(found, indent=1) if as_json else table(found))
    raise typer.Exit(1 if found["failed"] else 0)


def _bytes(option: str, said: str) -> int:
    from deepseed.ir.amounts import parse_bytes

    try:
        return parse_bytes(said)
    except ValueError as error:
        raise UsageError(f"{option}: {error}\n  fix: such as {option} 64MiB") from None


def _limits(said: list[str]) -> dict[str, float]:
    out = dict[str, float]()
    for word in said:
        what, _, limit = word.partition(":")
        try:
            out[{"ttft": "ttft", "tpot": "tpot", "e2el": "e2el"}[what]] = float(limit)
        except (KeyError, ValueError):
            raise UsageError(f"--goodput {word!r}\n  fix: ttft:MS, tpot:MS or e2el:MS, as ttft:200") from None
    return out
