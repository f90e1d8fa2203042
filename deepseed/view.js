// Memory, mesh, tables and the head of the page; and the start of all.
// memory ------------------------------------------------------------------------------------------------------------
const highest = Math.max(1, D.budget || 0, ...positions.map((p) => p.peak.bytes));
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
    if (D.budget) html += `<line class="budget" x1="${L}" x2="${w - RIGHT}" y1="${Y(D.budget)}" y2="${Y(D.budget)}"/><text class="soft" x="${w - RIGHT}" y="${Y(D.budget) + 12}" text-anchor="end">budget ${bytes(D.budget)}</text>`;
    for (const t of ticks(state.t0, state.t1, Math.max(2, Math.floor((w - L) / 130)))) html += `<text class="soft" x="${X(t)}" y="${H - 4}" text-anchor="middle">${label(t)}</text>`;
    html += `<line class="cursor" style="display:none" y1="0" y2="${H - 18}"/>`;
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
      if (t < state.t0 || t > state.t1) { hover(null); tip(e, null); return; }
      const i = Math.max(0, p.memory.time.findLastIndex((s) => s <= t)), live = p.memory.live.map((row) => row[i]);
      hover(t);
      tip(e, [`${bytes(sum(live))} at ${seconds(t, step)}`, [named(p.ranks), `while ${p.memory.op[i]} runs`, ...D.kinds.map((k, j) => `${k}: ${bytes(live[j])}`).filter((_, j) => live[j])]]);
    });
    svg.addEventListener("pointerleave", (e) => { hover(null); tip(e, null); });
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

function drawMoved() {
  const own = positions[at[state.rank]], most = Math.max(1, ...own.moved.map((m) => m[1]));
  $("s-moved").hidden = !positions.some((p) => p.host);
  $("mover").textContent = `What rank ${state.rank} moves in a step, in both directions; its host holds ${bytes(own.host)} at most. Hidden: the part of the moves' time in which it computes, estimated.`;
  $("moved").innerHTML = table(["what", "#bytes", "#hidden", ""], own.moved.map(([kind, n, part]) => row([kind, [bytes(n), "n"], [percent(part), "n"],
    `<div class="bar"><i style="width:${((100 * n) / most).toFixed(1)}%;background:${css("a4")}"></i></div>`])));
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
  $("meaning").textContent = `plan ${D.plan || "zero0"}, ZeRO stage ${D.zero}, ${plural(ranks, "rank")}${mesh ? `: ${mesh}` : ""}${S ? `; ${S.stages > 1 ? `${S.name}, ${S.stages} stages, ` : ""}${S.microbatches} microbatch${S.microbatches === 1 ? "" : "es"}` : ""}`;
  const held = Math.max(...positions.map((p) => sum(p.boxes.flatMap((b) => b.sent.map((s) => s[5])))));
  const busy = sum(positions.map((p) => sum(p.boxes.map((b) => b.end - b.start)))) / (positions.length * step);
  const heavy = positions.reduce((a, b) => (b.peak.bytes > a.peak.bytes ? b : a));
  const sends = positions.map((p, n) => sum(p.collectives.map((c) => c.bytes)) + sum(D.messages.filter((m) => m[0] === n).map((m) => m[4])));
  const most = sends.indexOf(Math.max(...sends)), sent = sends[most], works = positions.reduce((a, b) => (b.flops > a.flops ? b : a)), tiles = [
    ["ranks", ranks, mesh || "one device"], ["time of a step", seconds(step), "estimated"],
    pp > 1 ? ["bubble", percent(1 - busy), "of the lanes' time, estimated"] : ["waiting", percent(held / step), "of the step, for collectives"],
    ["peak memory", bytes(heavy.peak.bytes), named(heavy.ranks)], ["sent by a rank", bytes(sent), `a step; ${named(positions[most].ranks)}`],
    ["matmuls of a rank", flops(works.flops), `${percent(works.flops / (D.flops_one_device || 1))} of one device's`],
  ];
  $("tiles").innerHTML = tiles.map(([k, v, more]) => `<div><dt>${k}</dt><dd>${esc(v)} <small>${esc(more)}</small></dd></div>`).join("");
  const there = new Set(positions.flatMap((p) => p.boxes.map((b) => b.kind))), kinds = ["forward", "backward", "weights", "update", "once"].filter((k) => there.has(k));
  $("kinds").innerHTML = kinds.map((k) => `<li><i style="background:${css(k)}"></i>${k === "once" ? "once a step" : k}</li>`).join("") + (shape.strip ? talking.map((a) => `<li><i class="strip" style="background:${colour(a)}"></i>${between.includes(a) ? `moved ${a.replace("_", " ")}` : `sent over ${a}`}</li>`).join("") : "")
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
