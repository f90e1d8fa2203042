"""A timeline as a picture: one self-contained SVG, a lane a pipeline rank, a box an instruction, time from left to right.

Colour says forward, backward, weights or once; the shade says which of the rank's stages (the first is darkest); the text is the
instruction, and hovering says all of it. The scale is such that the shortest looped instruction has room for its text, within MOST pixels.
"""

from __future__ import annotations

from html import escape

from deepseed.ir.schedule import KINDS, format_instruction
from deepseed.timeline import Event, Timeline

LANE, GAP, LEFT, TOP, RIGHT = 26, 6, 64, 58, 24  # pixels
LEAST, MOST = 880, 6000  # pixels that the step is wide
LETTER = 6.2  # pixels of one character at the size of the text in a box
COLOURS = {"forward": "#2f6fb5", "backward": "#c8602a", "weights": "#4c8f3f", "once": "#77757f"}
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #24292f }
.box text { font-size: 10px; fill: #fff; text-anchor: middle; pointer-events: none }
.idle { fill: #8b949e; fill-opacity: .14 }
.tick { stroke: #8b949e; stroke-opacity: .4 }
.head { font-size: 13px; font-weight: 600 }
@media (prefers-color-scheme: dark) { text { fill: #d6dbe1 } }
"""


def draw(timeline: Timeline) -> str:
    """The picture as SVG text."""
    schedule, step = timeline.schedule, timeline.step_seconds
    scale = _scale(timeline)
    width, height = LEFT + step * scale + RIGHT, TOP + len(schedule.lanes) * (LANE + GAP) + 34
    title = f"{schedule.name}: {len(schedule.lanes)} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches"
    figures = f"step {_ms(step)}, bubble {100 * timeline.bubble_share:.1f} %"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.1f} {height}" width="{width:.1f}" height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}; {figures}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="head" x="{LEFT}" y="20">{escape(title)}</text>',
        f'<text x="{LEFT}" y="40">{figures}</text>',
        *_legend(timeline),
    ]
    for lane in range(len(schedule.lanes)):
        y = _top(lane)
        out.append(f'<text x="{LEFT - 8}" y="{y + LANE / 2 + 4:.1f}" text-anchor="end">rank {lane}</text>')
        out.append(f'<rect class="idle" x="{LEFT}" y="{y}" width="{step * scale:.2f}" height="{LANE}"/>')
    out += [_box(timeline, e, scale) for e in timeline.events]
    out += _axis(step, scale, height - 28)
    return "\n".join([*out, "</svg>\n"])


def _scale(timeline: Timeline) -> float:
    """Pixels a second."""
    step, loops = timeline.step_seconds, timeline.schedule.loops
    if not step:
        return 0.0
    main = [e for e in timeline.events if e.end > e.start and e.instruction.kind != "once" and e.instruction.loop == loops]
    widths = [(LETTER * len(_label(timeline, e)) + 4) / (e.end - e.start) for e in main]
    return min(max([LEAST / step, *widths]), MOST / step)


def _top(lane: int) -> int:
    return TOP + lane * (LANE + GAP)


def _label(timeline: Timeline, e: Event) -> str:
    """The instruction without its stage, which the shade and the title say."""
    return format_instruction(e.instruction, e.instruction.stage, timeline.schedule.loops)


def _box(timeline: Timeline, e: Event, scale: float) -> str:
    x, y, wide, label = LEFT + e.start * scale, _top(e.lane), (e.end - e.start) * scale, _label(timeline, e)
    i, ranks = e.instruction, len(timeline.schedule.lanes)
    chunk, chunks = i.stage // ranks, timeline.schedule.stages // ranks
    shade = 1 - 0.4 * chunk / max(chunks - 1, 1)
    title = f"{label} stage {i.stage}, rank {e.lane}: {i.part}" + (f" of microbatch {i.microbatch}" if i.kind != "once" else "") + f", {_ms(e.start)} to {_ms(e.end)}"
    text = f'<text x="{x + wide / 2:.2f}" y="{y + LANE / 2 + 3.5:.1f}">{label}</text>' if LETTER * len(label) <= wide else ""
    return (
        f'<g class="box {i.kind}"><title>{escape(title)}</title>'
        f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{LANE}" fill="{COLOURS[i.kind]}" fill-opacity="{shade:.2f}" stroke="#fff" stroke-width=".5"/>{text}</g>'
    )


def _legend(timeline: Timeline) -> list[str]:
    kinds = [kind for kind in (*KINDS, "once") if any(e.instruction.kind == kind and e.end > e.start for e in timeline.events)]
    out = []
    for n, kind in enumerate([*kinds, "idle"]):
        x = LEFT + 230 + n * 92
        look = f'fill="{COLOURS[kind]}"' if kind in COLOURS else 'class="idle"'
        out.append(f'<rect {look} x="{x}" y="31" width="12" height="12"/><text x="{x + 17}" y="41">{kind}</text>')
    return out


def _axis(step: float, scale: float, y: int) -> list[str]:
    """A tick every 1, 2 or 5 times a power of ten milliseconds, no more than one in 70 pixels."""
    if not step:
        return []
    gap, power = 70 / scale, -9
    while 5 * 10.0**power < gap:
        power += 1
    every = next(n * 10.0**power for n in (1, 2, 5) if n * 10.0**power >= gap)
    out = []
    for n in range(int(step / every * (1 + 1e-12)) + 1):
        x = LEFT + n * every * scale
        out.append(f'<line class="tick" x1="{x:.2f}" x2="{x:.2f}" y1="{TOP - 4}" y2="{y}"/><text x="{x:.2f}" y="{y + 14}" text-anchor="middle">{_ms(n * every)}</text>')
    return out


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
