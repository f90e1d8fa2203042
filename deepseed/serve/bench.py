"""Poisson arrivals against a server: when tokens came, under vLLM's field names and with their meanings.

Prompts are random token ids and outputs have a fixed length, so two servers of one model do the same work. Times are those of the client, by the chunks
of the stream: the first with text is ``ttft``, ``tpot`` is the rest of the time over the rest of the tokens, ``itl`` the gaps, ``e2el`` all of it. Goodput counts requests that kept every limit.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy

from deepseed.friendly import UsageError


@dataclass(frozen=True)
class Load:
    num_prompts: int = 100
    request_rate: float = float("inf")
    max_concurrency: int | None = None
    input_len: int = 128
    output_len: int = 64
    prefix_len: int = 0
    seed: int = 0
    goodput: dict[str, float] = field(default_factory=dict)  # milliseconds by ttft, tpot, e2el

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise UsageError(f"a request rate of {self.request_rate:g} sends nothing\n  fix: above 0, or inf")

    def prompts(self, vocabulary: int) -> list[list[int]]:
        draw = random.Random(self.seed)
        prefix = [draw.randrange(vocabulary) for _ in range(self.prefix_len)]
        return [prefix + [draw.randrange(vocabulary) for _ in range(self.input_len)] for _ in range(self.num_prompts)]

    def arrivals(self) -> list[float]:
        """Seconds after the start; gaps of a Poisson process are exponential."""
        draw, at, out = random.Random(self.seed + 1), 0.0, list[float]()
        for _ in range(self.num_prompts):
            out.append(at)
            at += draw.expovariate(self.request_rate) if self.request_rate != float("inf") else 0.0
        return out


@dataclass
class Sent:
    """One request, as its client saw it. Seconds."""

    prompt_len: int
    output_len: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    start_time: float = 0.0
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


class Http:
    """As much of HTTP/1.1 as this needs, with little work of its own: one connection a request."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        at = urlsplit(base_url)
        if at.scheme not in ("http", "https") or not at.hostname:
            raise UsageError(f"--base-url {base_url!r}\n  fix: as http://127.0.0.1:8000")
        self.host, self.secure = at.hostname, at.scheme == "https"
        self.port = at.port or (443 if self.secure else 80)
        self.prefix = at.path.rstrip("/").removesuffix("/v1")
        self.headers = f"host: {at.netloc}\r\nconnection: close\r\n" + (f"authorization: Bearer {api_key}\r\n" if api_key else "")

    async def ask(self, method: str, path: str, body: bytes = b"", line: Any = None) -> tuple[int, bytes]:
        """Status and body; ``line`` is called with each line of the body as it comes."""
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=ssl.create_default_context() if self.secure else None, limit=1 << 24)
        try:
            kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
            writer.write(f"{method} {self.prefix}{path} HTTP/1.1\r\n{self.headers}{kind}\r\n".encode() + body)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status = int(head.split(" ", 2)[1])
            chunked = "transfer-encoding: chunked" in head.lower()
            whole, rest = b"", b""
            while True:
                if chunked:
                    size = int((await reader.readline()).split(b";")[0], 16)
                    part = (await reader.readexactly(size + 2))[:size]
                else:
                    part = await reader.read(1 << 16)
                if not part:
                    return status, whole
                if line is None or status != 200:
                    whole += part
                    continue
                *lines, rest = (rest + part).split(b"\n")
                for each in lines:
                    line(each)
        finally:
            writer.close()


async def _one(http: Http, model: str, prompt: list[int], load: Load, epoch: float) -> Sent:
    sent = Sent(len(prompt))
    asked = {"model": model, "prompt": prompt, "max_tokens": load.output_len, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, "logprobs": None}
    began = last = perf_counter()
    sent.start_time = began - epoch
    done = False

    def line(text: bytes) -> None:
        nonlocal last, done
        if not text.startswith(b"data: "):
            return
        if text[6:] == b"[DONE]":
            done = True
            return
        now, said = perf_counter(), json.loads(text[6:])
        if "error" in said:
            sent.error = str(said["error"].get("message", said["error"]))
        if said.get("choices"):
            if not sent.ttft:
                sent.ttft = now - began
            else:
                sent.itl.append(now - last)
            last = now
            sent.latency = now - began
        if said.get("usage"):
            sent.output_len = said["usage"]["completion_tokens"]

    try:
        status, body = await http.ask("POST", "/v1/completions", json.dumps(asked).encode(), line)
        if status != 200:
            sent.error = f"{status}: {body[:200].decode(errors='replace')}"
        elif not done and not sent.error:
            sent.error = "the stream ended early"
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        sent.error = f"{type(error).__name__}: {error}"
    return sent


async def _all(http: Http, model: str, vocabulary: int, load: Load) -> tuple[list[Sent], float]:
    places = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else None
    epoch = perf_counter()

    async def at(when: float, prompt: list[int]) -> Sent:
        await asyncio.sleep(max(0.0, epoch + when - perf_counter()))
        if places is None:
            return await _one(http, model, prompt, load, epoch)
        async with places:
            return await _one(http, model, prompt, load, epoch)

    sent = await asyncio.gather(*(at(w, p) for w, p in zip(load.arrivals(), load.prompts(vocabulary), strict=True)))
    return sent, perf_counter() - epoch


