"""When each part of a program runs, for which microbatch, on which pipeline rank: an instruction list a rank, as data.

A looped program has parts. ``once.0`` runs before all loops; loop q (1, 2 ..) runs ``forward.q``, ``backward.q`` and, where weight
gradients wait for the bubble, ``weights.q``, each once for every microbatch; ``once.q`` runs when loop q has ended. An op stands in one part and
on one stage; a lane is what one pipeline rank runs, in order. Text of an instruction: ``F3`` is the forward of microbatch 3 in the last
loop, ``1:F3`` in loop 1, ``B3`` and ``W3`` backward and weights, ``once.0``; ``@5`` names the stage where it is not the lane's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("forward", "backward", "weights")
_LETTER = {"F": "forward", "B": "backward", "W": "weights"}


@dataclass(frozen=True)
class Instruction:
    """Run ``part`` ("once.q", "forward.q" ..) of ``stage`` for ``microbatch`` (0 where the part runs once)."""

    part: str
    stage: int = 0
    microbatch: int = 0

    @property
    def kind(self) -> str:
        return self.part.partition(".")[0]

    @property
    def loop(self) -> int:
        return loop_of(self.part)


@dataclass(frozen=True)
class Schedule:
    """``lanes[r]``: the instructions of pipeline rank r, which runs the stages r, r + p, r + 2 p .. of ``stages`` for p lanes."""

    name: str
    stages: int
    microbatches: int
    loops: int
    lanes: tuple[tuple[Instruction, ...], ...]

    def lane_of(self, stage: int) -> int:
        """The pipeline rank that runs ``stage``."""
        return stage % len(self.lanes)


def loop_of(part: str) -> int:
    """The loop that a part belongs to, or follows."""
    return int(part.partition(".")[2])


def kind_of(part: str) -> str:
    return part.partition(".")[0]


def order_of(part: str) -> tuple[int, int]:
    """Parts in the order in which a program lists them: once.0, forward.1, backward.1, weights.1, once.1, forward.2 .."""
    kind, loop = kind_of(part), loop_of(part)
    return (loop, len(KINDS)) if kind == "once" else (loop, KINDS.index(kind))


def format_instruction(i: Instruction, lane: int, loops: int) -> str:
    loop = f"{i.loop}:" if i.loop != loops else ""
    text = i.part if i.kind == "once" else f"{loop}{i.kind[0].upper()}{i.microbatch}"
    return text + (f"@{i.stage}" if i.stage != lane else "")


def parse_instruction(text: str, lane: int, loops: int) -> Instruction:
    """Raises ValueError on text that is no instruction."""
    m = re.fullmatch(r"(?:(\d+):)?([FBW])(\d+)(?:@(\d+))?|once\.(\d+)(?:@(\d+))?", text)
    if m is None:
        raise ValueError(f"{text!r} is no instruction: F0, B0, W0, 1:F0, once.0, each with @stage where it is not the lane's")
    loop, letter, microbatch, stage, once, at = m.groups()
    if once is not None:
        return Instruction(f"once.{once}", int(at) if at else lane)
    return Instruction(f"{_LETTER[letter]}.{loop or loops}", int(stage) if stage else lane, int(microbatch))


def format_schedule(s: Schedule) -> Iterator[str]:
    yield f"schedule {s.name} stages={s.stages} microbatches={s.microbatches} loops={s.loops}"
    for n, lane in enumerate(s.lanes):
        yield f"lane {n}: " + " ".join(format_instruction(i, n, s.loops) for i in lane)


def parse_schedule(lines: Sequence[str]) -> Schedule:
    """The inverse of ``format_schedule``. Raises ValueError naming the text that cannot be read."""
    m = re.fullmatch(r"schedule (\S+) stages=(\d+) microbatches=(\d+) loops=(\d+)", lines[0].strip())
    if m is None:
        raise ValueError(f"{lines[0].strip()!r} is no schedule: schedule NAME stages=N microbatches=N loops=N")
    stages, microbatches, loops = (int(n) for n in m.groups()[1:])
    lanes = []
    for n, line in enumerate(lines[1:]):
        head, _, rest = line.strip().partition(":")
        if head != f"lane {n}":
            raise ValueError(f"{line.strip()!r} where lane {n} is expected")
        lanes.append(tuple(parse_instruction(word, n, loops) for word in rest.split()))
    return Schedule(m.group(1), stages, microbatches, loops, tuple(lanes))
