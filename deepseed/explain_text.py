"""What explain found as one screen of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from deepseed.ir.collective import KEYED
from deepseed.ir.mesh import STAGES

if TYPE_CHECKING:
    from deepseed.explain import Explanation, Weight
    from deepseed.timing import Timing


def lines(e: Explanation) -> Iterable[str]:
    mesh = ", ".join(f"{axis}={n}" for axis, n in e.mesh.items()) or "one rank"
    mean = " (of the mean pipeline rank)" if STAGES in e.mesh else ""
    yield f"zero{e.zero} on mesh({mesh}), {len(e.ranks)} rank{'s' if len(e.ranks) > 1 else ''}; all numbers are of one rank and one step{mean}"
    if e.schedule is not None:
        yield from _stages(e, e.schedule)
    yield ""
    yield f"  {'':16}{'counted':>12}   {'closed form':32}{'':>12}"
    for c in e.closed_forms:
        expected = "" if c.expected is None else amount(c.expected, c.unit)
        ratio = f"  x{c.counted / c.expected:.3f}" if c.expected else ""
        yield f"  {c.what:16}{amount(c.counted, c.unit):>12}   {c.formula:32}{expected:>12}{ratio}"
    yield f"  {'peak':16}{amount(max(r.peak_bytes for r in e.ranks)):>12}   at %{e.peak_at}"
    most = max(e.ranks, key=lambda r: (r.host_bytes, sum(r.moved_bytes.values())))
    if most.host_bytes:
        moves = ", ".join(f"{kind} {amount(n)} ({most.moved_hidden[kind]:.0%} hidden)".replace("%", " %") for kind, n in most.moved_bytes.items() if n)
        yield f"  {'host':16}{amount(most.host_bytes):>12}   moved between host and device in a step: {moves or 'nothing'}"
    if e.collectives:
        yield ""
        yield f"  {'axis':6}{'collective':16}{'count':>7}{'sent':>12}"
        for k in e.collectives:
            yield f"  {k.axis:6}{k.op:16}{k.count:>7}{amount(k.bytes):>12}" + ("  expected, of ids that are uniform" if k.op in KEYED else "")
    yield ""
    width = max([len(w.key) for w in e.weights] + [6]) + 2
    yield f"  {'weight':{width}}{'count':>5}  {'stored as':30}split in use"
    for w in _longest_first(e.weights):
        yield f"  {w.key:{width}}{w.count:>5}  {w.layout:30}{w.use}"
    if len(e.weights) > _SHOWN:
        yield f"  and {len(e.weights) - _SHOWN} more: --json lists all"
    yield from _left_whole(e)
    if e.cuda_graphs is not None:
        yield ""
        yield f"  CUDA graphs: {e.cuda_graphs}"
    if e.seconds:
        yield ""
        yield "  seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in e.seconds.items())


def _stages(e: Explanation, t: Timing) -> Iterable[str]:
    lanes = e.mesh.get(STAGES, 1)
    what = f"{t.name}, {t.stages} stages, " if lanes > 1 else ""
    yield f"{what}{t.microbatches} microbatches, {t.loops} loop{'s' if t.loops > 1 else ''} over them" + (f" ({t.repeated:.1%} of the matmul flops are of earlier loops)" if t.repeated else "")
    if lanes == 1:
        return
    yield f"estimated step {t.step_seconds * 1e3:.3f} ms, idle {t.bubble_share:.1%} ({t.bubble_share_equal:.1%} where all stages take as long)"
    yield ""
    yield f"  {STAGES:6}{'ranks':>8}{'parameters':>14}{'gradients':>14}{'optimizer':>14}{'peak':>14}   microbatches held"
    for n in range(lanes):
        of = [r for r in e.ranks if r.coordinate[STAGES] == n]
        numbers = (of[0].param_bytes, of[0].grad_bytes, of[0].optimizer_bytes, of[0].peak_bytes)
        yield f"  {n:<6}{len(of):>8}" + "".join(f"{amount(b):>14}" for b in numbers) + "   " + ", ".join(str(t.in_flight[s]) for s in range(n, t.stages, lanes))
    yield ""
    yield "  boundary  crosses"
    for k, boundary in enumerate(t.boundaries):
        for n, (when, names) in enumerate((when, names) for when, names in boundary.items() if names):
            said = ", ".join(f"%{name}" for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            yield f"  {f'{k} | {k + 1}' if n == 0 else '':10}{when}: {said}"


_SHOWN = 16


def _longest_first(weights: Sequence[Weight]) -> Sequence[Weight]:
    """Those that are split in use first, so that one screen shows the decisions."""
    return [w for w in weights if w.use][:_SHOWN] + [w for w in weights if not w.use][: max(0, _SHOWN - sum(bool(w.use) for w in weights))]


def _left_whole(e: Explanation) -> Iterable[str]:
    computed = [r for r in e.replicated_ops if r.flops]
    held = [r for r in e.replicated_ops if r.target == "param"]
    for title, ops in (
        ("repeated by every rank of an axis", [(r.axis, f"%{r.name} = {r.target} at {r.path or 'top'}", amount(r.flops, "flops")) for r in computed]),
        ("held whole by every rank of an axis", [(r.axis, r.path, amount(r.bytes)) for r in held]),
        ("no rule, so replicated", [("", f"%{u.name} = {u.target} at {u.path or 'top'}", f"{amount(u.bytes)} gathered") for u in e.unruled_ops]),
    ):
        if ops:
            yield ""
            yield f"  {title}: {len(ops)}"
            yield from (f"    {axis:4}{what}  {size}" for axis, what, size in ops[:4])
            if len(ops) > 4:
                yield f"    and {len(ops) - 4} more: --json lists all"


def amount(n: float, unit: str = "bytes") -> str:
    """``1536`` -> ``1.5 KiB``; flops in powers of 1000.

    >>> amount(1536), amount(12), amount(2.5e9, "flops")
    ('1.5 KiB', '12 B', '2.50 GFLOP')
    """
    step, names, digits = (1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), 2) if unit == "flops" else (1024.0, ("B", "KiB", "MiB", "GiB", "TiB"), 1)
    at = 0
    while abs(n) >= step and at < len(names) - 1:
        n, at = n / step, at + 1
    return f"{n:.0f} {names[0]}" if at == 0 else f"{n:.{digits}f} {names[at]}"
