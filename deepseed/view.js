"use strict";
(() => {
const D = JSON.parse(document.getElementById("figures").textContent);
const $ = (id) => document.getElementById(id);
const esc = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const sum = (xs) => xs.reduce((a, b) => a + b, 0);
const css = (name) => `var(--${name})`;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const box = ([label, kind, part, stage, mb, start, end, ops, body]) => ({ label, kind, part, stage, mb, start, end, ops, sent: D.bodies[body] });

const positions = D.positions.map((p) => ({ ...p, boxes: p.boxes.map(box) }));
const at = [];  // rank -> its position
positions.forEach((p, n) => p.ranks.forEach((r) => { at[r] = n; }));
const ranks = D.ranks.length;
const axes = D.mesh.map(([name]) => name);
const whole = (axis) => axis.replace(/_\d+$/, "");
const talking = [...new Set(positions.flatMap((p) => p.boxes.flatMap((b) => b.sent.map((s) => whole(s[0])))))].sort((a, b) => axes.indexOf(a) - axes.indexOf(b));
const colour = (axis) => css(`a${Math.max(0, axes.filter((a) => a !== "pp").indexOf(whole(axis))) % 5}`);
const pp = D.schedule ? D.schedule.lanes : 1;

// numbers -----------------------------------------------------------------------------------------------------------
function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let u = 0;
  while (Math.abs(n) >= 1024 && u < 5) { n /= 1024; u += 1; }
  return `${u === 0 ? Math.round(n) : n.toFixed(1)} ${units[u]}`;
}
function seconds(t, scale = Math.abs(t)) {
  const [by, unit] = scale >= 1 ? [1, "s"] : scale >= 1e-3 ? [1e3, "ms"] : [1e6, "\u00b5s"];
  const v = t * by;
  return `${v.toFixed(scale * by >= 100 ? 1 : scale * by >= 10 ? 2 : 3)} ${unit}`;
}
function flops(n) {
  const units = ["", "k", "M", "G", "T", "P", "E"];
  let u = 0;
  while (n >= 1000 && u < 6) { n /= 1000; u += 1; }
  return `${n.toFixed(u ? 2 : 0)} ${units[u]}FLOP`;
}
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;
/** [0, 1, 2, 5] -> "0-2, 5" */
function listed(rs) {
  const out = [];
  for (let i = 0, j; i < rs.length; i = j) {
    for (j = i + 1; j < rs.length && rs[j] === rs[j - 1] + 1; j += 1);
    out.push(j - i > 2 ? `${rs[i]}\u2013${rs[j - 1]}` : rs.slice(i, j).join(", "));
  }
  return out.join(", ");
}
const ends = (rs) => (rs.length > 1 ? `${rs[0]} \u2026 ${rs[rs.length - 1]}` : `rank ${rs[0]}`);
const named = (rs) => `rank${rs.length > 1 ? "s" : ""} ${listed(rs)}`;
const place = (r) => Object.entries(D.ranks[r]).map(([a, i]) => `${a}=${i}`).join(", ");

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
  requestAnimationFrame(() => { asked = false; drawAxis(); drawLanes(); drawMemory(); });
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

const chosen = (r, i) => i === state.box && rowOf(r) === rowOf(state.rank);
function lanePicture(r) {
  const { boxes } = positions[at[r]], y = rowOf(r) * lane + 3, out = [];
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
    if (wide < 1.5 && !(chosen(r, i))) { thin(css(b.kind), from, to, y, shape.h); continue; }
    for (const [, , , e, , wait] of b.sent) {  // the end of a collective that computation stands still for
      const f = Math.max(from, x(b.start + e - wait)), t = Math.min(to, x(b.start + e));
      if (wait > 0 && t > f) held.push(`M${f.toFixed(2)} ${y}H${t.toFixed(2)}V${y + shape.h}H${f.toFixed(2)}Z`);
    }
    const mark = chosen(r, i) ? " chosen" : "";
    out.push({ html: `<rect class="box${mark}" data-box="${i}" x="${from.toFixed(2)}" y="${y}" width="${wide.toFixed(2)}" height="${shape.h}" fill="${css(b.kind)}"${shade(b)}/>` + (held.length ? `<path class="held" d="${held.join("")}"/>` : "")
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
  rows.forEach((r, n) => {
    const y = n * lane, chosen = n === rowOf(state.rank);
    const seen = y + lane >= top && y <= bottom;
    html += `<g class="lane" data-rank="${r}" data-boxes="${positions[at[r]].boxes.length}"><rect class="row${chosen ? " chosen" : ""}" x="0" y="${y}" width="${width()}" height="${lane}"/>`
      + (seen ? `<rect class="idle" x="${LEFT}" y="${y + 3}" width="${width() - LEFT - RIGHT}" height="${shape.h}"/>${lane >= 12 || n % 2 === 0 ? `<text x="4" y="${y + 3 + shape.h / 2 + 4}"${chosen ? ' font-weight="700"' : ' class="soft"'}>${grouped() ? ends(positions[at[r]].ranks) : `rank ${r}`}</text>` : ""}${lanePicture(r)}` : "") + "</g>";
  });
  if (state.hover !== null && state.hover >= state.t0 && state.hover <= state.t1) html += `<line class="cursor" x1="${x(state.hover)}" x2="${x(state.hover)}" y1="0" y2="${height}"/>`;
  svg.innerHTML = html + messages();
  svg.dataset.lanes = rows.length;
}
/** What the chosen box sends to other stages and receives from them. */
function messages() {
  const b = positions[at[state.rank]].boxes[state.box];
  if (!b) return "";
  const own = at[state.rank];
  return D.messages.filter(([from, to, , , , , f, t]) => (from === own && f === state.box) || (to === own && t === state.box)).map(([from, to, sent, got]) => {
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
  drawMesh(); drawHolds(); drawCollectives(); redraw();
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
    state.hover = found ? found.t : null;
    tip(e, found && (found.sent ? aboutSent(found.r, ...found.sent) : found.i >= 0 ? about(found.r, found.i) : null));
    redraw();
  });
  view.addEventListener("pointerleave", (e) => { state.hover = null; tip(e, null); redraw(); });
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

// memory ------------------------------------------------------------------------------------------------------------
const highest = Math.max(1, ...positions.map((p) => p.peak.bytes));
function drawMemory() {
  const unit = 1024 ** Math.floor(Math.log(highest) / Math.log(1024)), by = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 4, 5, 10, 20, 50, 100, 200, 250].find((k) => highest / (k * unit) <= 4.4) * unit;
  positions.forEach((p, n) => {
    const svg = $(`memory-${n}`), H = positions.length === 1 ? 210 : 150, w = Math.max(200, svg.parentElement.clientWidth), L = LEFT;
    const X = (t) => L + ((t - state.t0) / (state.t1 - state.t0)) * (w - L - RIGHT), Y = (b) => H - 18 - (b / (highest * 1.06)) * (H - 24);
    const { time: ts, live } = p.memory, to = (i) => (i + 1 < ts.length ? ts[i + 1] : Math.max(step, ts[i]));
    let lo = 0, hi = ts.length;
    while (lo + 1 < ts.length && ts[lo + 1] <= state.t0) lo += 1;
    while (hi > lo + 1 && ts[hi - 1] >= state.t1) hi -= 1;
    const base = new Float64Array(ts.length);
    let html = "";
    for (let k = 0; k * by <= highest * 1.06; k += 1) html += `<line class="grid" x1="${L}" x2="${w - RIGHT}" y1="${Y(k * by)}" y2="${Y(k * by)}"/><text class="soft" x="${L - 6}" y="${Y(k * by) + 4}" text-anchor="end">${k ? bytes(k * by).replace(".0 ", " ") : 0}</text>`;
    const clamp = (px) => Math.max(L, Math.min(w - RIGHT, px)).toFixed(1);
    live.forEach((row, k) => {
      let up = "", down = "";
      for (let i = lo; i < hi; i += 1) {
        const a = clamp(X(ts[i])), b = clamp(X(to(i)));
        down = `L${b} ${Y(base[i]).toFixed(1)}L${a} ${Y(base[i]).toFixed(1)}${down}`;
        base[i] += row[i];
        up += `${i === lo ? "M" : "L"}${a} ${Y(base[i]).toFixed(1)}L${b} ${Y(base[i]).toFixed(1)}`;
      }
      if (up) html += `<path d="${up}${down}Z" fill="${css(`m${k}`)}"/>`;
    });
    if (p.peak.time >= state.t0 && p.peak.time <= state.t1) html += `<line class="peak" x1="${L}" x2="${w - RIGHT}" y1="${Y(p.peak.bytes)}" y2="${Y(p.peak.bytes)}"/><circle cx="${X(p.peak.time)}" cy="${Y(p.peak.bytes)}" r="3.5" fill="var(--ink)"/>`;
    for (const t of ticks(state.t0, state.t1, Math.max(2, Math.floor((w - L) / 130)))) html += `<text class="soft" x="${X(t)}" y="${H - 4}" text-anchor="middle">${label(t)}</text>`;
    if (state.hover !== null && state.hover >= state.t0 && state.hover <= state.t1) html += `<line class="cursor" x1="${X(state.hover)}" x2="${X(state.hover)}" y1="0" y2="${H - 18}"/>`;
    svg.style.height = `${H}px`;
    svg.innerHTML = html;
  });
}
function makeMemory() {
  $("memory").innerHTML = positions.map((p, n) => `<figure><figcaption><b>${named(p.ranks)}</b> \u00b7 peak ${bytes(p.peak.bytes)} at ${seconds(p.peak.time, step)}, <span class="mono">${esc(p.peak.op)}</span></figcaption>`
    + `<svg id="memory-${n}" role="img" aria-label="${esc(`memory of ${named(p.ranks)}: peak ${bytes(p.peak.bytes)} at ${seconds(p.peak.time, step)}; at the peak ${D.kinds.map((k) => `${k} ${bytes(p.peak.live[k])}`).join(", ")}`)}"></svg></figure>`).join("");
  positions.forEach((p, n) => {
    const svg = $(`memory-${n}`);
    svg.addEventListener("pointermove", (e) => {
      const area = svg.getBoundingClientRect(), t = state.t0 + ((e.clientX - area.left - LEFT) / (area.width - LEFT - RIGHT)) * (state.t1 - state.t0);
      if (t < state.t0 || t > state.t1) { state.hover = null; tip(e, null); redraw(); return; }
      const i = Math.max(0, p.memory.time.findLastIndex((s) => s <= t)), live = p.memory.live.map((row) => row[i]);
      state.hover = t;
      tip(e, [`${bytes(sum(live))} at ${seconds(t, step)}`, [named(p.ranks), `while ${p.memory.op[i]} runs`, ...D.kinds.map((k, j) => `${k}: ${bytes(live[j])}`).filter((_, j) => live[j])]]);
      redraw();
    });
    svg.addEventListener("pointerleave", (e) => { state.hover = null; tip(e, null); redraw(); });
  });
}

// mesh and bytes ----------------------------------------------------------------------------------------------------
function drawMesh() {
  const rank = (where) => axes.reduce((n, a, k) => n * D.mesh[k][1] + where[k], 0);
  const own = axes.map((a) => D.ranks[state.rank][a]);
  const border = (r) => { const w = axes.map((a) => D.ranks[r][a]), far = axes.filter((_, k) => w[k] !== own[k]); return far.length === 1 ? (far[0] === "pp" ? css("accent") : colour(far[0])) : "transparent"; };
  const cell = (r) => `<button type="button" data-rank="${r}" tabindex="${r === state.rank ? 0 : -1}" aria-pressed="${r === state.rank}" aria-label="rank ${r}${axes.length ? `: ${place(r)}` : ""}" style="border-color:${border(r)}">${r}</button>`;
  const [cols, rows, blocks] = [axes.length - 1, axes.length - 2, D.mesh.slice(0, -2)];
  let html = "";
  if (axes.length < 2) {
    html = `<div class="mesh" style="grid-template-columns:repeat(${Math.min(ranks, 12)},auto)">${Array.from({ length: ranks }, (_, r) => cell(r)).join("")}</div>`;
  } else {
    const wheres = blocks.reduce((all, [, n]) => all.flatMap((w) => Array.from({ length: n }, (_, i) => [...w, i])), [[]]);
    html = wheres.map((w) => {
      const R = D.mesh[rows][1], C = D.mesh[cols][1];
      let grid = `<span></span>${Array.from({ length: C }, (_, c) => `<span style="text-align:center">${axes[cols]}=${c}</span>`).join("")}`;
      for (let i = 0; i < R; i += 1) grid += `<span>${axes[rows]}=${i}</span>${Array.from({ length: C }, (_, c) => cell(rank([...w, i, c]))).join("")}`;
      return `<div class="block">${w.length ? `<p>${w.map((i, k) => `${axes[k]}=${i}`).join(", ")}</p>` : ""}<div class="mesh" style="grid-template-columns:repeat(${C + 1},auto)">${grid}</div></div>`;
    }).join("");
  }
  const focused = document.activeElement && document.activeElement.closest("#mesh");
  $("mesh").innerHTML = `<div class="blocks">${html}</div>`;
  if (focused) $("mesh").querySelector('[aria-pressed="true"]').focus();
  const groups = axes.map((a, k) => [a, D.ranks.map((w, r) => r).filter((r) => axes.every((b, j) => j === k || D.ranks[r][b] === own[j]))]).filter(([, g]) => g.length > 1);
  $("peers").innerHTML = `<b>rank ${state.rank}</b>${axes.length ? ` (${place(state.rank)})` : ""}${groups.map(([a, g]) => ` \u00b7 <span style="color:${a === "pp" ? css("accent") : colour(a)}">${a}</span> with ${named(g.filter((r) => r !== state.rank))}`).join("")}`;
}
function drawHolds() {
  const bar = (p) => `<div class="bar">${D.kinds.map((k, j) => `<i style="width:${((100 * p.peak.live[k]) / highest).toFixed(2)}%;background:${css(`m${j}`)}" title="${k} ${bytes(p.peak.live[k])}"></i>`).join("")}</div>`;
  const rows = positions.map((p) => `<tr><th scope="row">${named(p.ranks)}</th><td style="width:99%">${bar(p)}</td><td class="n">${bytes(p.peak.bytes)}</td></tr>`).join("");
  const own = positions[at[state.rank]].peak;
  const kinds = D.kinds.map((k, j) => `<tr><td><i class="dot" style="background:${css(`m${j}`)}"></i>${k}</td><td class="n">${bytes(own.live[k])}</td><td class="n">${percent(own.live[k] / (own.bytes || 1))}</td></tr>`).join("");
  $("holds").innerHTML = `<table>${rows}</table><table style="margin-top:8px"><caption>rank ${state.rank}</caption>${kinds}<tr class="sum"><td>peak</td><td class="n">${bytes(own.bytes)}</td><td></td></tr></table>`;
}

function drawCollectives() {
  const rows = positions[at[state.rank]].collectives, most = Math.max(1, ...rows.map((c) => c.bytes));
  $("sender").textContent = `What rank ${state.rank} sends in a step.`;
  $("collectives").innerHTML = rows.length ? table(["axis", "collective", "#count", "#bytes", ""], [
    ...rows.map((c) => row([`<i class="dot" style="background:${colour(c.axis)}"></i>${esc(c.axis)}`, esc(c.op), [c.count, "n"], [bytes(c.bytes), "n"],
      `<div class="bar"><i style="width:${((100 * c.bytes) / most).toFixed(1)}%;background:${colour(c.axis)}"></i></div>`])),
    `<tr class="sum"><td>all</td><td></td><td class="n">${sum(rows.map((c) => c.count))}</td><td class="n">${bytes(sum(rows.map((c) => c.bytes)))}</td><td></td></tr>`]) : "<p>None: no rank talks to another within a stage.</p>";
}

// tables ------------------------------------------------------------------------------------------------------------
const table = (heads, rows) => `<table><thead><tr>${heads.map((h) => `<th scope="col"${h[0] === "#" ? ' class="n"' : ""}>${h.replace(/^#/, "")}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
const row = (cells) => `<tr>${cells.map((c) => (Array.isArray(c) ? `<td class="${c[1]}">${c[0]}</td>` : `<td>${c}</td>`)).join("")}</tr>`;
function tables() {
  const strip = (n, of, fill) => `<div class="bar"><i style="width:${((100 * n) / of).toFixed(1)}%;background:${fill}"></i></div>`;
  $("s-transfers").hidden = !D.transfers.length;
  const far = Math.max(1, ...D.transfers.map((t) => t.bytes)), small = D.transfers.filter((t) => t.times === 1 && t.bytes < far / 100), large = D.transfers.filter((t) => !small.includes(t));
  $("transfers").innerHTML = table(["stages", "in", "#values", "#bytes", ""], [
    ...large.map((t) => row([`${t.source} \u2192 ${t.stage}`, esc(t.part), [`${t.values}${t.times > 1 ? ` \u00d7 ${t.times}` : ""}`, "n"], [bytes(t.bytes), "n"], strip(t.bytes, far, css("accent"))])),
    ...(small.length ? [row([`${small.length} pairs`, [...new Set(small.map((t) => esc(t.part)))].sort().join(", "), [sum(small.map((t) => t.values)), "n"], [bytes(sum(small.map((t) => t.bytes))), "n"], ""])] : [])]);
  const unit = (v, u) => (u === "bytes" ? bytes(v) : flops(v));
  $("closed").innerHTML = table(["of one rank", "#counted", "formula", "#gives", "#ratio"], D.closed_forms.map((c) => row([esc(c.what), [unit(c.counted, c.unit), "n"], [esc(c.formula), "mono"], [c.expected === null ? "" : unit(c.expected, c.unit), "n"], [c.expected ? (c.counted / c.expected).toFixed(3) : "", "n"]])));
  $("weights").innerHTML = table(["weight", "#count", "stored as", "split in use"], D.weights.map((w) => row([[esc(w.key), "mono"], [w.count, "n"], [esc(w.layout), "mono"], esc(w.use)])));
  $("s-whole").hidden = !D.left_whole.length;
  $("whole").innerHTML = table(["axis", "what", "why", "#times"], D.left_whole.map((w) => row([esc(w.axis), [esc(w.what), "mono"], esc(w.why), [w.count, "n"]])));
  $("boxes").addEventListener("toggle", () => {
    $("boxes").querySelector("div").innerHTML = positions.map((p) => `<h3 class="small">${named(p.ranks)}</h3>${table(["instruction", "part", "#stage", "#microbatch", "#from", "#to", "#time", "#ops", "#sent"], p.boxes.map((b) => row([esc(b.label), esc(b.part), [b.stage, "n"], [b.mb, "n"], [seconds(b.start, step), "n"], [seconds(b.end, step), "n"], [seconds(b.end - b.start), "n"], [b.ops, "n"], [bytes(sum(b.sent.map((s) => s[4]))), "n"]])))}`).join("");
  }, { once: true });
}
function front() {
  const mesh = D.mesh.map(([a, n]) => `${a} ${n}`).join(" \u00d7 "), m = D.machine, S = D.schedule;
  const call = /^(?:hf:)?([\w./-]+(?::\w+)?)(?:\((.*)\))?$/.exec(D.title);
  $("title").textContent = call ? call[1] : D.title || "a program";
  $("said").textContent = call && call[2] ? call[2].replace(/,(?=\S)/g, ", ") : "";
  $("meaning").textContent = `plan ${D.plan || "zero0"}, ZeRO stage ${D.zero}, ${plural(ranks, "rank")}${mesh ? `: ${mesh}` : ""}${S ? `; ${S.name}, ${plural(S.stages, "stage")}, ${plural(S.microbatches, "microbatch").replace("batchs", "batches")}` : ""}`;
  const held = Math.max(...positions.map((p) => sum(p.boxes.flatMap((b) => b.sent.map((s) => s[5])))));
  const busy = sum(positions.map((p) => sum(p.boxes.map((b) => b.end - b.start)))) / (positions.length * step);
  const heavy = positions.reduce((a, b) => (b.peak.bytes > a.peak.bytes ? b : a));
  const sends = positions.map((p, n) => sum(p.collectives.map((c) => c.bytes)) + sum(D.messages.filter((m) => m[0] === n).map((m) => m[4])));
  const most = sends.indexOf(Math.max(...sends)), sent = sends[most], works = positions.reduce((a, b) => (b.flops > a.flops ? b : a)), tiles = [
    ["ranks", ranks, mesh || "one device"], ["time of a step", seconds(step), "estimated"],
    S ? ["bubble", percent(1 - busy), "of the lanes' time, estimated"] : ["waiting", percent(held / step), "of the step, for collectives"],
    ["peak memory", bytes(heavy.peak.bytes), named(heavy.ranks)], ["sent by a rank", bytes(sent), `a step; ${named(positions[most].ranks)}`],
    ["matmuls of a rank", flops(works.flops), `${percent(works.flops / (D.flops_one_device || 1))} of one device's`],
  ];
  $("tiles").innerHTML = tiles.map(([k, v, more]) => `<div><dt>${k}</dt><dd>${esc(v)} <small>${esc(more)}</small></dd></div>`).join("");
  const kinds = [...new Set(positions.flatMap((p) => p.boxes.map((b) => b.kind)))];
  $("kinds").innerHTML = kinds.map((k) => `<li><i style="background:${css(k)}"></i>${k === "once" ? "once a step" : k}</li>`).join("") + (shape.strip ? talking.map((a) => `<li><i class="strip" style="background:${colour(a)}"></i>sent over ${a}</li>`).join("") : "")
    + (held > 0 ? '<li><i class="pale"></i>pale: waits for a collective</li>' : "");
  $("memory-kinds").innerHTML = D.kinds.map((k, j) => `<li><i style="background:${css(`m${j}`)}"></i>${k}</li>`).join("");
  $("lanes").setAttribute("aria-label", `timeline of one step, ${plural(ranks, "lane")}, ${seconds(step)}: ${positions.map((p) => `${named(p.ranks)} busy ${percent(sum(p.boxes.map((b) => b.end - b.start)) / step)}`).join("; ")}`);
  $("footer").textContent = `Bytes and flops are counted on the program. Times are estimates for a rank that computes ${flops(m.flops)}/s in matmuls, reads and writes ${bytes(m.memory)}/s of memory and sends ${bytes(m.link)}/s, with ${seconds(m.latency)} to start a collective and ${seconds(m.launch)} to start an op.`;
}

layLanes(false); front(); tables(); makeMemory(); steer(); choose(0);
$("readout").textContent = "";
$("mesh").addEventListener("click", (e) => { const b = e.target.closest("button"); if (b) choose(+b.dataset.rank); });
$("mesh").addEventListener("keydown", (e) => {
  const cols = axes.length ? D.mesh[axes.length - 1][1] : 1, by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cols, ArrowDown: cols }[e.key];
  if (by === undefined) return;
  e.preventDefault();
  choose(Math.max(0, Math.min(ranks - 1, state.rank + by)));
});
})();
