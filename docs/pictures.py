"""Draw the pictures of docs/parallelism.md from the program itself: ``python docs/pictures.py`` (``--check``: fail when one is old;
``--page``: draw explain.png too, which needs a Chromium)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from deepseed import closed_forms as form
from deepseed.ir.mesh import Mesh
from deepseed.ir.messages import chain
from deepseed.ir.schedule import Schedule
from deepseed.solver.schedules import lanes
from deepseed.timeline import simulate
from deepseed.timeline_svg import draw

FOLDER = Path(__file__).parent / "img"
RANKS, MICROBATCHES = 4, 8
MESH = Mesh((("pp", 2), ("dp", 2), ("tp", 2)))
FORWARD = 1e-3  # seconds of one microbatch in one stage of four; a backward takes two forwards, one of them for the weights
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.soft { fill: #6e7781 } .on { fill: #fff; text-anchor: middle } .line { stroke: #8b949e; stroke-opacity: .5; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #d6dbe1 } .soft { fill: #8b949e } }
"""
COLOURS = {"pp": "#77757f", "dp": "#2b8c6c", "tp": "#b8457f", "parameters": "#2f6fb5", "gradients": "#c8602a", "optimizer": "#8a72c4"}


def pictures() -> Mapping[str, str]:
    """Name of the file -> its text."""
    return {"mesh.svg": mesh(MESH), "zero.svg": zero(MESH.size("dp") * 2), **{f"{name}.svg": schedule(name) for name in ("gpipe", "1f1b", "interleaved", "zb")}}


def schedule(name: str) -> str:
    """A schedule of stages that all take as long, without the time of messages."""
    chunks = 2 if name == "interleaved" else 1
    s = lanes(name, RANKS, MICROBATCHES, chunks, parts={(f"{kind}.1", n) for kind in _kinds(name) for n in range(RANKS * chunks)})
    return draw(simulate(s, _seconds(s, name), chain(s.stages)))


def _kinds(name: str) -> tuple[str, ...]:
    return ("forward", "backward", "weights") if name == "zb" else ("forward", "backward")


def _seconds(s: Schedule, name: str) -> dict[tuple[str, int], float]:
    one = FORWARD * RANKS / s.stages
    took = {"forward": one, "backward": one if name == "zb" else 2 * one, "weights": one}
    return {(f"{kind}.1", n): took[kind] for kind in _kinds(name) for n in range(s.stages)}


def mesh(m: Mesh) -> str:
    """Ranks at their places: the first axis in columns of boxes, the second downwards, the third across; and who talks to whom."""
    (first, columns), (second, down), (third, across) = m.axes
    cell, gap, left, top = 74, 26, 40, 84
    block = across * (cell + gap) + 40
    out = []
    for i in range(columns):
        x0 = left + i * block
        out.append(f'<text class="soft" x="{x0}" y="{top - 28}">{first}={i}</text>')
        out.append(f'<rect class="line" x="{x0 - 12}" y="{top - 20}" width="{across * (cell + gap) - gap + 24}" height="{down * (cell + gap) - gap + 40}" rx="8"/>')
        for j in range(down):
            for k in range(across):
                rank = m.rank({first: i, second: j, third: k})
                x, y = x0 + k * (cell + gap), top + j * (cell + gap)
                out.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" rx="6" fill="#57606a"/><text class="on" style="fill:#fff" x="{x + cell / 2}" y="{y + 33}">rank {rank}</text>')
                out.append(f'<text class="on" style="fill:#fff;font-size:10px" x="{x + cell / 2}" y="{y + 50}">{second}={j} {third}={k}</text>')
                if k + 1 < across:
                    out.append(_link(x + cell, y + cell / 2, x + cell + gap, y + cell / 2, third))
                if j + 1 < down:
                    out.append(_link(x + cell / 2, y + cell, x + cell / 2, y + cell + gap, second))
        if i + 1 < columns:
            middle = top + (down * (cell + gap) - gap) / 2
            out.append(_link(x0 + across * (cell + gap) - gap + 12, middle, x0 + block - 12, middle, first))
    height, x = top + down * (cell + gap) + 40, left
    for axis, what in ((third, "parts of each matmul, every layer"), (second, "gradients and state, once a step"), (first, "activations, at a boundary")):
        out.append(f'<rect x="{x}" y="{height - 22}" width="14" height="4" fill="{COLOURS[axis]}"/><text x="{x + 20}" y="{height - 16}">{axis}: {what}</text>')
        x += 275
    return _svg(max(x, left + columns * block), height, f"eight ranks as {m}", out)


def _link(x1: float, y1: float, x2: float, y2: float, axis: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{COLOURS[axis]}" stroke-width="4"/>'


def zero(n: int) -> str:
    """What a rank stores under each ZeRO stage, AdamW in 32 bits: two numbers of state for each parameter. From the closed forms."""
    whole = {"Psi": 1.0, "G": 1.0, "Omega": 2.0, "N": float(n), "t": 1.0}
    left, unit, high = 64, 130, 26
    out = []
    for stage in range(4):
        x, y = float(left), 44 + stage * (high + 12)
        out.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">zero{stage}</text>')
        for what, size in (("parameters", form.param_bytes), ("gradients", form.grad_bytes), ("optimizer", form.optimizer_bytes)):
            share = form.value(size(stage), **whole)
            text = f'<text class="on" style="fill:#fff" x="{x + share * unit / 2:.1f}" y="{y + 17}">{what}</text>' if share >= 1 else ""
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{share * unit:.1f}" height="{high}" fill="{COLOURS[what]}"><title>{what}: {share:g}</title></rect>{text}')
            x += share * unit
        total = sum(form.value(size(stage), **whole) for size in (form.param_bytes, form.grad_bytes, form.optimizer_bytes))
        out.append(f'<text class="soft" x="{x + 8:.1f}" y="{y + 17}">{total:g} of 4</text>')
    return _svg(left + 4 * unit + 80, 44 + 4 * (high + 12) + 8, f"what one of {n} data-parallel ranks stores of the whole, under each ZeRO stage", out)


def _svg(width: float, height: float, title: str, body: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *([f'<text x="14" y="20" font-weight="600">{escape(title)}</text>'] if body else []), *body, "</svg>\n"])


def photograph() -> None:
    """The page of a Llama of 0.3 billion parameters on sixteen ranks, as a browser shows it."""
    model = "LlamaForCausalLM(num_hidden_layers=16,hidden_size=1024,intermediate_size=2816,num_attention_heads=16,num_key_value_heads=4,vocab_size=32000,batch_size=32,sequence_length=1024)"
    browser = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with TemporaryDirectory() as folder:
        html = Path(folder) / "step.html"
        subprocess.run([sys.executable, "-m", "deepseed", "explain", f"hf:{model}", "--plan", "zero1+pp4+dp2+tp2+mb8", "--html", str(html)], check=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1500", f"--screenshot={FOLDER / 'explain.png'}"]
        subprocess.run([browser, *flags, html.as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        old = [name for name, text in pictures().items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text]
        sys.exit(f"{', '.join(old)} in {FOLDER}: old, run python {__file__}" if old else 0)
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / name).write_text(text)
    if "--page" in sys.argv[1:]:
        photograph()
