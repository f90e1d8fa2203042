"""How fast are step.save and step.load beside torch.distributed.checkpoint alone? Two gloo ranks, 500 MB of parameters and Adam's state, by turns.

    python tests/bench/bench_checkpoint.py                       # zero3, 500 MB
    python tests/bench/bench_checkpoint.py --plan zero1 --rounds 9 --gate

Both write the same DTensors into a new folder and make every file last (fsync); both read files that the system has in its cache (unless
``--cold``), into the tensors that are there. DeepSeed takes and checks a sha256 of every byte on the way, and overwrites nothing before every rank has all of it; DCP checks nothing and
reads into place. Times are medians, of the clock that all ranks share and of their CPU together; memory is what a rank has at the most beyond what it
had before: resident, and allocated (by PyTorch and by Python; in a round of its own that is not timed), as a share of what the rank stores.
``--gate`` fails below 0.9 times DCP's speed, or above one extra shard.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloo.launch import ranks
from gloo.saving import by_turns

WALL, CPU, RESIDENT, COUNTED = range(4)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--plan", default="zero3")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--megabytes", type=int, default=500)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--folder", default=None, help="where to write; a temporary folder if not said")
    p.add_argument("--trace", default="", help="a folder for a cProfile of DeepSeed's second round")
    p.add_argument("--cold", action="store_true", help="load files that are not in the system's cache")
    p.add_argument("--gate", action="store_true", help="fail where it is slower or larger than promised")
    said = p.parse_args()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        found = ranks(said.ranks, by_turns, said.plan, said.megabytes * 10**6, said.rounds, folder, said.trace, said.cold)
    stored = max(rank["stored"] for rank in found)
    print(f"{said.plan} on {said.ranks} ranks: {stored / 1e6:.0f} MB a rank; {said.rounds} rounds by turns, medians")
    print("             wall ours   DCP    speed      CPU ours   DCP      resident ours   DCP    allocated ours   DCP   (of what a rank stores)")
    bad = False
    for what in ("save", "load"):
        wall = {who: [row[WALL] for row in found[0][what][who][:-1]] for who in ("ours", "dcp")}
        cpu = {who: median(sum(rank[what][who][n][CPU] for rank in found) for n in range(said.rounds)) for who in ("ours", "dcp")}
        resident, counted = ({who: max(median(r[i] for r in rank[what][who][some]) for rank in found) / stored for who in ("ours", "dcp")} for i, some in ((RESIDENT, slice(-1)), (COUNTED, slice(-1, None))))
        took = {who: median(times) for who, times in wall.items()}
        speed = took["dcp"] / took["ours"]
        pairs = median(b / a for a, b in zip(wall["ours"], wall["dcp"], strict=True))
        print(
            f"  {what}     {took['ours']:7.2f} s {took['dcp']:6.2f} s {speed:6.2f}x {cpu['ours']:9.2f} s {cpu['dcp']:6.2f} s {resident['ours']:11.2f} {resident['dcp']:9.2f}"
            f" {counted['ours']:13.2f} {counted['dcp']:9.2f}     (median of the rounds' ratios {pairs:.2f}x)"
        )
        bad |= max(speed, pairs) < 0.9 or counted["ours"] > 1.1  # what a rank stores once more, and a buffer of 1 MiB for each of four boxes
    return int(said.gate and bad)


if __name__ == "__main__":
    sys.exit(main())