async def _measure(base_url: str, load: Load, model: str | None, api_key: str | None, vocabulary: int | None) -> dict[str, Any]:
    http = Http(base_url, api_key)
    try:
        status, body = await http.ask("GET", "/v1/models")
    except OSError as error:
        raise UsageError(f"{base_url} does not answer: {error}\n  fix: deepseed serve MODEL, or another --base-url") from None
    if status != 200:
        raise UsageError(f"{base_url}/v1/models answers {status}: {body[:200].decode(errors='replace')}")
    cards = {c["id"]: c for c in json.loads(body)["data"]}
    name = model or next(iter(cards))
    size = vocabulary or cards.get(name, {}).get("vocab_size")
    if size is None:
        raise UsageError(f"{base_url} does not say the size of its vocabulary\n  fix: --vocab-size N")
    sent, duration = await _all(http, name, size, load)
    return report(sent, duration, load, name)


def measure(base_url: str, load: Load, model: str | None = None, api_key: str | None = None, vocabulary: int | None = None) -> dict[str, Any]:
    return asyncio.run(_measure(base_url, load, model, api_key, vocabulary))


def report(sent: list[Sent], duration: float, load: Load, model: str) -> dict[str, Any]:
    """vLLM's result object."""
    good = [s for s in sent if not s.error]
    kept = [s for s in good if all({"ttft": s.ttft, "tpot": s.tpot, "e2el": s.latency}[what] * 1e3 <= limit for what, limit in load.goodput.items())]
    inputs, outputs = sum(s.prompt_len for s in good), sum(s.output_len for s in good)
    out: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"), "endpoint_type": "openai", "backend": "openai", "model_id": model, "tokenizer_id": model, "num_prompts": load.num_prompts,
        "request_rate": load.request_rate if load.request_rate != float("inf") else "inf", "burstiness": 1.0, "max_concurrency": load.max_concurrency, "duration": duration,
        "completed": len(good), "failed": len(sent) - len(good), "total_input_tokens": inputs, "total_output_tokens": outputs, "request_throughput": len(good) / duration,
        "request_goodput": len(kept) / duration if load.goodput else None, "output_throughput": outputs / duration, "total_token_throughput": (inputs + outputs) / duration,
    }  # fmt: skip
    out |= _peaks(good)
    series = {"ttft": [s.ttft for s in good], "tpot": [s.tpot for s in good if s.output_len > 1], "itl": [g for s in good for g in s.itl], "e2el": [s.latency for s in good]}
    for what, values in series.items():
        ms = numpy.array(values or [0.0]) * 1e3
        out |= {f"mean_{what}_ms": float(ms.mean()), f"median_{what}_ms": float(numpy.median(ms)), f"std_{what}_ms": float(ms.std())}
        out |= {f"p{p}_{what}_ms": float(numpy.percentile(ms, p)) for p in (50, 90, 99)}
    return out | {
        "input_lens": [s.prompt_len for s in sent], "output_lens": [s.output_len for s in sent], "ttfts": [s.ttft for s in sent], "itls": [s.itl for s in sent],
        "start_times": [s.start_time for s in sent], "errors": [s.error for s in sent],
    }  # fmt: skip


def _peaks(good: list[Sent]) -> dict[str, float]:
    """Of the seconds since the first request: the most tokens that came in one, and the most requests that were under way in one."""
    begin = min((s.start_time for s in good), default=0.0)
    came, under = Counter[int](), Counter[int]()
    for s in good:
        came.update(int(s.start_time - begin + at) for at in accumulate((s.ttft, *s.itl)))
        under.update(range(int(s.start_time - begin), int(s.start_time - begin + s.latency) + 1))
    return {"max_output_tokens_per_s": float(max(came.values(), default=0)), "max_concurrent_requests": max(under.values(), default=0)}


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['completed']} of {found['num_prompts']} requests in {found['duration']:.2f} s, {found['request_rate']} arriving a second" + (f", {found['failed']} failed" if found["failed"] else "")]
    good = f", goodput {found['request_goodput']:.2f}" if found["request_goodput"] is not None else ""
    lines.append(f"{found['request_throughput']:.2f} requests/s{good}; {found['output_throughput']:.1f} output tokens/s, {found['total_token_throughput']:.1f} with prompts")
    lines.append(f"{'ms':<6}" + "".join(f"{h:>10}" for h in ("mean", "p50", "p90", "p99")))
    for what in ("ttft", "tpot", "itl", "e2el"):
        lines.append(f"{what:<6}" + "".join(f"{found[f'{h}_{what}_ms']:>10.1f}" for h in ("mean", "p50", "p90", "p99")))
    lines += [f"failed: {e}" for e in sorted({e for e in found["errors"] if e})[:5]]
    return "\n".join(lines)
