// The timeline: a lane for each rank, drawn for the visible range; wheel, drag and keys move it.
// what is shown -----------------------------------------------------------------------------------------------------
const step = D.step || 1e-9;
const state = { t0: 0, t1: step, rank: 0, box: -1, hover: null };
let rows, shape, lane;  // the first rank of each lane that is drawn; pixels of a box, of a strip of collectives, between lanes, in all
function layLanes(grouped) {
  rows = grouped ? positions.map((p) => p.ranks[0]) : D.ranks.map((_, r) => r);
  shape = rows.length <= 16 ? { h: 24, strip: 5, gap: 7 } : rows.length <= 64 ? { h: 13, strip: talking.length > 2 ? 0 : 3, gap: 3 } : { h: 8, strip: 0, gap: 2 };
  lane = shape.h + shape.strip * talking.length + shape.gap;
}
const grouped = () => rows.length < ranks;
const rowOf = (r) => (grouped() ? at[r] : r);
const LEFT = 66, RIGHT = 10;
const width = () => Math.max(320, $("scroll").clientWidth);
const x = (t) => LEFT + ((t - state.t0) / (state.t1 - state.t0)) * (width() - LEFT - RIGHT);
const time = (px) => state.t0 + ((px - LEFT) / (width() - LEFT - RIGHT)) * (state.t1 - state.t0);

function show(t0, t1) {
  const span = Math.min(step, Math.max(step / 20000, t1 - t0));
  t0 = Math.min(Math.max(0, t0), step - span);
  if (t0 === state.t0 && t0 + span === state.t1) return false;
  state.t0 = t0; state.t1 = t0 + span;
  redraw();
  return true;
}
function zoom(by, about = (state.t0 + state.t1) / 2) {
  const span = Math.min(step, (state.t1 - state.t0) * by), share = (about - state.t0) / (state.t1 - state.t0);
  return show(about - share * span, about - share * span + span);
}
let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; drawAxis(); drawLanes(); drawMemory(); hover(state.hover); });
}

/** Mark a time, or none, in the timeline and in every memory chart. */
function hover(t) {
  state.hover = t;
  const seen = t !== null && t >= state.t0 && t <= state.t1;
  for (const line of document.querySelectorAll("svg .cursor")) {
    line.style.display = seen ? "" : "none";
    if (seen) for (const end of ["x1", "x2"]) line.setAttribute(end, LEFT + ((t - state.t0) / (state.t1 - state.t0)) * (line.ownerSVGElement.getBoundingClientRect().width - LEFT - RIGHT));
  }
}

// timeline ----------------------------------------------------------------------------------------------------------
function ticks(t0, t1, most) {
  const rough = (t1 - t0) / most, ten = 10 ** Math.floor(Math.log10(rough));
  const by = [1, 2, 5, 10].map((k) => k * ten).find((s) => s >= rough);
  const out = [];
  for (let k = Math.ceil(t0 / by - 1e-9); k * by <= t1 * (1 + 1e-12); k += 1) out.push(k * by);
  return out;
}
function label(t) {  // a tick, with digits enough to tell it from the next
  const [by, unit] = step >= 1 ? [1, "s"] : step >= 1e-3 ? [1e3, "ms"] : [1e6, "\u00b5s"];
  return `${+(t * by).toPrecision(7)} ${unit}`;
}
function drawAxis() {
  const many = Math.max(2, Math.floor((width() - LEFT) / 110));
  $("axis").innerHTML = ticks(state.t0, state.t1, many).map((t) => `<text class="soft" x="${x(t).toFixed(1)}" y="13" text-anchor="middle">${label(t)}</text>`).join("");
  $("range").textContent = state.t1 - state.t0 >= step * 0.99999 ? `${seconds(step)}, all` : `${seconds(state.t0, step)} to ${seconds(state.t1, step)} of ${seconds(step)}`;
  $("timeline").dataset.t0 = state.t0;
  $("timeline").dataset.t1 = state.t1;
}
/** The first of sorted boxes that ends after t. */
function after(boxes, t) {
  let lo = 0, hi = boxes.length;
  while (lo < hi) { const mid = (lo + hi) >> 1; if (boxes[mid].end <= t) lo = mid + 1; else hi = mid; }
  return lo;
}
const shade = (b) => (b.stage >= pp ? ` fill-opacity="${Math.max(0.45, 1 - 0.22 * Math.floor(b.stage / pp)).toFixed(2)}"` : "");

