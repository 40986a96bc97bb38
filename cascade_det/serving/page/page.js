import { Picture, classColour, stageColour, upright } from "./picture.js";

const MOST_LABELLED_CLASSES = 12; // in the legend
const byId = (id) => document.getElementById(id);
const picture = new Picture(byId("canvas"));
const state = { file: null, result: null, server: null, chosen: null, request: null };

function element(name, { text, className, ...attributes } = {}, children = []) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never as HTML: names come from files
  if (className) made.className = className;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function swatch(colour) {
  const made = element("span", { className: "swatch", "aria-hidden": "true" });
  made.style.background = colour;
  return made;
}

function say(text) {
  byId("status").textContent = text;
}

function complain(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

function setting() {
  return state.server.settings[Number(byId("exits").value)];
}

function colourOf(detection) {
  const byStage = document.querySelector('input[name="colour"]:checked').value === "exit_stage";
  return byStage ? stageColour(detection.exit_stage) : classColour(detection.class);
}

// --- asking the server ---------------------------------------------------------------------------

async function answer(response) {
  const content = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(content.error ?? `The server answered with status ${response.status}.`);
  }
  return content;
}

async function detect() {
  if (!state.file || !state.server) return;
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  say("Detecting");
  complain("");
  try {
    const address = `detect?setting=${encodeURIComponent(setting().name)}`;
    const sent = { method: "POST", body: state.file, signal: request.signal };
    const result = await answer(await fetch(address, sent));
    if (result.webp_orientation > 1) {
      const image = await upright(state.file, result.webp_orientation);
      if (request.signal.aborted) return;
      picture.show(image);
    }
    Object.assign(state, { result, chosen: null });
    say("");
    render();
  } catch (error) {
    if (request.signal.aborted) return;
    say("");
    complain(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
}

async function open(file) {
  if (!file) return;
  complain("");
  if (state.server && file.size > state.server.limits.upload_bytes) {
    const most = state.server.limits.upload_bytes / 2 ** 20;
    complain(`The image is larger than ${Number(most.toFixed(3))} MiB, the limit here.`);
    return;
  }
  state.opening = file;
  const image = await createImageBitmap(file).catch(() => null);
  if (state.opening !== file) { // another one was chosen meanwhile
    image?.close();
    return;
  }
  if (!image) {
    complain("This is not an image that the browser can show.");
    return;
  }
  Object.assign(state, { file, result: null, chosen: null });
  byId("empty").hidden = true;
  byId("drop").classList.add("full");
  picture.show(image);
  render();
  detect();
}

// --- showing the answer --------------------------------------------------------------------------

function shownDetections() {
  const least = Number(byId("score").value);
  return (state.result?.detections ?? []).filter((d) => d.score >= least);
}

function draw() {
  const shown = shownDetections().map((detection) => ({
    detection,
    colour: colourOf(detection),
    text: `${detection.label} ${detection.score.toFixed(2)} s${detection.exit_stage}`,
  }));
  picture.update(shown, {
    masks: byId("masks").checked,
    labels: byId("labels").checked,
    chosen: state.chosen,
  });
}

function render() {
  const result = state.result, shown = shownDetections();
  byId("score-value").textContent = Number(byId("score").value).toFixed(2);
  for (const note of document.querySelectorAll("[data-empty]")) note.hidden = Boolean(result);
  byId("table").hidden = !result;
  byId("count").textContent = result
    ? `${shown.length} of ${result.detections.length} at this threshold` : "";
  const kinds = new Map();
  for (const { label } of shown) kinds.set(label, (kinds.get(label) ?? 0) + 1);
  const listed = [...kinds].map(([label, count]) => `${count} ${label}`).join(", ");
  byId("canvas").setAttribute(
    "aria-label", result ? `The image with detections: ${listed || "none"}` : "The image");
  byId("masks-option").hidden = !result?.detections.some((d) => d.mask);
  renderLegend(shown);
  renderRows(shown);
  renderRegions(result);
  renderTimes(result);
  draw();
}

function renderLegend(shown) {
  const byStage = document.querySelector('input[name="colour"]:checked').value === "exit_stage";
  const counted = new Map();
  for (const d of shown) {
    const key = byStage ? d.exit_stage : d.class;
    const text = byStage ? `left after stage ${d.exit_stage}` : d.label;
    const entry = counted.get(key) ?? { text, colour: colourOf(d), count: 0 };
    counted.set(key, { ...entry, count: entry.count + 1 });
  }
  const entries = [...counted].sort((a, b) => a[0] - b[0]).map((entry) => entry[1]);
  const items = entries.slice(0, MOST_LABELLED_CLASSES).map(({ text, colour, count }) =>
    element("li", {}, [swatch(colour), `${text}: ${count}`]));
  if (entries.length > items.length) {
    items.push(element("li", { text: `and ${entries.length - items.length} more classes` }));
  }
  byId("legend").replaceChildren(...items);
}

function renderRows(shown) {
  const rows = shown.map((detection, index) => {
    const stage = element("td", {}, [
      swatch(stageColour(detection.exit_stage)), String(detection.exit_stage)]);
    const row = element("tr", { tabindex: index === 0 ? 0 : -1 }, [
      element("td", { text: detection.label }),
      element("td", { className: "number", text: detection.score.toFixed(3) }),
      stage,
      element("td", { className: "number", text: detection.box.map((v) => v.toFixed(0)).join(", ") }),
    ]);
    row.addEventListener("pointerenter", () => choose(detection));
    row.addEventListener("pointerleave", () => choose(null));
    row.addEventListener("focus", () => choose(detection));
    row.addEventListener("blur", () => choose(null));
    row.addEventListener("keydown", moveFocus);
    row.detection = detection;
    return row;
  });
  byId("table").tBodies[0].replaceChildren(...rows);
}

// One row is in the order of the Tab key; the arrow keys go from it to the others.
function moveFocus(event) {
  const rows = [...event.currentTarget.parentElement.rows];
  const at = rows.indexOf(event.currentTarget);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to === undefined || !rows[to]) return;
  event.preventDefault();
  rows[at].tabIndex = -1;
  rows[to].tabIndex = 0;
  rows[to].focus();
}

function choose(detection) {
  if (state.chosen === detection) return;
  state.chosen = detection;
  for (const row of byId("table").tBodies[0].rows) {
    row.classList.toggle("chosen", row.detection === detection);
  }
  draw();
}

function bar(name, share, number, colour, note) {
  const filled = element("div", { className: "bar" });
  filled.style.width = `${(100 * share).toFixed(2)}%`;
  if (colour) filled.style.background = colour;
  const children = [
    element("span", { text: name }),
    element("div", { className: "track", "aria-hidden": "true" }, [filled]),
    element("span", { className: "number", text: number }),
  ];
  if (note) children.push(element("span", { className: "note", text: note }));
  return element("li", {}, children);
}

function reasons(left) {
  return Object.entries(left).filter((entry) => entry[1] > 0)
    .map(([reason, count]) => `${count.toLocaleString("en")} ${reason}`).join(", ");
}

function renderRegions(result) {
  if (!result) {
    byId("regions").replaceChildren();
    return;
  }
  const { proposals, stages, tiles } = result, most = Math.max(1, proposals.count);
  const rows = [];
  if (tiles) {
    const share = (part) => `${(100 * part / tiles.count).toFixed(0)}%`;
    rows.push(bar("tiles", tiles.computed / tiles.count, share(tiles.computed), null,
      `of the finest map; open for the RPN: ${share(tiles.open)}`));
  }
  rows.push(bar("proposals", proposals.count / most, proposals.count.toLocaleString("en"), null,
    reasons(proposals.left) && `left: ${reasons(proposals.left)}`));
  stages.forEach(({ entered, left }, stage) => {
    const { completed, ...others } = left;
    const why = reasons(others);
    rows.push(bar(`stage ${stage}`, entered / most, entered.toLocaleString("en"),
      stageColour(stage), why && `left: ${why}`));
  });
  byId("regions").replaceChildren(...rows);
}

function renderTimes(result) {
  const parts = Object.entries(result?.milliseconds ?? {});
  const most = Math.max(...parts.map((part) => part[1]), 1e-9);
  const total = parts.reduce((sum, part) => sum + part[1], 0);
  byId("total").textContent = result ? `${total.toFixed(0)} ms on the server` : "";
  byId("times").replaceChildren(...parts.map(([name, ms]) => {
    const stage = /^stage(\d+)$/.exec(name);
    const text = name.replace(/^(stage|gate)(\d+)$/, "$1 $2");
    return bar(text, ms / most, `${ms.toFixed(ms < 100 ? 1 : 0)} ms`, stage && stageColour(Number(stage[1])));
  }));
}

// --- controls ------------------------------------------------------------------------------------

function renderSetting() {
  const { title, summary } = setting();
  byId("setting").textContent = title;
  byId("rules").textContent = summary === "off" ? "Every region runs every stage." : summary;
  byId("exits").setAttribute("aria-valuetext", title);
}

function whenQuiet(call, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, milliseconds);
  };
}

