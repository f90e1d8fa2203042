"""The comparison with the peers: engines that live together take turns, sleep in between, and a failure of one is not one of all."""

import json
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import bench_peers
import turns

TINY = {"model": "llama", "dtype": "fp32", "hidden": 32, "layers": 1, "vocab": 64, "seq": 8, "batch": 1, "ranks": 2, "rounds": 2, "steps": 2, "warmup": 2, "accumulation": 1, "threads": 1,
        "fused": True, "malloc": False, "timeout": 300, "deepspeed_python": sys.executable}  # fmt: skip


@pytest.mark.turn
def test_engines_live_together_and_one_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 1)
    found = turns.alternate(Namespace(**TINY), ["ddp", "nosuch", "deepseed-zero1"], lambda engine: tmp_path / engine, after=lambda engine: engine.ask("parts"))
    assert re.match(r"nosuch: rank [01] left with 1\n", found["nosuch"]["failed"]) and "KeyError: 'nosuch'" in found["nosuch"]["failed"]
    one, other = (turns.summary(Namespace(**TINY), e, found[e]) for e in ("ddp", "deepseed-zero1"))
    for s in (one, other):
        assert len(s["cpu_s_steps"]) == 4 and len(s["losses"]) == 6 and s["ranks"] == 2 and s["peak_rss_mb"] > 100
        assert s["first_s"] > 0 and s["set_aside"] == 0
        assert s["idle"] < 0.05
    assert all(len(r["pace"]) == 4 and min(r["pace"]) > 0 for e in ("ddp", "deepseed-zero1") for r in found[e]["ranks"])
    assert max(abs(x - y) for x, y in zip(one["losses"], other["losses"], strict=True)) < 1e-5  # float32
    assert one["cold_s"] is None and other["cold_s"] > 0
    assert (one["codegen"], other["codegen"]) == (None, "python")
    parts = found["ddp"]["after"][0]
    assert 0 < parts["products"] < parts["cpu"] and 0 < parts["gloo"] < parts["cpu"]


def test_compiled_beforehand_no_cold_step_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = Namespace(**TINY | {"ranks": 1, "rounds": 0})
    assert turns.alternate(a, ["deepseed-single"], lambda engine: tmp_path) == {} and "caches empty" in capsys.readouterr().err
    assert turns.alternate(a, ["deepseed-single"], lambda engine: tmp_path) == {} and capsys.readouterr().err == ""
    a.rounds = 1
    found = turns.alternate(a, ["deepseed-single"], lambda engine: tmp_path)["deepseed-single"]
    assert found["cold"] is None and "caches empty" not in capsys.readouterr().err


def test_a_rank_that_dies_between_two_steps_is_named(tmp_path: Path) -> None:
    running = turns.Running(Namespace(**TINY), "ddp", tmp_path / "engine", None)
    running.warm_up(1)
    os.kill(running.pids[1], signal.SIGKILL)
    with pytest.raises(turns.Failed, match=r"ddp: rank 1 left with -9"):
        while True:
            running.step(True)
    running.leave()


def fake(monkeypatch: pytest.MonkeyPatch, asked: list[str], pace: Callable[[int, int], float], fails: int = 0) -> None:
    """Engines of two ranks that answer at once: the number of the question as seconds, and ``pace(question, rank)``."""

    class Fake(turns.Running):
        def __init__(self, a: Namespace, engine: str, *_: Any) -> None:
            self.engine, self.was_cold, self.cold_file, self.what, self.ranks = engine, False, None, engine, []

        def _answers(self) -> list[Any]:
            return [{"setup": 0.0} for _ in range(2)]

        def ask(self, word: str) -> list[Any]:
            asked.append(self.engine)
            if len(asked) == fails:
                raise turns.Failed(f"{self.engine}: so it is")
            return [{"cpu": len(asked), "wall": 1.0, "pace": pace(len(asked), r), "loss": 0.0, "rss": 0.0, "idle": 0.0} for r in range(2)]

        def leave(self) -> None:
            pass

    monkeypatch.setattr(turns, "Running", Fake)


def test_turns_alternate_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    fake(monkeypatch, asked, lambda question, rank: 100.0, fails=8)
    found = turns.alternate(Namespace(**TINY | {"rounds": 3, "steps": 1, "warmup": 1}), ["a", "b", "c"])
    assert "".join(asked) == "abcabccbaac"
    assert found["b"] == {"failed": "b: so it is"} and found["a"]["ranks"][0]["cpu"] == [4, 9, 10]


def test_steps_on_a_disturbed_core_are_set_aside_and_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    slow = {4, 7, 8, 12}  # once a, three times b
    fake(monkeypatch, asked, lambda question, rank: 84.0 if question in slow and rank else 100.0 - question % 2)
    a = Namespace(**TINY | {"rounds": 5, "steps": 1, "warmup": 1})
    found = {e: (r["counted"], turns.by_step(r, "cpu"), turns.by_step(r, "losses")) for e, r in turns.alternate(a, ["a", "b"]).items()}
    assert "".join(asked) == "ab" + "abba" * 4  # eight turns, until b has five steps that count
    questions = {e: [n + 1 for n, x in enumerate(asked) if x == e][1:] for e in "ab"}
    for e, (counted, cpu, losses) in found.items():
        assert counted == [q not in slow for q in questions[e]] and cpu == [q for q in questions[e] if q not in slow] and len(losses) == 9