/** The boxes and collectives of a position in the visible range, at the height of the first lane. */
function lanePicture({ boxes }) {
  const y = 3, out = [];
  const left = LEFT, right = width() - RIGHT;
  const thin = (fill, from, to, top, height) => {  // what is narrower than a pixel is drawn together
    const last = out.length ? out[out.length - 1] : null;
    if (last && last.fill === fill && last.top === top && from - last.to < 0.6) last.to = Math.max(last.to, to);
    else out.push({ fill, from, to: Math.max(to, from + 0.7), top, height });
  };
  const first = after(boxes, state.t0);
  for (let i = Math.max(0, first - 2); i < boxes.length && boxes[i].start < state.t1; i += 1) {
    const b = boxes[i];
    if (shape.strip) for (const [axis, , s, e] of b.sent) {
      const from = Math.max(left, x(b.start + s)), to = Math.min(right, x(b.start + e));
      if (to > left && from < right) thin(colour(axis), from, to, y + shape.h + 1 + talking.indexOf(whole(axis)) * shape.strip, shape.strip - 1);
    }
    if (i < first) continue;
    const held = [];
    const from = Math.max(left, x(b.start)), to = Math.min(right, x(b.end)), wide = to - from;
    if (wide < 1.5) { thin(css(b.kind), from, to, y, shape.h); continue; }
    for (const [, , , e, , wait] of b.sent) {  // the end of a collective that computation stands still for
      const f = Math.max(from, x(b.start + e - wait)), t = Math.min(to, x(b.start + e));
      if (wait > 0 && t > f) held.push(`M${f.toFixed(2)} ${y}H${t.toFixed(2)}V${y + shape.h}H${f.toFixed(2)}Z`);
    }
    out.push({ html: `<rect class="box" data-box="${i}" x="${from.toFixed(2)}" y="${y}" width="${wide.toFixed(2)}" height="${shape.h}" fill="${css(b.kind)}"${shade(b)}/>` + (held.length ? `<path class="held" d="${held.join("")}"/>` : "")
      + (shape.h >= 12 && wide > 7 * b.label.length + 4 ? `<text class="in" x="${((from + to) / 2).toFixed(1)}" y="${y + shape.h / 2 + 4}">${esc(b.label)}</text>` : "") });
  }
  return out.map((o) => o.html || `<rect class="box thin" x="${o.from.toFixed(2)}" y="${o.top}" width="${(o.to - o.from).toFixed(2)}" height="${o.height}" fill="${o.fill}"/>`).join("");
}
function drawLanes() {
  const svg = $("lanes"), view = $("scroll"), height = rows.length * lane + 4;
  svg.style.height = `${height}px`;
  const top = view.scrollTop - lane, bottom = view.scrollTop + view.clientHeight + lane;
  const many = Math.max(2, Math.floor((width() - LEFT) / 110));
  let html = ticks(state.t0, state.t1, many).map((t) => `<line class="grid" x1="${x(t)}" x2="${x(t)}" y1="0" y2="${height}"/>`).join("");
  const pictures = new Map(), picture = (n) => (pictures.has(n) || pictures.set(n, lanePicture(positions[n])), pictures.get(n));
  rows.forEach((r, n) => {
    const y = n * lane, chosen = n === rowOf(state.rank);
    const seen = y + lane >= top && y <= bottom;
    html += `<g class="lane" data-rank="${r}" data-boxes="${positions[at[r]].boxes.length}" transform="translate(0,${y})"><rect class="row${chosen ? " chosen" : ""}" x="0" y="0" width="${width()}" height="${lane}"/>`
      + (seen ? `<rect class="idle" x="${LEFT}" y="3" width="${width() - LEFT - RIGHT}" height="${shape.h}"/>${lane >= 12 || n % 2 === 0 ? `<text x="4" y="${3 + shape.h / 2 + 4}"${chosen ? ' font-weight="700"' : ' class="soft"'}>${grouped() ? ends(positions[at[r]].ranks) : `rank ${r}`}</text>` : ""}${picture(at[r])}` : "") + "</g>";
  });
  svg.innerHTML = `${html}${marked()}<line class="cursor" y1="0" y2="${height}"/>`;
  svg.dataset.lanes = rows.length;
}
/** A frame around the chosen box, and what it sends to other stages and receives from them. */
function marked() {
  const b = positions[at[state.rank]].boxes[state.box];
  if (!b || b.end < state.t0 || b.start > state.t1) return "";
  const own = at[state.rank], from = Math.max(LEFT, x(b.start)), to = Math.min(width() - RIGHT, x(b.end));
  const frame = `<rect class="box chosen" x="${from}" y="${rowOf(state.rank) * lane + 3}" width="${Math.max(1.5, to - from)}" height="${shape.h}" fill="none"/>`;
  return frame + D.messages.filter(([from, to, , , , , f, t]) => (from === own && f === state.box) || (to === own && t === state.box)).map(([from, to, sent, got]) => {
    const r1 = peer(state.rank, from), r2 = peer(state.rank, to), y1 = rowOf(r1) * lane + 3 + shape.h / 2, y2 = rowOf(r2) * lane + 3 + shape.h / 2;
    return `<path class="message" d="M${x(sent).toFixed(1)} ${y1}L${x(got).toFixed(1)} ${y2}"/><circle cx="${x(got).toFixed(1)}" cy="${y2}" r="3" fill="currentColor"/>`;
  }).join("");
}
/** The rank at pipeline position n with the other coordinates of r. */
const peer = (r, n) => positions[n].ranks[positions[at[r]].ranks.indexOf(r)];

