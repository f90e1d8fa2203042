"""Counters and histograms as Prometheus reads them, under the names that vLLM has. Written by one thread, read by any: a figure may lag, none is torn."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from time import monotonic

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
REQUESTS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # seconds of parts of one
OF_A_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), list(self.counts), strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.sum}"
        yield f"{name}_count{{{labels}}} {total}"


class Metrics:
    def __init__(self, model: str) -> None:
        self.labels = 'model_name="' + model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '",engine="0"'
        self.began = monotonic()
        self.running = self.waiting = 0
        self.cache = 0.0
        self.prompt_tokens = self.generation_tokens = self.prefix_queries = self.prefix_hits = self.steps = self.preemptions = 0
        self.computed = self.drafts = self.drafted = self.accepted = 0
        self.success: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()  # by status
        self.aborted = 0
        self.first = Histogram(SECONDS)
        self.between = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.queue, self.prefill, self.decode, self.inference = (Histogram(REQUESTS) for _ in range(4))
        self.a_token = Histogram(SECONDS)
        self.of_a_step = Histogram(OF_A_STEP)
        self.longest = Histogram(TOKENS)
        self.prompt_lengths = Histogram(TOKENS)
        self.output_lengths = Histogram(TOKENS)

    def text(self, several: Sequence[tuple[str, int]] = ()) -> str:
        """The exposition format, version 0.0.4. ``several``: gauges of replicas."""
        out: list[str] = []

        def say(name: str, kind: str, help_: str, lines: Sequence[str]) -> None:
            out.extend((f"# HELP vllm:{name} {help_}", f"# TYPE vllm:{name} {kind}", *(f"vllm:{line}" for line in lines)))

        def one(name: str, kind: str, help_: str, value: float) -> None:
            say(name, kind, help_, [f"{name}{{{self.labels}}} {value}"])

        def histogram(name: str, help_: str, of: Histogram) -> None:
            say(name, "histogram", help_, list(of.lines(name, self.labels)))

        one("num_requests_running", "gauge", "Sequences whose steps are computed.", self.running)
        one("num_requests_waiting", "gauge", "Sequences that wait for room.", self.waiting)
        one("kv_cache_usage_perc", "gauge", "Share of the cache's blocks that are held, 1 is all.", self.cache)
        one("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens)
        one("generation_tokens_total", "counter", "Tokens of outputs.", self.generation_tokens)
        one("prefix_cache_queries_total", "counter", "Tokens of prompts that were looked for in the cache.", self.prefix_queries)
        one("prefix_cache_hits_total", "counter", "Tokens of prompts that the cache had.", self.prefix_hits)
        one("num_preemptions_total", "counter", "Sequences that gave up their blocks to an older one.", self.preemptions)
        one("spec_decode_num_drafts_total", "counter", "Drafts that steps tried.", self.drafts)
        one("spec_decode_num_draft_tokens_total", "counter", "Tokens of drafts.", self.drafted)
        one("spec_decode_num_accepted_tokens_total", "counter", "Tokens of drafts that were right.", self.accepted)
        say("request_success_total", "counter", "Outputs that ended, by reason.", [f'request_success_total{{{self.labels},finished_reason="{r}"}} {self.success[r]}' for r in ("stop", "length")] + [f'request_success_total{{{self.labels},finished_reason="abort"}} {self.aborted}'])
        histogram("time_to_first_token_seconds", "From arrival to the first token.", self.first)
        histogram("inter_token_latency_seconds", "Between two tokens of an output.", self.between)
        histogram("e2e_request_latency_seconds", "From arrival to the last token.", self.whole)
        histogram("request_queue_time_seconds", "From arrival to the first step.", self.queue)
        histogram("request_prefill_time_seconds", "From the first step to the first token.", self.prefill)
        histogram("request_decode_time_seconds", "From the first token to the last.", self.decode)
        histogram("request_inference_time_seconds", "From the first step to the last token.", self.inference)
        histogram("request_time_per_output_token_seconds", "From the first token to the last, over the tokens after the first.", self.a_token)
        histogram("iteration_tokens_total", "Tokens that a step computed.", self.of_a_step)
        histogram("request_max_num_generation_tokens", "Tokens of the longest output of a prompt.", self.longest)
        histogram("request_prompt_tokens", "Tokens of a prompt.", self.prompt_lengths)
        histogram("request_generation_tokens", "Tokens of an output.", self.output_lengths)
        out.extend(("# HELP deepseed:requests_refused_total Requests answered by an error, by status.", "# TYPE deepseed:requests_refused_total counter"))
        out.extend(f'deepseed:requests_refused_total{{{self.labels},status="{status}"}} {count}' for status, count in sorted(self.refused.items()))
        for name, value in several:
            out.extend((f"# TYPE deepseed:{name} gauge", f"deepseed:{name}{{{self.labels}}} {value}"))
        return "\n".join(out) + "\n"

    def status(self) -> dict[str, float]:
        """What the page shows. ``time`` is the server's clock, so that rates are differences of two answers."""
        return {
            "time": monotonic(), "uptime": monotonic() - self.began, "running": self.running, "waiting": self.waiting, "cache": self.cache, "steps": self.steps, "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens, "prefix_hits": self.prefix_hits, "preemptions": self.preemptions, "finished": self.success.total(), "aborted": self.aborted, "refused": self.refused.total(),
        }  # fmt: skip
