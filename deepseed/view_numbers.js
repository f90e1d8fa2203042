// The figures of the page, and how numbers are written. The scripts of the page are one module: view.py joins them in this order.
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
const between = ["to_host", "to_device"];  // moves of a rank's own, between its memories
const colour = (axis) => between.includes(axis) ? css("a4") : css(`a${Math.max(0, axes.filter((a) => a !== "pp").indexOf(whole(axis))) % 5}`);
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
  return `${u ? n.toPrecision(3) : n} ${units[u]}FLOP`;
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
