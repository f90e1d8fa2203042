"""The ops of one pipeline rank: those of its stages, what it sends when that is made, what it receives before it is read.

A ``transfer`` between stages of one lane stays what it is, another name of the value. To another lane it is a ``send`` in the part and
stage of its operand; from another one it is a ``receive.start`` at the head of its part, and a ``wait`` before the first reader there.
Messages have no tags: they are received in the order in which they were sent. Where the heads of the parts are another order (a value
sent past a stage of the same lane that runs first), each ``receive.start`` has ``turns``: for each microbatch, its place in the list of
what the lane does, instructions and these receives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from deepseed.ir.messages import Item, messages_of, receives
from deepseed.ir.program import Op, Program, Ref
from deepseed.ir.schedule import Schedule, kind_of, order_of

STORED = ("param", "buffer", "state")


def on_lane(p: Program, lane: int) -> Program:
    """``p`` itself where it has no schedule."""
    s = p.schedule
    if s is None:
        return p
    stages = {n for n in range(s.stages) if s.lane_of(n) == lane}
    blocks: dict[tuple[str, int], list[Op]] = {}
    heads: dict[tuple[str, int], list[Op]] = {}
    waits: dict[str, Op] = {}  # received value -> its wait, until it is emitted
    together: dict[str, list[Ref]] = {}  # what the ops of a group read: it is there before the first of them
    for op in p.ops:
        if op.kernel:
            together.setdefault(op.kernel, []).extend(op.refs)
    for op in p.ops:
        key = _block(op.part, op.stage)
        if op.target == "transfer":
            source = int(str(op.kw("source")))
            if op.stage in stages and source not in stages:
                start = f"{op.name}.start"
                heads.setdefault(key, []).append(replace(op, results=(start,), target="receive.start", args=(), kwargs=(("source", s.lane_of(source)),)))
                waits[op.name] = replace(op, target="wait", args=(Ref(start),), kwargs=())
                continue
            if source in stages and op.stage not in stages:
                op = replace(op, target="send", kwargs=(("to", s.lane_of(op.stage)),), stage=source)
                key = _block(op.part, source)
        if op.stage not in stages:
            continue
        block = blocks.setdefault(key, [])
        for ref in together[op.kernel] if op.kernel else op.refs:
            if ref.name in waits and _block(waits[ref.name].part, waits[ref.name].stage) == key:
                block.append(waits.pop(ref.name))
        block.append(op)
    for wait in waits.values():  # read in later parts only
        blocks.setdefault(_block(wait.part, wait.stage), []).append(wait)
    turns = _turns(p, s, lane, heads)
    heads = {key: [_at(op, turns) for op in ops] for key, ops in heads.items()} if turns else heads
    ops = [op for key in _in_order({*heads, *blocks}) for op in (*heads.get(key, ()), *blocks.get(key, ()))]
    made = {r for op in ops if op.target != "send" for r in op.results}  # a value that is sent is the receiver's output
    inputs = tuple(i for i in p.inputs if i.role not in STORED or i.stage in stages)
    given = {i.name for i in inputs}
    outputs = tuple(o for o in p.outputs if o.ref.name in made or o.ref.name in given)
    return replace(p, inputs=inputs, ops=tuple(ops), outputs=outputs)


def _turns(p: Program, s: Schedule, lane: int, heads: Mapping[tuple[str, int], list[Op]]) -> dict[str, list[int]]:
    """By received value, when its receives are posted; nothing where the heads of the parts are the order in which they were sent."""
    posted = receives(s, lane, messages_of(p))
    plain: list[list[Item]] = []
    for i in s.lanes[lane]:
        names = [op.name.removesuffix(".start") for op in heads.get(_block(i.part, i.stage), ())]
        plain.append([(name, i.microbatch) for name in names])
    source = {op.name.removesuffix(".start"): int(str(op.kw("source"))) for ops in heads.values() for op in ops}
    if all(sorted(a, key=lambda item: source[item[0]]) == sorted(b, key=lambda item: source[item[0]]) for a, b in zip(plain, posted, strict=True)):
        return {}
    turns: dict[str, dict[int, int]] = {}
    count = 0
    for items in posted:
        for name, microbatch in items:
            turns.setdefault(name, {})[microbatch] = count
            count += 1
        count += 1  # the instruction itself
    return {name: [at[mb] for mb in sorted(at)] for name, at in turns.items()}


def _at(op: Op, turns: Mapping[str, list[int]]) -> Op:
    return replace(op, kwargs=(*op.kwargs, ("turns", tuple(turns[op.name.removesuffix(".start")]))))


def home(p: Program, value: str) -> int:
    """The pipeline rank on which a value lies; 0 where all have it."""
    made = p.producers.get(value)
    if made is not None and p.schedule is not None:
        return p.schedule.lane_of(made.stage)
    stage = next((i.stage for i in p.inputs if i.name == value), 0)
    return p.schedule.lane_of(stage) if p.schedule is not None else 0


def _block(part: str, stage: int) -> tuple[str, int]:
    """What runs as one: a part of a stage; what runs once is one for all stages of the lane, in the order of the program."""
    return (part, -1) if kind_of(part) == "once" else (part, stage)


def _in_order(keys: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Parts in their order; of one part the stages in the order in which values go, up in the forward, else down."""
    return sorted(keys, key=lambda key: (order_of(key[0]), key[1] if kind_of(key[0]) == "forward" else -key[1]))