function about(r, i) {  // a box in words
  const b = positions[at[r]].boxes[i], held = sum(b.sent.map((s) => s[5]));
  const lines = [`${seconds(b.start, step)} to ${seconds(b.end, step)}, ${seconds(b.end - b.start)}`, `rank ${r}${axes.length ? `: ${place(r)}` : ""}`];
  if (D.schedule) lines.push(`stage ${b.stage}${b.kind === "once" || b.kind === "update" ? "" : `, microbatch ${b.mb}`}`);
  lines.push(plural(b.ops, "op") + (b.sent.length ? `, ${plural(b.sent.length, "collective")} sending ${bytes(sum(b.sent.map((s) => s[4])))}` : ""));
  if (held > 0) lines.push(`waits ${seconds(held)} for collectives`);
  return [b.label === b.part ? b.part : `${b.label}: ${b.part}`, lines];
}
function aboutSent(r, b, s) {
  const lines = [`${seconds(b.start + s[2], step)} to ${seconds(b.start + s[3], step)}, ${seconds(s[3] - s[2])}`, `sends ${bytes(s[4])} over ${s[0]}`];
  lines.push(s[5] > 0 ? `computation waits ${seconds(s[5])} for it` : "hidden behind computation");
  return [`${s[1]} over ${s[0]}, rank ${r}`, lines];
}
function tell([title, lines]) {
  $("readout").innerHTML = `<b>${esc(title)}</b> \u00b7 ${lines.map(esc).join(" \u00b7 ")}`;
}
function tip(event, found) {
  const t = $("tip");
  t.hidden = !found;
  if (!found) return;
  t.innerHTML = `<b>${esc(found[0])}</b>${found[1].map((l) => `<div>${esc(l)}</div>`).join("")}`;
  const { width: w, height: h } = t.getBoundingClientRect();
  t.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - w - 8))}px`;
  t.style.top = `${event.clientY + 18 + h > innerHeight ? event.clientY - h - 10 : event.clientY + 18}px`;
}
function hit(event) {
  const area = $("lanes").getBoundingClientRect(), px = event.clientX - area.left, py = event.clientY - area.top;
  const n = Math.floor(py / lane), r = rows[n], t = time(px);
  if (r === undefined) return null;
  const { boxes } = positions[at[r]], inside = px >= LEFT;
  const i = after(boxes, t), on = inside && i < boxes.length && boxes[i].start <= t;
  const row = Math.floor((py - n * lane - 3 - shape.h) / (shape.strip || 1));
  let sent = null;
  if (inside && shape.strip && row >= 0 && row < talking.length) {
    const slack = (2 / (width() - LEFT - RIGHT)) * (state.t1 - state.t0);
    for (const b of boxes.slice(Math.max(0, i - 2), i + 1)) for (const s of b.sent) if (whole(s[0]) === talking[row] && b.start + s[2] - slack <= t && t <= b.start + s[3] + slack) sent = [b, s];
  }
  return { r, t: inside ? t : null, i: on && row < 0 ? i : -1, sent };
}
function choose(r, i = -1) {
  state.rank = r; state.box = i;
  const y = rowOf(r) * lane, view = $("scroll");
  if (y < view.scrollTop) view.scrollTop = y;
  if (y + lane > view.scrollTop + view.clientHeight) view.scrollTop = y + lane - view.clientHeight;
  if (i >= 0) {
    const b = positions[at[r]].boxes[i], span = state.t1 - state.t0;
    tell(about(r, i));
    if (b.start < state.t0 || b.end > state.t1) show(b.start - Math.max(0, span - (b.end - b.start)) / 2, b.start - Math.max(0, span - (b.end - b.start)) / 2 + span);
  } else {
    const p = positions[at[r]];
    tell([`rank ${r}`, [axes.length ? place(r) : "the only one", plural(p.boxes.length, "box").replace("boxs", "boxes"), `busy ${percent(sum(p.boxes.map((b) => b.end - b.start)) / step)} of the step`, `peak ${bytes(p.peak.bytes)}`]]);
  }
  drawMesh(); drawHolds(); drawCollectives(); drawMoved(); redraw();
}
function steer() {
  const view = $("scroll"), whole_ = $("timeline");
  view.addEventListener("wheel", (e) => {
    if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) {
      const by = ((e.deltaX || e.deltaY) / width()) * (state.t1 - state.t0);
      if (show(state.t0 + by, state.t1 + by)) e.preventDefault();
    } else if (zoom(Math.exp(Math.max(-60, Math.min(60, e.deltaY)) * 0.004), time(e.clientX - view.getBoundingClientRect().left))) e.preventDefault();
  }, { passive: false });
  view.addEventListener("scroll", redraw);
  let drag = null;
  view.addEventListener("pointerdown", (e) => { if (e.button === 0) drag = { x: e.clientX, y: e.clientY, t0: state.t0, t1: state.t1, top: view.scrollTop, moved: false }; });
  addEventListener("pointermove", (e) => {
    if (!drag) return;
    const dx = e.clientX - drag.x;
    if (Math.abs(dx) + Math.abs(e.clientY - drag.y) > 4) { drag.moved = true; view.classList.add("drag"); }
    if (!drag.moved) return;
    const by = (dx / (width() - LEFT - RIGHT)) * (drag.t1 - drag.t0);
    view.scrollTop = drag.top - (e.clientY - drag.y);
    show(drag.t0 - by, drag.t1 - by);
  });
  addEventListener("pointerup", (e) => {
    if (drag && !drag.moved) { const found = hit(e); if (found) choose(found.r, found.i); }
    drag = null; view.classList.remove("drag");
  });
  view.addEventListener("pointermove", (e) => {
    const found = drag && drag.moved ? null : hit(e);
    hover(found ? found.t : null);
    tip(e, found && (found.sent ? aboutSent(found.r, ...found.sent) : found.i >= 0 ? about(found.r, found.i) : null));
  });
  view.addEventListener("pointerleave", (e) => { hover(null); tip(e, null); });
  whole_.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const span = state.t1 - state.t0, boxes = positions[at[state.rank]].boxes, i = state.box;
    const keys = {
      "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), 0: () => show(0, step), Home: () => show(0, span), End: () => show(step - span, step),
      ArrowLeft: () => show(state.t0 - span / 8, state.t1 - span / 8), ArrowRight: () => show(state.t0 + span / 8, state.t1 + span / 8),
      ArrowUp: () => choose(rows[Math.max(0, rowOf(state.rank) - 1)]), ArrowDown: () => choose(rows[Math.min(rows.length - 1, rowOf(state.rank) + 1)]),
      ".": () => choose(state.rank, Math.min(boxes.length - 1, i + 1)), ",": () => choose(state.rank, i < 0 ? boxes.length - 1 : Math.max(0, i - 1)),
      Escape: () => choose(state.rank),
    };
    if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
  });
  $("in").onclick = () => zoom(0.6);
  $("out").onclick = () => zoom(1 / 0.6);
  $("fit").onclick = () => show(0, step);
  $("group").hidden = positions.length === ranks;
  $("group").onclick = () => {
    layLanes(!grouped());
    $("group").setAttribute("aria-pressed", grouped());
    front();
    choose(state.rank, state.box);
  };
  addEventListener("resize", redraw);
}
