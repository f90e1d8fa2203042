"""How fast are step.save and step.load beside torch.distributed.checkpoint alone? Two gloo ranks, 500 MB of parameters and Adam's state, by turns.

    python tests/bench/bench_checkpoint.py                       # zero3, 500 MB
    python tests/bench/bench_checkpoint.py --plan zero1 --rounds 9 --gate
    python tests/bench/bench_checkpoint.py --asynchronous        # what a save that is written beside training costs the steps

Both write the same DTensors into a new folder and make every file last (fsync); both read files that the system has in its cache (unless
``--cold``), into the tensors that are there. DeepSeed takes and checks a crc32 of every byte, and overwrites nothing before every rank has found all of it whole; DCP checks nothing.
Times are medians, of the clock that all ranks share and of their CPU together; memory is what a rank has resident at the most beyond what it
had before, the pages of files that it looks at among it, as a share of what the rank stores.
``--no-checksum`` loads without DeepSeed's checksums, to see what they cost. ``--gate`` fails below 0.9 times DCP's speed, or above one extra shard.

``--asynchronous``: steps without and with a save under way, by turns, medians of rounds: of the step that starts one (the call returns when it has copied), of those that the
writing thread runs beside, and of all steps until it has written, as shares of one step; and the CPU time of the whole save, the thread's own included, which on
a machine whose cores all train is time that training lacks. ``--gate`` fails where a step, the first or a later one, is stalled by more than 10 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloo.launch import ranks
from gloo.saving import beside, by_turns

WALL, CPU, RESIDENT = range(3)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--plan", default="zero3")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--megabytes", type=int, default=500)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--folder", default=None, help="where to write; a temporary folder if not said")
    p.add_argument("--trace", default="", help="a folder for a cProfile of DeepSeed's second round")
    p.add_argument("--cold", action="store_true", help="load files that are not in the system's cache")
    p.add_argument("--no-checksum", action="store_true", help="load without DeepSeed's checksums")
    p.add_argument("--asynchronous", action="store_true", help="what an asynchronous save costs the steps")
    p.add_argument("--rows", type=int, default=1024, help="of the batch, with --asynchronous: how long a step is")
    p.add_argument("--steps", type=int, default=4, help="in each turn, with --asynchronous")
    p.add_argument("--gate", action="store_true", help="fail where it is slower or larger than promised")
    said = p.parse_args()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        if said.asynchronous:
            return stalls(ranks(said.ranks, beside, said.plan, said.megabytes * 10**6, said.rows, said.steps, said.rounds, folder), said.gate)
        found = ranks(said.ranks, by_turns, said.plan, said.megabytes * 10**6, said.rounds, folder, said.trace, said.cold, not said.no_checksum)
    stored = max(rank["stored"] for rank in found)
    print(f"{said.plan} on {said.ranks} ranks: {stored / 1e6:.0f} MB a rank; {said.rounds} rounds by turns, medians")
    print("             wall ours   DCP    speed      CPU ours   DCP      resident ours   DCP   (of what a rank stores)")
    bad = False
    for what in ("save", "load"):
        wall = {who: [row[WALL] for row in found[0][what][who]] for who in ("ours", "dcp")}
        cpu = {who: median(sum(rank[what][who][n][CPU] for rank in found) for n in range(said.rounds)) for who in ("ours", "dcp")}
        resident = {who: max(median(row[RESIDENT] for row in rank[what][who]) for rank in found) / stored for who in ("ours", "dcp")}
        took = {who: median(times) for who, times in wall.items()}
        speed = took["dcp"] / took["ours"]
        pairs = median(b / a for a, b in zip(wall["ours"], wall["dcp"], strict=True))
        print(
            f"  {what}     {took['ours']:7.2f} s {took['dcp']:6.2f} s {speed:6.2f}x {cpu['ours']:9.2f} s {cpu['dcp']:6.2f} s {resident['ours']:11.2f} {resident['dcp']:9.2f}"
            f"     (median of the rounds' ratios {pairs:.2f}x)"
        )
        bad |= max(speed, pairs) < 0.9 or resident["ours"] > 1.1
    return int(said.gate and bad)


def stalls(found: list[list[dict[str, Any]]], gate: bool) -> int:
    rounds = list(zip(*found, strict=True))
    step = [median(wall for rank in each for wall, _ in rank["plain"]) for each in rounds]
    call = [max(rank["call"][WALL] for rank in each) / one for each, one in zip(rounds, step, strict=True)]
    later = [[wall / one for rank in each for wall, _ in rank["saving"][: rank["met"]]] for each, one in zip(rounds, step, strict=True)]
    most = [max(sum(wall for wall, _ in [rank["call"], *rank["saving"]]) - sum(wall for wall, _ in rank["plain"]) for rank in each) / one for each, one in zip(rounds, step, strict=True)]
    cpu = [[sum(cpu for _, cpu in rank["plain"]) for rank in each] for each in rounds]
    more = [[sum(cpu for _, cpu in [rank["call"], *rank["saving"]]) + rank["wait"] for rank in each] for each in rounds]
    own = median(sum(b) - sum(a) for a, b in zip(cpu, more, strict=True)) / len(found)
    each_cpu = median(sum(a) for a in cpu) / len(found) / len(rounds[0][0]["plain"])
    beside = median(x for each in later for x in each) - 1
    print(f"{rounds[0][0]['size'] / 1e6:.0f} MB a rank are copied; a step takes {median(step):.2f} s, {each_cpu:.2f} s of CPU a rank; {len(rounds)} rounds of {len(rounds[0][0]['plain'])} steps, medians")
    print(f"  the step that starts the save      {median(call):+7.1%} of a step ({median(a * b for a, b in zip(call, step, strict=True)):.3f} s; CPU {median(max(r['call'][CPU] for r in each) for each in rounds):.3f} s a rank)")
    print(f"  a step beside the writing thread   {beside:+7.1%} ({median(rank['met'] for each in rounds for rank in each):.0f} steps, {median(max(r['wrote'] for r in each) for each in rounds):.2f} s)")
    print(f"  all steps of a turn together       {median(most):+7.1%} of one step, {median(most) / len(rounds[0][0]['plain']):+.1%} of each")
    print(f"  CPU of the save, thread included   {own / each_cpu:+7.1%} of one step's ({own:.3f} s a rank)")
    return int(gate and max(median(call), beside) > 0.1)


if __name__ == "__main__":
    sys.exit(main())
