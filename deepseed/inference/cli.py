"""``deepseed generate MODEL``: complete prompts from the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepseed.friendly import UsageError, friendly

if TYPE_CHECKING:
    from deepseed.inference.outputs import Completion
    from deepseed.inference.prompts import Prompt
    from deepseed.inference.sampling import SamplingParams


@friendly
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder that save_pretrained wrote, or a GGUF file")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="a text; may be given several times")] = None,
    prompt_ids: Annotated[list[str] | None, typer.Option("--prompt-ids", help="token ids joined by commas, as 5,17,3; may be given several times")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 32,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all")] = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="a text that ends the output; may be given several times")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on after the model's end token")] = False,
    plan: Annotated[str, typer.Option("--plan", help="such as tp1")] = "tp1",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16  [default: the files']")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="a checkpoint of a training, under any plan, whose values the model takes")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a prompt, one a line: text, token_ids, finish_reason")] = False,
) -> None:
    """Complete one or more prompts, all at once."""
    from deepseed.inference.sampling import SamplingParams
    from deepseed.on_ranks import on_ranks
    from deepseed.plan import parse_plan
    from deepseed.runtime.host import launched

    prompts: list[Prompt] = [*(prompt or ()), *map(_ids, prompt_ids or ())]
    if not prompts:
        raise UsageError("nothing to complete\n  fix: --prompt TEXT, or --prompt-ids 5,17,3")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or (), ignore_eos=ignore_eos)
    asked = (model, plan, dtype, weights, prompts, params)
    ranks = parse_plan(plan).mesh(None).ranks
    for done in on_ranks(_rank, ranks, *asked)[0] if ranks > 1 and not launched() else _complete(*asked):
        if as_json:
            typer.echo(json.dumps({"text": done.text, "token_ids": done.token_ids, "finish_reason": done.finish_reason, "prompt_token_ids": done.prompt_token_ids}))
        else:
            typer.echo(done.text or ",".join(map(str, done.token_ids)))


def _complete(model: str, plan: str, dtype: str | None, weights: str | None, prompts: list[Prompt], params: SamplingParams) -> list[Completion]:
    from deepseed.inference.engine import Engine

    return Engine(model, plan, dtype, weights=weights).generate(prompts, params)


def _rank(*asked: Any) -> list[Completion]:
    """What one of several processes completes."""
    from deepseed.runtime.distributed import start

    start()
    return _complete(*asked)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--prompt-ids {text!r} is no list of token ids\n  fix: whole numbers joined by commas, as 5,17,3") from None
