"""What the user wants, as a string: ``"zero3+tp2+pp4+mb8+bf16"``.

    plan  ::= word ("+" word)*
    word  ::= ("dp" | "ep" | "sp" | "tp" | "mb") N | "pp" N [ "(cut=[" path ("," path)* "])" ] | "zero" 0..3 | "bf16" | "fp16" | "fp32" | "fp64"
            | "gpipe" | "1f1b" | "interleaved" V | "zb" | "chunked" [N] | "remat" | "bn(local)" | "bn(exact)" | "order(" axis ("," axis)* ")"
            | "grads(" ("bf16" | "fp16" | "fp32" | "fp64") ")" | "budget(" bytes ")" | "offload" [ "(" kind ("," kind)* ["," "disk=" dir] ")" ]

Order is free, each kind of word appears once. A plan names sizes only: how a model is cut to them is the compiler's work; ``cut`` pins the
modules with which the stages after the first begin. ``order`` names the axes major first; the last has neighbouring ranks.
``Plan.mesh`` closes a plan over a number of ranks. Errors say what, the numbers, and the nearest plan that works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import gcd, prod

from deepseed.ir.amounts import format_bytes, parse_bytes
from deepseed.ir.mesh import Mesh


class PlanError(ValueError):
    """A plan that cannot be read, or that does not fit the ranks: says what, the numbers and the fix."""


PRECISIONS = {"bf16": "bf16", "fp16": "f16", "fp32": "f32", "fp64": "f64"}  # word -> dtype of the program
_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "fp64": 64}

AXES = {  # mesh axes, major first: the last has neighbouring ranks; what one of N ranks has of the whole
    "pp": "the layers",
    "dp": "the rows of the batch",
    "ep": "the experts, and the rows",
    "sp": "the sequence",
    "tp": "each weight",
}
OFFLOADS = ("optimizer", "gradients", "params", "activations")
SCHEDULES = r"gpipe|1f1b|interleaved\d+|zb"
DEFAULT_SCHEDULE = "1f1b"
_DATA = "dp"  # the axis that takes the ranks which no other axis asks for

SPELLINGS = {  # what people write -> the word
    "ddp": "zero0", "fsdp": "zero3",
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "float64": "fp64", "double": "fp64",
}  # fmt: skip

LATER: tuple[tuple[str, str, str], ...] = (  # pattern, what it would mean, what serves today
    (r"auto", "a plan chosen by the compiler", "zero1 to begin with, zero3 when memory is short"),
)


@dataclass(frozen=True)
class Plan:
    """A parsed plan. ``None``: not said. ``str(plan)`` is the canonical form and parses back to the same plan."""

    dp: int | None = None  # data-parallel ranks; inferred from the world size where missing
    zero: int | None = None  # 0..3; not said means 0
    ep: int | None = None  # ranks that share the experts, and the rows of the batch
    sp: int | None = None  # ranks that split the sequence
    tp: int | None = None  # ranks that split the weights in use
    pp: int | None = None  # ranks that each have some of the layers
    cut: tuple[str, ...] = ()  # module paths with which the stages after the first begin; none: where it balances best
    mb: int | None = None  # microbatches: parts of each rank's rows that run one after another
    schedule: str | None = None  # of the stages: gpipe, 1f1b, interleavedV, zb
    bn: str | None = None  # "local": the statistics of a batch norm are those of each microbatch; "exact": of all, at any price
    order: tuple[str, ...] = ()  # of the axes of ranks, major first
    chunked: int | None = None  # parts of the rows for which the loss of a large vocabulary is computed in turn; 0: as many as memory asks for
    remat: str | None = None  # "remat": the backward computes again what it reads of the forward, from the layers' inputs
    offload: tuple[str, ...] = ()  # what lies on the host, of OFFLOADS
    budget: int | None = None  # bytes of each rank's device: what is computed again and what lies on the host is chosen so that the step fits
    disk: str = ""  # a folder for what of that is stored between steps
    precision: str | None = None  # compute precision, a key of PRECISIONS; not said: the model's own
    grads: str | None = None  # in which gradients are reduced and added up, a key of PRECISIONS; not said: as the backward makes them

    def __str__(self) -> str:
        """Words in the order dp, zero, ep, sp, tp, pp, mb, schedule, precision, grads, chunked, remat, offload, budget: ``"dp2+zero3+tp2+pp4+mb8+1f1b+bf16+grads(fp32)"``."""
        sized = (("dp", self.dp), ("zero", self.zero), ("ep", self.ep), ("sp", self.sp), ("tp", self.tp), ("pp", self.pp), ("mb", self.mb))
        words = [f"{word}{n}" + (f"(cut=[{', '.join(self.cut)}])" if word == "pp" and self.cut else "") for word, n in sized if n is not None]
        words += [self.schedule] if self.schedule else []
        words += [f"bn({self.bn})"] if self.bn else []
        words += [f"order({', '.join(self.order)})"] if self.order else []
        words += [self.precision] if self.precision else []
        words += [f"grads({self.grads})"] if self.grads else []
        words += [f"chunked{self.chunked or ''}"] if self.chunked is not None else []
        words += [self.remat] if self.remat else []
        words += [f"offload({', '.join([*self.offload, *([f'disk={self.disk}'] if self.disk else [])])})"] if self.offload else []
        words += [f"budget({format_bytes(self.budget)})"] if self.budget else []
        return "+".join(words)

    @property
    def stages(self) -> int:
        """Ranks of a pipeline, 1 where the plan has none."""
        return self.pp or 1

    @property
    def kind(self) -> str:
        """The schedule's name without its number: gpipe, 1f1b, interleaved, zb."""
        return "interleaved" if self.chunks > 1 else self.schedule or DEFAULT_SCHEDULE

    @property
    def chunks(self) -> int:
        """Stages a pipeline rank: V of interleavedV, else 1."""
        return int(self.schedule.removeprefix("interleaved")) if self.schedule and self.schedule.startswith("interleaved") else 1

    def size(self, axis: str) -> int | None:
        """Ranks along an axis, a key of AXES; None where the plan does not say."""
        said: int | None = getattr(self, axis)
        return said

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 where the plan does not say."""
        return self.zero or 0

    @property
    def dtype(self) -> str | None:
        """The dtype in which the program computes (``"bf16"``, ``"f32"``, ``"f64"``), None for the model's own."""
        return PRECISIONS[self.precision] if self.precision else None

    @property
    def grad_dtype(self) -> str | None:
        """The dtype in which gradients are reduced over ranks and added up over microbatches, None for the one in which they are made."""
        return PRECISIONS[self.grads] if self.grads else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is legal but perhaps not what was meant, one sentence each; ask the resolved plan for what a run will do."""
        notes: list[str] = []
        if self.stage and self.dp is None:
            notes.append(f"zero{self.stage} without dpN: dp is inferred from the world size; without one it is dp2, simulated")
        elif self.stage and self.dp == 1 and (self.sp or 1) == (self.ep or 1) == 1:
            notes.append(f"zero{self.stage} does nothing with dp1: no other data-parallel rank to share the state with")
        if self.schedule and self.stages == 1:
            notes.append(f"{self.schedule} orders pipeline stages, and the plan has none: it does nothing without ppN")
        return tuple(notes)

    def resolve(self, world_size: int | None = None) -> Plan:
        """The same plan with dp filled in for ``world_size`` ranks (launched or simulated); its ``notes`` are about them.

        Without a world size the plan stands for itself: its own sizes, and dp2 where it asks for ZeRO and does not say
        how many ranks share the state. Raises PlanError where the plan does not divide the world size.
        """
        sizes = {axis: self.size(axis) or 1 for axis in AXES if axis != _DATA}
        each = prod(sizes.values())  # ranks of one data-parallel part
        if world_size is None:
            return replace(self, dp=self.dp or (2 if self.stage else 1))
        if world_size < 1:
            raise PlanError(f"world size {world_size}: at least 1 rank is needed\n  fix: start 1 rank or more")
        if world_size % each:
            split = [f"{axis}{n} splits {AXES[axis]} over {n} ranks" for axis, n in sizes.items() if n > 1]
            raise PlanError(
                f"plan {self}: {' and '.join(split)}, but the world size {world_size} is not a multiple of {each} "
                f"({world_size} = {each} * {world_size // each} + {world_size % each})\n  fix: {self._fix(world_size)}"
            )
        dp = self.dp or world_size // each
        if dp * each != world_size:
            factors = [f"{axis}{n}" for axis, n in {_DATA: dp, **sizes}.items() if axis == _DATA or n > 1]
            product = f"{' x '.join(factors)} = {dp * each}" if len(factors) > 1 else f"{dp}"
            raise PlanError(f"plan {self} is for {product} ranks, but the world size is {world_size}\n  fix: {self._fix(world_size)}")
        return replace(self, dp=dp)

    def mesh(self, world_size: int | None = None) -> Mesh:
        """Axes in the order of AXES or of ``order``, tp last so that neighbouring ranks share a weight; an axis of one rank is left out.

        Raises PlanError where the plan does not fit ``world_size`` ranks: see ``resolve``.
        """
        sizes = self.resolve(world_size)
        axes = [axis for axis in AXES if (sizes.size(axis) or 1) > 1]
        if self.order:
            missing = [axis for axis in axes if axis not in self.order]
            if missing:
                raise PlanError(f"plan {self}: the order of the axes leaves out {', '.join(missing)}\n  fix: order({', '.join([*self.order, *missing])})")
            axes = [axis for axis in self.order if axis in axes]
        return Mesh(tuple((axis, sizes.size(axis) or 1) for axis in axes))

    def microbatches(self, rows: int) -> int:
        """How many microbatches a data-parallel rank's ``rows`` are cut into: as the plan says; with stages and no word for it the
        smallest divisor of the rows that is twice the stages or more, else the largest."""
        if self.mb is not None or self.stages == 1 or rows < 1:
            return self.mb or 1
        divisors = [m for m in range(1, rows + 1) if rows % m == 0]
        return next((m for m in divisors if m >= 2 * self.stages), divisors[-1])

    def _sized(self, sizes: Mapping[str, int | None]) -> Plan:
        return replace(self, **sizes)  # type: ignore[arg-type]

    def _fix(self, world_size: int) -> str:
        """The nearest plan that takes ``world_size`` ranks, and the nearest world size that this plan takes.

        An axis falls to its largest divisor that divides what is left of the world: what splits over N splits over that too.
        """
        left, sizes = world_size, {axis: self.size(axis) or 1 for axis in reversed(AXES) if axis != _DATA}
        near: dict[str, int | None] = {}
        for axis, n in sizes.items():
            found = gcd(n, left)
            left //= found
            near[axis] = found if found > 1 else None
        plan = self._sized({**near, _DATA: left if self.dp is not None else None})
        each = prod(sizes.values())
        size = (self.dp or max(1, round(world_size / each))) * each
        return f'use plan "{str(plan) or "zero0"}", or start {size} ranks'


_WORDS: tuple[tuple[str, str, Callable[[str], int | str | tuple[str, ...]]], ...] = (  # pattern, field, its value from the word
    *((rf"{axis}(\d+)", axis, int) for axis in (*AXES, "mb")),
    (r"zero([0-3])", "zero", int),
    (rf"({'|'.join(PRECISIONS)})", "precision", str),
    (r"chunked(\d*)", "chunked", lambda n: int(n or 0)),
    (r"(remat)", "remat", str),
    (rf"({SCHEDULES})", "schedule", str),
    (r"bn\((local|exact)\)", "bn", str),
    (rf"grads\(({'|'.join(PRECISIONS)})\)", "grads", str),
    (r"order\((.*)\)", "order", lambda text: tuple(axis.strip() for axis in text.split(","))),
    (r"cut=\[?([^\]]*)\]?", "cut", lambda text: tuple(path.strip() for path in text.split(",") if path.strip())),
    (r"budget\((.*)\)", "budget", lambda text: _amount(text)),
    (r"offload()", "offload", lambda _: ("optimizer",)),
    (r"offload\((.*)\)", "offload", lambda text: tuple(kind.strip() for kind in text.split(","))),
)
KNOWN = (
    "dpN", "zero0", "zero1", "zero2", "zero3", *(f"{axis}N" for axis in AXES if axis != _DATA), "mbN", "gpipe", "1f1b", "interleavedN", "zb",
    "bn(local)", "bn(exact)", "order(axes)", *PRECISIONS, "grads(fp32)", "chunked", "chunkedN", "remat", "offload(optimizer)", "budget(8GiB)",
)  # fmt: skip


def parse_plan(text: str) -> Plan:
    """``"zero3+tp2"`` -> ``Plan(zero=3, tp=2)``; the empty string is one rank.

    >>> str(parse_plan("bf16 + tp2+zero3"))
    'zero3+tp2+bf16'

    Raises PlanError on an unknown word (with the nearest known one), a word said twice, a size below 1, and on words that
    this version does not carry out yet: none is ever ignored.
    """
    found: dict[str, int | str | tuple[str, ...]] = {}
    said: dict[str, str] = {}
    for word in _split(text):
        name, value = _read(word, text)
        if name in found:
            raise PlanError(f"plan {text!r} says {said[name]} and {word}\n  fix: keep one of the two")
        if value == 0 and name != "zero" and word != "chunked":
            raise PlanError(f"plan {text!r}: {word} asks for 0 {'microbatches' if name == 'mb' else 'ranks'}\n  fix: use {name}1 or more, or leave {word} out")
        found[name], said[name] = value, word
    if "offload" in found:
        found |= _offloaded(found["offload"], text)
    given = {f.name: found[f.name] for f in fields(Plan) if f.name in found}
    plan = Plan(**given)  # type: ignore[arg-type]
    if plan.grads and plan.precision not in (None, plan.grads) and _BITS[plan.grads] <= _BITS[plan.precision or ""]:
        raise PlanError(
            f"plan {text!r}: gradients are made in {plan.precision}, and {plan.grads} does not hold what {plan.precision} does\n"
            f"  fix: grads({plan.precision}), grads(fp32), or leave it out: they are reduced as they are made"
        )
    if plan.schedule and plan.chunks < 2 and plan.schedule.startswith("interleaved"):
        raise PlanError(f"plan {text!r}: {plan.schedule} gives each rank {plan.chunks} stage\n  fix: interleaved2 or more, or 1f1b")
    if plan.cut and len(plan.cut) != plan.stages * plan.chunks - 1:
        raise PlanError(
            f"plan {text!r} pins the beginnings of {len(plan.cut) + 1} stages ({', '.join(plan.cut)}), and has {plan.stages * plan.chunks}\n"
            f"  fix: name {plan.stages * plan.chunks - 1} module paths, one for each stage but the first"
        )
    if odd := [axis for axis in plan.order if axis not in AXES or plan.order.count(axis) > 1]:
        raise PlanError(f"plan {text!r}: order({', '.join(plan.order)}) has {odd[0]!r} {'twice' if odd[0] in AXES else 'in it, which is no axis of ranks'}\n  fix: each of {', '.join(AXES)} once, major first")
    return plan


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise PlanError(f"budget({text}): {error}\n  fix: budget(8GiB)") from None


def _offloaded(words: object, text: str) -> dict[str, str | tuple[str, ...]]:
    """The kinds of ``offload(..)`` in their order, and its folder."""
    assert isinstance(words, tuple)
    disks = [word.partition("=")[2].strip() for word in words if word.partition("=")[0].strip().lower() == "disk"]
    kinds = [word.lower() for word in words if word and word.partition("=")[0].strip().lower() != "disk"]
    if odd := [kind for kind in kinds if kind not in OFFLOADS or kinds.count(kind) > 1]:
        why = "is there twice" if odd[0] in OFFLOADS else "has no such kind"
        raise PlanError(f"plan {text!r}: offload({', '.join(words)}): {odd[0]!r} {why}\n  fix: any of {', '.join(OFFLOADS)}, each once")
    if len(disks) > 1 or "" in disks or (disks and not {"optimizer", "params"} & set(kinds)):
        raise PlanError(f"plan {text!r}: disk= takes one folder, for optimizer state or parameters\n  fix: offload(optimizer, params, disk=/a/folder)")
    if not kinds:
        raise PlanError(f"plan {text!r}: offload() says of nothing that it is to lie on the host\n  fix: offload(optimizer)")
    return {"offload": tuple(kind for kind in OFFLOADS if kind in kinds), "disk": disks[0] if disks else ""}


def _split(text: str) -> list[str]:
    """The words; what stands in brackets is one with its word, but for ``pp4(cut=[..])``, which is two."""
    if not text.strip():
        return []
    words: list[str] = []
    depth, start = 0, 0
    for n, c in enumerate(text + "+"):
        depth += (c == "(") - (c == ")")
        if c == "+" and (depth <= 0 or n == len(text)):
            words.append(text[start:n].strip())
            start = n + 1
    if "" in words:
        raise PlanError(f"plan {text!r} has an empty word\n  fix: write words joined by single + signs, as in zero3+tp2")
    out: list[str] = []
    for word in words:
        head, bracket, rest = word.partition("(")
        if bracket and re.fullmatch(r"pp\d+", head.strip().lower()):
            if not rest.endswith(")") or not rest.startswith("cut="):
                raise PlanError(f"plan {text!r}: cannot read {word!r}\n  fix: {head.strip().lower()}(cut=[module.path, other.path])")
            out += [head.strip().lower(), rest[:-1]]
        elif bracket and head.strip().lower() == "offload":
            out.append("offload(" + rest)  # a folder keeps its case
        else:
            out.append(word.lower())
    return out


def _read(word: str, text: str) -> tuple[str, int | str | tuple[str, ...]]:
    for pattern, name, value in _WORDS:
        if m := re.fullmatch(pattern, word):
            return name, value(m.group(1))
    for pattern, meaning, instead in LATER:
        if re.fullmatch(pattern, word):
            raise PlanError(f"not yet supported by this version: {word} ({meaning}), in plan {text!r}; use {instead}")
    raise PlanError(f"unknown word {word!r} in plan {text!r}{_suggest(word)}\n  fix: use one of the words: {', '.join(KNOWN)}; joined by +, as in zero3+tp2+bf16")


def _suggest(word: str) -> str:
    """The nearest known word, with the number that the user wrote: ``tpp4`` -> ``tp4``."""
    if word in SPELLINGS:
        return f": did you mean {SPELLINGS[word]}?"
    if re.fullmatch(r"zero-?\d+", word):
        return ": ZeRO has the stages 0, 1, 2 and 3"
    number = "".join(re.findall(r"\d+", word)[:1])
    candidates = [k.replace("N", number or "2") for k in KNOWN]
    near = get_close_matches(word, candidates, cutoff=0.5)
    same = [k for k in near if sorted(k) == sorted(word)]  # letters in another order
    return f": did you mean {(same or near)[0]}?" if near else ""


def with_dtype(plan: Plan, dtype: str) -> Plan:
    """``plan`` computing in ``dtype`` (a precision word, or torch's name: ``"bfloat16"``). Raises PlanError where the plan says another."""
    word = SPELLINGS.get(dtype, dtype)
    if word not in PRECISIONS:
        for pattern, meaning, instead in LATER:
            if re.fullmatch(pattern, word):
                raise PlanError(f"not yet supported by this version: {word} ({meaning}), in dtype={dtype!r}; use {instead}")
        raise PlanError(f"unknown dtype {dtype!r}\n  fix: one of {', '.join(PRECISIONS)}")
    if plan.precision not in (None, word):
        raise PlanError(f"plan {plan} computes in {plan.precision}, dtype= says {word}\n  fix: say it once")
    return replace(plan, precision=word)