def test_on_a_machine_that_is_always_disturbed_all_steps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    fake(monkeypatch, asked, lambda question, rank: 100.0 if question == 3 else 60.0)
    found = turns.alternate(Namespace(**TINY | {"rounds": 5, "steps": 1, "warmup": 1}), ["a", "b"])
    assert found["a"]["disturbed"] == 5 * turns.PATIENCE - 1 and found["b"]["disturbed"] == 5 * turns.PATIENCE
    assert len(asked) == 2 + 2 * 5 * turns.PATIENCE and all(len(turns.by_step(r, "cpu")) == 5 * turns.PATIENCE for r in found.values())


def test_the_report_says_what_was_disturbed() -> None:
    each = {"codegen": None, "cpu_s_steps": [1.0] * 5}
    assert bench_peers.aside({"ddp": {**each, "set_aside": 0, "disturbed": 0}}) == ""
    said = bench_peers.aside({"ddp": {**each, "set_aside": 2, "disturbed": 2}, "ddp-zero1": {**each, "set_aside": 0, "disturbed": 4}})
    assert said == " Steps on cores that others used, set aside where not said otherwise: DDP 2 of 7; DDP, ZeroRedundancyOptimizer 4 of 5, which count."


def record(cpu: float, rss: float = 500.0, cold: float | None = 9.0, loss: float = 1.0) -> dict[str, Any]:
    rank = {"setup": 1.0, "first": 2.0, "cpu": [cpu] * 7, "wall": [cpu] * 7, "losses": [loss] * 9, "rss": rss, "rss_model": 100.0, "parameters": 7_000_000, "idle": 0.0, "codegen": "cpp", "versions": {}}
    return {"ranks": [rank, rank], "cold": cold}


def test_report_takes_the_last_line_of_a_class(tmp_path: Path) -> None:
    name = "Llama 7M fp32 x1"
    keep = tmp_path / "peers.jsonl"
    lines = [
        {"selection": name, "class": "zero1", "engines": {"ddp-zero1": record(9.0)}},
        {"selection": name, "class": "zero1", "engines": {"ddp-zero1": record(2.0), "ddp-zero1+compile": record(1.0, loss=1.001), "deepspeed-zero1": {"failed": "deepspeed-zero1: rank 0 left with 1\nlog"},
                                                          "deepseed-zero1": record(1.0), "deepseed-zero1:auto": record(1.25, rss=501.0)}},
        {"selection": name, "engine": "ddp-zero1", "cpu": 2.0, "parts": {"cpu": 2.1, "products": 1.0, "gloo": 0.25, "attention": 0.1}},
    ]  # fmt: skip
    keep.write_text("".join(json.dumps(line) + "\n" for line in lines))
    a = Namespace(rounds=7, deepspeed_python=sys.executable)
    docs = tmp_path / "docs"
    (docs / "img").mkdir(parents=True)
    (docs / "performance.md").write_text(f"before\n{bench_peers.BEGIN}\nbefore it\n{bench_peers.END}\nafter\n")
    bench_peers.write(keep, a, docs)
    text = (docs / "performance.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "before it" not in text
    assert f"| {name} | - / - | - / - | 2.00 / 1.60 | 1.00 / **0.80** |" in text
    assert f"| {name} | - / - | 1.00 / 1.00 | - / - | - / - | - / - |" in text
    assert f"| {name} | DDP, ZeroRedundancyOptimizer | 2.0000 | 1.0000 | 0.2500 | 62% | 0.1000 | 1.60 |" in text
    assert "| zero1 | DeepSeed zero1, auto (cpp) | 1.2500 | 1.250-1.250 | 819 | 501 | 9.0, 3.0 | 1.60, 0.80 |" in text and "losses agree to 1e-03" in text
    assert "best compiled peer" in (docs / "img" / "peers.svg").read_text()
    assert bench_peers.failures(keep) == [f"{name}, deepspeed-zero1: rank 0 left with 1"]
    assert bench_peers.shares(bench_peers.gathered(keep, a)[name], "zero1")["deepseed-zero1:auto"] == {"eager": 1.6, "compiled": 0.8, "memory": 501 / 500}
    apart: Any = {"ddp": {"losses": [1.0, 2.0]}, "fsdp2-zero3": {"losses": [1.0, 3.0]}, "deepseed-zero3": {"losses": [1.0, 2.75]}, "deepseed-zero0": {"losses": [1.0, 2.0]}}
    assert bench_peers.off(apart) == 0.25 and bench_peers.spread(apart) == 1.0
    assert bench_peers.off({**apart, "deepseed-zero1": {"losses": [1.0, float("nan")]}}) == float("inf")


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, asked = tmp_path / "peers.jsonl", []
    name, big = "Llama 7M bf16 x1", "GPT-2 60M fp32 x4"
    keep.write_text(json.dumps({"selection": name, "class": "zero0", "engines": {}}) + "\n" + json.dumps({"selection": name, "engine": "ddp", "cpu": 1.0, "parts": {}}) + "\n")
    monkeypatch.setattr(bench_peers, "alternate", lambda given, engines, kept: asked.append((given.hidden, given.dtype, given.accumulation, tuple(engines), kept(engines[0]).relative_to(tmp_path.resolve()).as_posix())) or {})
    a = Namespace(only=[name, big], classes=["zero0", "zero1"], engines=["ddp", "deepseed-zero0", "deepseed-zero1:inductor"], rounds=7, deepspeed_python=sys.executable)
    bench_peers.run(a, keep)
    assert asked == [(256, "bf16", 1, ("deepseed-zero1:inductor",), "peers-compiled/Llama-7M-bf16-x1/deepseed-zero1:inductor"), (768, "fp32", 4, ("ddp", "deepseed-zero0"), "peers-compiled/GPT-2-60M-fp32/ddp")]
    bench_peers.run(a, keep)
    assert len(asked) == 2
