// The vision tab: a picture goes to the server, boxes and scores come back and are drawn over it.

import { postForm } from "./api.js";
import { complain, draw, find, make } from "./page.js";

const ROUTES = {
  "detector": "detections", "classifier": "classifications", "segmenter": "segmentations",
  "face-quality": "face-quality", "face-detector": "faces",
};
const HAVE_THRESHOLD = ["detector", "face-detector"];
const models = new Map();
let asking = null;
let shownUrl = "";

export function offerModels(entries) {
  models.clear();
  for (const entry of entries.filter((one) => ROUTES[one.kind])) models.set(entry.id, entry);
  const options = [...models.values()].map((entry) => make("option", { value: entry.id }, `${entry.id} (${entry.kind})`));
  find("vision-model").replaceChildren(...options);
  find("with-vision").hidden = !models.size;
  find("no-vision").hidden = models.size > 0;
  offerOptions();
}

function offerOptions() {
  const kind = models.get(find("vision-model").value)?.kind;
  find("threshold-field").hidden = !HAVE_THRESHOLD.includes(kind);
  find("aligned-field").hidden = kind !== "face-quality";
}

async function look(file) {
  const entry = models.get(find("vision-model").value);
  if (!file || !entry) return;
  complain("");
  const form = new FormData();
  form.set("image", file);
  form.set("model", entry.id);
  if (HAVE_THRESHOLD.includes(entry.kind) && find("threshold").value) form.set("score_threshold", find("threshold").value);
  if (entry.kind === "face-quality" && find("aligned").checked) form.set("aligned", "true");
  if (entry.kind === "segmenter") form.set("draw", "true");
  asking?.abort();
  asking = new AbortController();
  show(file, "Looking …");
  try {
    write(await postForm(`/v1/vision/${ROUTES[entry.kind]}`, form, asking.signal));
  } catch (error) {
    if (error.name === "AbortError") return;
    find("found-summary").textContent = "";
    complain(error.message);
  }
}

function show(file, summary) {
  URL.revokeObjectURL(shownUrl);
  shownUrl = URL.createObjectURL(file);
  find("canvas").replaceChildren(make("img", { src: shownUrl, alt: `the chosen picture, ${file.name}` }));
  find("found-summary").textContent = summary;
  find("found-table").hidden = true;
  find("seen").hidden = false;
}

/** An answer of any kind as rows of a table; those with a box are drawn. */
function write(answer) {
  const found = answer.detections ?? answer.faces ?? answer.classifications ?? answer.classes ?? [];
  if (answer.picture) find("canvas").firstChild.src = answer.picture;
  const overlay = draw("svg", { viewBox: `0 0 ${answer.image.width} ${answer.image.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const unit = answer.image.width / Math.max(find("canvas").clientWidth, 1);
  found.forEach((one, index) => one.box && overlay.append(...boxOf(one, index + 1, unit)));
  find("canvas").append(overlay);
  const columns = ["number", ...(found[0] && nameOf(found[0]) ? ["class"] : []), ...figureNames(found)];
  const table = find("found-table");
  table.tHead.replaceChildren(make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name))));
  table.tBodies[0].replaceChildren(...found.map((one, index) => make("tr", {},
    ...columns.map((name) => make("td", {}, cell(one, index, name))))));
  table.hidden = !found.length;
  const took = answer.timings?.inference_ms;
  const noun = answer.faces ? "faces" : answer.detections ? "objects" : "classes";
  find("found-summary").textContent = `${found.length} ${noun} in ${answer.image.width} × ${answer.image.height} pixels`
    + (took ? `, ${took.toFixed(1)} ms` : "");
}

const nameOf = (one) => one.class_name ?? one.class ?? "";

function figureNames(found) {
  return ["score", "area", "share", "quality", "status"].filter((name) => found.some((one) => one[name] !== undefined));
}

function cell(one, index, name) {
  if (name === "number") return `${index + 1}`;
  if (name === "class") return `${nameOf(one)}`;
  const value = one[name];
  return typeof value === "number" ? `${Number(value.toFixed(3))}` : `${value ?? ""}`;
}

/** A frame with its number; ``unit``: pixels of the picture in one of the screen. */
function boxOf(one, number, unit) {
  const [left, top, right, bottom] = one.box;
  const size = 13 * unit;
  const text = `${number} ${nameOf(one)}`.trim();
  const tagTop = Math.max(top - 1.5 * size, 0);
  return [
    draw("rect", { x: left, y: top, width: right - left, height: bottom - top, class: "box" }),
    draw("rect", { x: left, y: tagTop, width: (text.length * 0.62 + 0.6) * size, height: 1.5 * size, class: "tag" }),
    draw("text", { x: left + 0.3 * size, y: tagTop + 1.1 * size, "font-size": size, class: "tag-text" }, text),
  ];
}

export function setUpVision() {
  const again = () => look(find("picture").files[0]);
  find("picture").addEventListener("change", again);
  find("threshold").addEventListener("change", again);
  find("aligned").addEventListener("change", again);
  find("vision-model").addEventListener("change", () => {
    offerOptions();
    again();
  });
  find("vision-form").addEventListener("submit", (event) => event.preventDefault());
  const drop = find("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    find("picture").files = event.dataTransfer.files;
    again();
  });
}