const detectSoon = whenQuiet(detect, 200);

byId("exits").addEventListener("input", () => {
  renderSetting();
  detectSoon();
});
for (const id of ["score", "labels", "masks"]) byId(id).addEventListener("input", render);
for (const radio of document.querySelectorAll('input[name="colour"]')) {
  radio.addEventListener("input", render);
}
byId("file").addEventListener("change", (event) => {
  open(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("canvas").addEventListener("pointermove", (event) => choose(picture.at(event)));
byId("canvas").addEventListener("pointerleave", () => choose(null));
window.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  open(event.dataTransfer.files[0]);
});
window.addEventListener("paste", (event) => open(event.clipboardData.files[0]));

async function start() {
  try {
    state.server = await answer(await fetch("settings"));
  } catch (error) {
    say("");
    complain(error instanceof TypeError ? "The server cannot be reached." : error.message);
    return;
  }
  const { settings, initial, class_names: names } = state.server;
  const slider = byId("exits");
  slider.max = settings.length - 1;
  slider.value = settings.findIndex((s) => s.name === initial);
  slider.disabled = settings.length < 2;
  byId("ticks").replaceChildren(...settings.map((_, index) => element("option", { value: index })));
  const listed = names.slice(0, 5).join(", ") + (names.length > 5 ? ", …" : "");
  byId("model").textContent = `${names.length} classes: ${listed}`;
  renderSetting();
  render();
  say("");
  detect();
}

start();
