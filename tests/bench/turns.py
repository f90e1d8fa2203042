"""Engines that are alive at the same time and take turns step by step: drift of a shared machine falls on all alike, and each starts once.

An engine is one process a rank (engines.py), forked from one that has imported what its family needs. It is started, steps through its warm-up and then waits, asleep, until it is asked for the
next step; engines start one after another, so that none compiles beside another. Each turn every engine does ``steps`` steps, in reversed order every other turn. This process imports no torch, so that children
do not inherit its peak memory.

On a machine whose cores others use too, the same step takes up to 1.7 times as long, for a minute or so. So each rank measures its core's pace, a product that is the same for all engines, before and behind
each step, and steps where that was below UNDISTURBED of the best of the run are set aside: by the core's pace alone, not by what the step took. More turns follow until every engine has as many steps as it should,
up to PATIENCE times as many; if one has fewer than FEWEST then (or than it should), all steps count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from select import select
from statistics import mean, median
from time import perf_counter, sleep
from typing import Any

CHILD = Path(__file__).with_name("engines.py")
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}
UNDISTURBED = 0.85  # of the best pace: on a core that others use it is 0.4 to 0.75
PATIENCE, FEWEST = 3, 5
AWAKE = 0.01  # of a core: an engine that takes more while it should sleep is told of
Rank = dict[str, Any]  # what one rank measured: setup, first, cpu, wall, pace, losses, rss, rss_model, parameters, versions, idle
Record = dict[str, Any]  # of one engine: "ranks" and "cold" (seconds of a first step with empty caches, where known); or "failed" with what it said last


class Failed(RuntimeError):
    """An engine has said its last: the message ends with the end of its log."""


def alone(engine: str) -> bool:
    """Whether one process trains all ranks' batches."""
    return engine.startswith(("eager", "deepseed-single"))


def compiles(engine: str) -> bool:
    return engine.startswith("deepseed") or engine.endswith("+compile")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", **more}


@cache
def importable(python: str, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True, env=environment(), check=False).returncode == 0


def installed(a: argparse.Namespace, engine: str) -> bool:
    ok = not engine.startswith("deepspeed") or importable(a.deepspeed_python, "import deepspeed")
    if not ok:
        print(f"left out: {engine} (not importable)", file=sys.stderr)
    return ok


class Mother:
    """The process of engines.py that has imported what a family of engines needs, and forks their ranks: seconds saved for each."""

    def __init__(self, python: str, family: str, threads: int, malloc: bool) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM)
        env = environment(OMP_NUM_THREADS=str(threads), **(MALLOC if malloc else {}))
        with theirs:
            self.process = subprocess.Popen([python, str(CHILD), family], env=env, stdin=theirs)

    def order(self, what: dict[str, Any], handles: Iterable[int] = ()) -> Any:
        try:
            socket.send_fds(self.socket, [json.dumps(what).encode()], list(handles))
            answer = self.socket.recv(1 << 16)
        except OSError:
            answer = b""
        if not answer:
            raise Failed(f"{self.process.args[-1]}: the imports of this family of engines failed")  # type: ignore[index]
        return json.loads(answer)


mother = cache(Mother)


