// Pictures of the machine: which part lies where, and what a verify pass of n rows takes.

import { bytes, draw, find, make } from "./page.js";

const WIDTH = 640;

/** The parts of a model by place, from its ``placement``. */
function partsOf(placement) {
  const { target, drafter, gpu_layers: upper } = placement;
  const total = target.layers + (upper?.layers ?? 0);
  const share = (layers) => (target.weight_bytes ?? 0) * (layers / total);
  const parts = [{
    kind: "layers", device: target.device, bytes: target.weight_bytes ?? 0,
    name: `the target, ${upper ? `all ${total}` : target.layers} layers in ${target.weights}`,
  }];
  if (target.kv_bytes) parts.push({ kind: "kv", device: target.device, bytes: target.kv_bytes, name: "room for keys and values" });
  if (upper?.layers) {
    parts.push({ kind: "layers", device: upper.device, bytes: share(upper.layers), name: `its last ${upper.layers} layers` });
  }
  if (drafter) parts.push({ kind: "drafter", device: drafter.device, bytes: drafter.bytes ?? 0, name: "the drafter" });
  return parts;
}

export function drawPlacement(placement) {
  const parts = partsOf(placement);
  const places = [...new Set(["cpu", ...parts.map((part) => part.device)])];
  const most = Math.max(...places.map((place) => parts.filter((p) => p.device === place).reduce((sum, p) => sum + p.bytes, 0)), 1);
  const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${places.length * 74 + 6}`, role: "img", "aria-labelledby": "placement-text" });
  places.forEach((place, row) => {
    const top = row * 74 + 24;
    picture.append(draw("text", { x: 0, y: top - 8 }, place === "cpu" ? "main memory, the CPU computes" : place));
    picture.append(draw("rect", { x: 0.5, y: top, width: WIDTH - 1, height: 34, class: "place" }));
    let left = 0.5;
    for (const part of parts.filter((p) => p.device === place)) {
      const width = Math.max((part.bytes / most) * (WIDTH - 1), 3);
      const label = `${part.name}, ${bytes(part.bytes)}`;
      picture.append(draw("rect", { x: left, y: top, width, height: 34, class: part.kind }, draw("title", {}, label)));
      left += width;
    }
  });
  const legend = make("ul", { class: "parts" }, ...parts.map((part) => {
    const swatch = draw("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" });
    swatch.append(draw("rect", { width: 10, height: 10, class: part.kind }));
    return make("li", {}, swatch, ` ${part.name}: ${bytes(part.bytes)}, ${part.device}`);
  }));
  find("placement").replaceChildren(picture, legend);
  find("placement-text").textContent = placement.reason || placement.gpu_layers?.reason || placement.drafter?.reason
    || parts.map((part) => `${part.name} on ${part.device}`).join("; ");
}

export function drawCurve(verifyMs) {
  const points = Object.entries(verifyMs).map(([rows, ms]) => [Number(rows), ms]).sort((a, b) => a[0] - b[0]);
  find("curve-details").hidden = !points.length;
  if (!points.length) {
    find("curve").replaceChildren();
    find("curve-text").textContent = "Not measured: rows are not chosen by cost here.";
    return;
  }
  const [mostRows, mostMs] = [points.at(-1)[0], Math.max(...points.map((point) => point[1])) * 1.15];
  const x = (rows) => 50 + ((WIDTH - 70) * rows) / mostRows;
  const y = (ms) => 230 - (210 * ms) / mostMs;
  const picture = draw("svg", { viewBox: `0 0 ${WIDTH} 275`, role: "img", "aria-labelledby": "curve-text" });
  const step = niceStep(mostMs / 4);
  for (let ms = 0; ms < mostMs; ms += step) {
    picture.append(draw("line", { x1: 50, x2: WIDTH - 20, y1: y(ms), y2: y(ms), class: "grid" }));
    picture.append(draw("text", { x: 44, y: y(ms) + 4, "text-anchor": "end", class: "soft" }, `${Number(ms.toFixed(3))}`));
  }
  const first = points[0][1] / points[0][0];
  const end = Math.min(mostRows, mostMs / first);
  picture.append(draw("path", { d: `M${x(0)} ${y(0)}L${x(end)} ${y(end * first)}`, class: "linear" }));
  picture.append(draw("text", { x: x(end) - 6, y: y(end * first) + 14, "text-anchor": "end", class: "soft" }, "n × T(1)"));
  picture.append(draw("path", { d: points.map(([rows, ms], i) => `${i ? "L" : "M"}${x(rows)} ${y(ms)}`).join(""), class: "line" }));
  let labelled = -99;
  for (const [rows, ms] of points) {
    picture.append(draw("circle", { cx: x(rows), cy: y(ms), r: 4, class: "dot" }, draw("title", {}, `${rows} rows: ${ms.toFixed(2)} ms`)));
    if (x(rows) - labelled < 26) continue;
    picture.append(draw("text", { x: x(rows), y: 250, "text-anchor": "middle", class: "soft" }, `${rows}`));
    labelled = x(rows);
  }
  picture.append(draw("text", { x: WIDTH - 20, y: 270, "text-anchor": "end", class: "soft" }, "rows of a pass"));
  picture.append(draw("text", { x: 4, y: 14, class: "soft" }, "ms"));
  find("curve").replaceChildren(picture);
  const [last, ms] = points.at(-1);
  find("curve-text").textContent = `A pass over ${last} rows takes ${ms.toFixed(1)} ms, ${(ms / first).toFixed(2)} times `
    + `one of 1 row (${first.toFixed(1)} ms). The dashed line is what that many passes of one row would take.`;
  find("curve-table").tBodies[0].replaceChildren(...points.map(([rows, time]) => make("tr", {},
    make("td", {}, `${rows}`), make("td", {}, time.toFixed(2)), make("td", {}, (time / first).toFixed(2)))));
}

function niceStep(about) {
  const power = 10 ** Math.floor(Math.log10(about));
  return [1, 2, 5, 10].find((factor) => factor * power >= about) * power;
}

export function showNow(health) {
  const entries = {
    model: health.model, drafter: health.drafter,
    drafting: [health.drafting?.state, health.drafting?.reason].filter(Boolean).join(": "),
    running: health.running, waiting: health.waiting, "free slots": health.free_slots,
  };
  find("now").replaceChildren(...Object.entries(entries).filter(([, value]) => value !== undefined && value !== "")
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, `${value}`))));
}