class Running:
    """The live processes of one engine. ``kept``: the folder of what it compiles; without one the environment decides."""

    def __init__(self, a: argparse.Namespace, engine: str, folder: Path, kept: Path | None) -> None:
        self.engine, self.timeout = engine, a.timeout
        folder.mkdir()
        world = 1 if alone(engine) else a.ranks
        self.cold_file, self.what = kept / "cold.json" if kept else None, f"{engine} x{a.accumulation}"
        self.was_cold = bool(self.cold_file and not self.cold_file.exists())
        env = {}
        if kept:
            if self.was_cold:  # of a start that was not ended, perhaps
                shutil.rmtree(kept, ignore_errors=True)
            env = {"DEEPSEED_CACHE_DIR": str(kept / "deepseed"), "TORCHINDUCTOR_CACHE_DIR": str(kept / "torch")}
        family = next((f for f in ("deepspeed", "deepseed") if engine.startswith(f)), "torch")
        self.mother = mother(a.deepspeed_python if family == "deepspeed" else sys.executable, family, a.threads, a.malloc)
        self.sockets: list[socket.socket] = []
        self.pids: list[int] = []
        self.left: dict[int, int] = {}  # exit status of those that did
        self.logs = [folder / f"log{r}" for r in range(world)]
        self.heard = [b""] * world
        self.ranks: list[Rank] = []
        for r, path in enumerate(self.logs):
            if world > 1:  # as a launcher sets it; the group itself meets in a file, so that no port can be taken
                env |= {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
            ours, theirs = socket.socketpair()
            with theirs, path.open("w") as log:
                order = {"engine": engine, "rank": r, "world": world, "folder": str(folder), "settings": vars(a), "environment": env}
                self.pids.append(self.mother.order({"fork": order}, [theirs.fileno(), log.fileno()]))
            self.sockets.append(ours)

    def ask(self, word: str) -> list[Any]:
        for r, s in enumerate(self.sockets):
            try:
                s.sendall(f"{word}\n".encode())
            except OSError:
                raise self._failed(r) from None
        return self._answers()

    def step(self, measured: bool) -> None:
        for rank, said in zip(self.ranks, self.ask("step"), strict=True):
            rank["losses"].append(said["loss"])
            rank["rss"], rank["idle"] = said["rss"], said["idle"]
            rank.setdefault("first", said["wall"])
            if measured:
                rank["cpu"].append(said["cpu"])
                rank["wall"].append(said["wall"])
                rank["pace"].append(said["pace"])

    def warm_up(self, steps: int) -> None:
        self.ranks = [{**said, "cpu": [], "wall": [], "pace": [], "losses": []} for said in self._answers()]
        for _ in range(steps):
            self.step(False)

    def record(self) -> Record:
        cold = json.loads(self.cold_file.read_text()) if self.cold_file else {}
        return {"ranks": self.ranks, "cold": cold.get(self.what)}

    def note_cold(self, known: bool) -> None:
        """Everything is compiled. ``known``: whether how long it took is worth noting."""
        if self.cold_file:
            self.cold_file.parent.mkdir(parents=True, exist_ok=True)
            self.cold_file.write_text(json.dumps({self.what: first(self.ranks)} if known else {}))

    def leave(self) -> None:
        """What happens after the last measurement is no failure."""
        for pid, s in zip(self.pids, self.sockets, strict=True):
            s.close()
            if self._status(pid, 5) is None:
                os.kill(pid, signal.SIGKILL)
                self._status(pid, 5)

    def _answers(self) -> list[Any]:
        deadline, found = perf_counter() + self.timeout, {}
        while len(found) < len(self.sockets):
            ready, _, _ = select([s for r, s in enumerate(self.sockets) if r not in found], [], [], max(deadline - perf_counter(), 0))
            if not ready:
                raise self._failed(next(r for r in range(len(self.sockets)) if r not in found))
            for s in ready:
                r = self.sockets.index(s)
                try:
                    more = s.recv(1 << 16)
                except OSError:
                    more = b""
                if not more:
                    raise self._failed(r)
                line, end, rest = (self.heard[r] + more).partition(b"\n")
                self.heard[r] = rest if end else line
                if end:
                    found[r] = json.loads(line)
        return [found[r] for r in range(len(self.sockets))]

    def _status(self, pid: int, patience: float) -> int | None:
        deadline = perf_counter() + patience
        while pid not in self.left:
            status = self.mother.order({"wait": pid})
            if status is not None:
                self.left[pid] = status
            elif perf_counter() > deadline:
                return None
            else:
                sleep(0.02)
        return self.left[pid]

    def _failed(self, r: int) -> Failed:
        r = next((k for k, pid in enumerate(self.pids) if (self._status(pid, 0.2) or 0) < 0), r)  # what a signal ended is the cause of what others say
        status = self._status(self.pids[r], 2)
        cause = f"rank {r} was not done after {self.timeout:g} s" if status is None else f"rank {r} left with {status}"
        return Failed(f"{self.engine}: {cause}\n" + "\n".join(self.logs[r].read_text(errors="replace").splitlines()[-15:]))


def alternate(a: argparse.Namespace, engines: Iterable[str], kept: Callable[[str], Path] | None = None, after: Callable[[Running], Any] | None = None) -> dict[str, Record]:
    """Each engine's record. One that fails says so and the others go on. ``kept``: the folder of what an engine compiles; one that compiles and finds nothing there is started twice, cold, then warm.
    ``after``: what else is asked of an engine at the end, its record's "after". Without turns (``rounds`` 0) engines compile and leave."""
    found: dict[str, Record] = {}
    alive: dict[str, Running] = {}

    def go(what: Callable[[str], Any], engine: str) -> None:
        try:
            what(engine)
        except Failed as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            found[engine] = {"failed": str(error)}
            if engine in alive:
                alive.pop(engine).leave()

    def start(engine: str) -> None:
        where = [Path(folder, f"{len(alive) + len(found)}{word}") for word in ("cold", "")]
        began = perf_counter()
        home = kept(engine) if kept and compiles(engine) else None
        if not a.rounds and (home is None or (home / "cold.json").exists()):
            return
        running = alive[engine] = Running(a, engine, where[0], home)
        if running.was_cold:
            running.warm_up(min(a.warmup, 2))
            running.note_cold(a.rounds > 0)
            print(f"  {engine}: first step {first(running.ranks):.1f} s, caches empty", file=sys.stderr, flush=True)
            if not a.rounds:
                return
            running.leave()
            running = alive[engine] = Running(a, engine, where[1], home)
        running.warm_up(a.warmup)
        print(f"  {engine}: first step {first(running.ranks):.1f} s, {perf_counter() - began:.1f} s until warm", file=sys.stderr, flush=True)

    def turn(engine: str) -> None:
        for _ in range(a.steps):
            alive[engine].step(True)

    def end(engine: str) -> None:
        record = alive[engine].record()
        record["counted"], record["disturbed"] = counted[engine], kept_pace[engine].count(False)
        cpu, awake = by_step(record, "cpu"), max(r["idle"] for r in record["ranks"])
        noisy = f"; {awake:.1%} of a core while asleep" if awake > AWAKE else ""
        print(f"  {engine}: {median(cpu):.4f} CPU s/step, {min(cpu):.4f} to {max(cpu):.4f} in {len(cpu)} of {len(counted[engine])} steps, {record['disturbed']} disturbed{noisy}", file=sys.stderr, flush=True)
        found[engine] = {**record, "after": after(alive[engine])} if after else record

    with tempfile.TemporaryDirectory() as folder:
        try:
            for engine in engines:
                go(start, engine)
            for number in range(PATIENCE * a.rounds):
                if number >= a.rounds and all(sum(each) >= a.rounds * a.steps for each in undisturbed({e: running.ranks for e, running in alive.items()}).values()):
                    break
                for engine in list(alive) if number % 2 == 0 else list(alive)[::-1]:
                    go(turn, engine)
            kept_pace = undisturbed({e: running.ranks for e, running in alive.items()})
            few = any(sum(each) < min(FEWEST, a.rounds * a.steps) for each in kept_pace.values())
            counted = {e: [few or good for good in each] for e, each in kept_pace.items()}
            for engine in list(alive) if a.rounds else ():
                go(end, engine)
        finally:
            for running in alive.values():
                running.leave()
    return {e: found[e] for e in engines if e in found}


def first(ranks: Iterable[Rank]) -> float:
    """Seconds of setup and first step, of the slower rank."""
    return max(r["setup"] + r["first"] for r in ranks)


def undisturbed(engines: Mapping[str, Iterable[Rank]]) -> dict[str, list[bool]]:
    """Of each engine's steps: whether the cores of all ranks kept their pace."""
    paces = {e: [min(step) for step in zip(*(r["pace"] for r in ranks), strict=True)] for e, ranks in engines.items()}
    best = max((p for each in paces.values() for p in each), default=0.0)
    return {e: [p >= UNDISTURBED * best for p in each] for e, each in paces.items()}


def by_step(record: Record, key: str) -> list[float]:
    """``cpu`` or ``wall`` of each step that counts, ``losses`` of every step: the mean of the ranks."""
    steps = [mean(step) for step in zip(*(r[key] for r in record["ranks"]), strict=True)]
    return steps if key == "losses" else [x for x, counts in zip(steps, record.get("counted", [True] * len(steps)), strict=True) if counts]


def summary(a: argparse.Namespace, engine: str, record: Record) -> dict[str, Any]:
    """Medians over the steps that count."""
    cpu, wall, ranks = by_step(record, "cpu"), by_step(record, "wall"), record["ranks"]
    return {
        "engine": engine,
        "ranks": len(ranks),
        "cpu_s": median(cpu),
        "cpu_s_steps": cpu,
        "set_aside": len(ranks[0]["cpu"]) - len(cpu),
        "disturbed": record.get("disturbed", 0),
        "wall_s": median(wall),
        "tokens_per_s": a.ranks * a.batch * a.seq * a.accumulation / median(wall),
        "setup_s": max(r["setup"] for r in ranks),
        "first_step_s": max(r["first"] for r in ranks),
        "cold_s": record["cold"],
        "first_s": first(ranks),
        "peak_rss_mb": max(r["rss"] for r in ranks),
        "rss_over_model_mb": max(r["rss"] - r["rss_model"] for r in ranks),
        "idle": max(r["idle"] for r in ranks),
        "losses": by_step(record, "losses"),
        "parameters": ranks[0]["parameters"],
        "versions": ranks[0]["versions"],
        "codegen": ranks[0]["codegen"],
    }
