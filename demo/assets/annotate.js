// The annotation page. Labels are class ids in plain arrays, one per kind, 255 is unlabelled; canvases only show them,
// so that what is saved is exact: no smoothing, no colours to be read back.
const UNLABELLED = 255, UNDO_STEPS = 50, UNDO_BYTES = 1e8, POINT_SIZE = 9;
// The width on the slider is that on an image of so many pixels along its longer side; on larger ones it grows.
const WIDTH_SIDE = 512;
const RETRY_FIRST = 1000, RETRY_LAST = 15000; // milliseconds between attempts, each time twice as many
const root = element.querySelector(".annotator");
const find = (selector) => root.querySelector(selector);
const stage = find(".stage"), photo = find(".photo"), prediction = find(".prediction"), asked = find(".place"), cursor = find(".cursor");
const canvases = { scribbles: find("canvas.scribbles"), points: find("canvas.points") };
let set = null; // folder, classes, names
let image = null; // the open image, if it can be drawn on: name, size, labels, revisions, undo, and what is not saved
let wanted = null; // name of the image that is open, is being opened, or cannot be read
let shape = [4, 3]; // width and height of what the stage shows
let doubt = null; // middle of what the model is least sure of, if that is shown
let selected = 0, stroke = null, opening = 0, note = "";
const unsaved = new Map(); // images by name, also those that were left, until everything of them is on the disk
const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });
const memory = () => "wsss-annotate:" + set.folder;

function tell(text) {
  find(".message").textContent = text;
  find(".message").hidden = !text;
}

const say = (text) => { find(".saved").textContent = text; };

// Asks until the server is not busy, as long as somebody waits for the answer.
async function ask(name, request, waiting = () => true) {
  for (let wait = RETRY_FIRST / 2; ; wait = Math.min(2 * wait, RETRY_LAST)) {
    // Gradio gives nothing where a request has failed.
    const answer = await Promise.resolve(server[name](request)).catch(() => null);
    if (!answer) return { error: "The server does not answer.", unanswered: true };
    if (!answer.busy || !waiting()) return answer;
    await pause(wait * (0.5 + Math.random())); // not all pages at the same moment
  }
}

// As above, and also until there is an answer at all.
async function insist(name, request, waiting = () => true) {
  for (let wait = RETRY_FIRST; ; wait = Math.min(2 * wait, RETRY_LAST)) {
    const answer = await ask(name, request, waiting);
    if (!answer.unanswered || !waiting()) return answer;
    tell(answer.error + " Trying again …");
    await pause(wait);
    if (!waiting()) return answer;
  }
}

function showProgress(answer) {
  const masks = answer.by_masks ? " (" + answer.by_masks + " by masks only)" : "";
  find(".count").textContent = answer.done + " of " + answer.total + " annotated" + masks;
  find("progress").max = answer.total;
  find("progress").value = answer.done;
  find("progress").setAttribute("aria-label", find(".count").textContent);
}

function entry(kind, index, extra) {
  const label = document.createElement("label"), input = document.createElement("input");
  input.type = kind;
  input.value = index;
  const color = document.createElement("span");
  color.className = "color";
  color.style.background = "rgb(" + set.classes[index].color + ")";
  const text = document.createElement("span");
  text.textContent = set.classes[index].name; // never as HTML: the name comes from a file
  label.append(input, color, text);
  if (extra) {
    const key = document.createElement("kbd");
    key.textContent = extra;
    label.append(key);
  }
  return [label, input];
}

function begin(answer) {
  set = answer;
  showProgress(answer);
  find(".setup").hidden = set.classes.length > 0;
  find(".work").hidden = !set.classes.length;
  if (!set.classes.length) return;
  const classes = document.createElement("div"), tags = document.createElement("div");
  classes.className = tags.className = "scroll";
  set.classes.forEach((_, index) => {
    const [label, input] = entry("radio", index, index < 10 ? String(index) : "");
    input.name = "annotate-class";
    input.addEventListener("change", () => choose(index));
    classes.append(label);
  });
  set.taggable.forEach((index) => {
    const [label, input] = entry("checkbox", index, "");
    input.addEventListener("change", saveTags);
    tags.append(label);
  });
  find(".classes").append(classes);
  find(".tags").append(tags);
  find(".images").replaceChildren(...set.names.map((name) => new Option(name, name)));
  choose(Math.min(1, set.classes.length - 1));
  showWidth();
  const left = localStorage.getItem(memory());
  open(set.names.includes(left) ? left : set.first);
}

function choose(index) {
  finish();
  selected = index;
  const input = find(".classes input[value='" + index + "']");
  if (input) input.checked = true;
  if (tool() === "eraser") setTool("brush");
}

const tool = () => find("input[name=annotate-tool]:checked").value;
const setTool = (name) => { finish(); find("input[name=annotate-tool][value=" + name + "]").checked = true; };
const radius = () => Math.round(Number(find(".radius").value) * Math.max(1, Math.max(...shape) / WIDTH_SIDE));
const showWidth = () => { find(".width").textContent = 2 * radius() + 1; };

// Nothing can be drawn until the image is there. What is not saved of the image that is left stays in `unsaved`.
async function open(name, anew) {
  finish();
  const number = ++opening, waiting = () => number === opening;
  wanted = name;
  find(".images").value = name;
  if (image) image.undo = [];
  image = null;
  delete stage.dataset.image;
  stage.setAttribute("aria-busy", "true");
  if (anew || !unsaved.has(name)) {
    await flush(); // once more before it is left; and the answer counts it
    if (!waiting()) return;
    const answer = await insist("open_image", { name }, waiting);
    if (!waiting()) return;
    if (answer.error) showProblem(name, answer.error);
    else { showProgress(answer); show(received(answer), answer); }
  } else {
    show(unsaved.get(name));
  }
  stage.removeAttribute("aria-busy");
  localStorage.setItem(memory(), name);
}

function received(answer) {
  const labels = {};
  for (const kind of Object.keys(canvases)) {
    labels[kind] = new Uint8Array(answer.width * answer.height);
    const numbers = answer.labels[kind].split(",").map(Number);
    for (let index = 0, at = 0; index < numbers.length; index += 2) {
      labels[kind].fill(numbers[index], at, at + numbers[index + 1]);
      at += numbers[index + 1];
    }
  }
  return {
    name: answer.name, width: answer.width, height: answer.height, photo: answer.image, labels, tags: answer.tags,
    revisions: answer.revisions, undo: [],
    changed: new Set(), // kinds that were changed since they were last sent
    sent: {}, // requests whose answer is not there, by kind
  };
}

function show(target) {
  image = target;
  tell(note);
  note = "";
  for (const canvas of Object.values(canvases)) { canvas.width = image.width; canvas.height = image.height; }
  find(".tags").disabled = false;
  root.querySelectorAll(".tags input").forEach((input) => { input.checked = image.tags.includes(Number(input.value)); });
  find(".unreadable").hidden = true;
  photo.hidden = false;
  photo.src = image.photo;
  photo.alt = image.name;
  clear();
  cursor.at = [image.width >> 1, image.height >> 1];
  shape = [image.width, image.height];
  fit();
  showWidth();
  paint("scribbles", 0, 0, image.width, image.height);
  paint("points");
  stage.dataset.image = image.name; // says that the image is there and can be drawn on
  predict();
}

// The place of an image that cannot be drawn on: from here one goes on as from any other.
function showProblem(name, text) {
  tell(text);
  for (const canvas of Object.values(canvases)) canvas.width = canvas.height = 1;
  find(".tags").disabled = true;
  root.querySelectorAll(".tags input").forEach((input) => { input.checked = false; });
  find(".unreadable").textContent = name + " cannot be annotated.";
  find(".unreadable").hidden = false;
  photo.hidden = true;
  photo.removeAttribute("src");
  photo.alt = "";
  clear();
  fit();
}

function clear() {
  prediction.hidden = asked.hidden = true;
  showDoubt(undefined);
  find(".about").textContent = "";
  say("");
  cursor.hidden = true;
  find("[data-do=undo]").disabled = true;
}

function fit() {
  const [width, height] = shape;
  const room = stage.parentElement.clientWidth - (window.innerWidth > 720 ? 280 : 0);
  const scale = Math.min(room / width, Math.max(280, window.innerHeight - 210) / height);
  stage.style.width = Math.floor(width * scale) + "px";
  stage.style.height = Math.floor(height * scale) + "px";
}

// Shows a part of the labels; points as discs, since one pixel can hardly be seen.
function paint(kind, left, top, right, bottom) {
  const context = canvases[kind].getContext("2d"), labels = image.labels[kind];
  if (kind === "points") {
    context.clearRect(0, 0, image.width, image.height);
    const size = Math.max(2, POINT_SIZE * image.width / Math.max(1, stage.clientWidth) / 2);
    for (let at = 0; at < labels.length; at++) {
      if (labels[at] === UNLABELLED) continue;
      context.beginPath();
      context.arc(at % image.width + 0.5, Math.floor(at / image.width) + 0.5, size, 0, 7);
      context.fillStyle = "rgb(" + set.classes[labels[at]].color + ")";
      context.fill();
      context.lineWidth = size / 3;
      context.strokeStyle = "#fff";
      context.stroke();
    }
    return;
  }
  left = Math.max(0, left); top = Math.max(0, top);
  right = Math.min(image.width, right); bottom = Math.min(image.height, bottom);
  if (right <= left || bottom <= top) return;
  const part = context.createImageData(right - left, bottom - top);
  for (let y = top, to = 0; y < bottom; y++) {
    for (let x = left; x < right; x++, to += 4) {
      const label = labels[y * image.width + x];
      if (label === UNLABELLED) continue;
      part.data.set(set.classes[label].color, to);
      part.data[to + 3] = 255;
    }
  }
  context.putImageData(part, left, top);
}

// Discs of whole pixels, those whose centres are at most r away, along a line.
function draw(from, to) {
  const r = stroke.radius, { width, height } = image;
  const reach = Array.from({ length: r + 1 }, (_, dy) => Math.floor(Math.sqrt(r * r - dy * dy)));
  const steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 1);
  const box = [Math.min(from[0], to[0]) - r, Math.min(from[1], to[1]) - r,
    Math.max(from[0], to[0]) + r + 1, Math.max(from[1], to[1]) + r + 1];
  for (const kind of stroke.kinds) {
    const labels = image.labels[kind];
    for (let step = 0; step <= steps; step++) {
      const x = Math.round(from[0] + (to[0] - from[0]) * step / steps);
      const y = Math.round(from[1] + (to[1] - from[1]) * step / steps);
      for (let py = Math.max(0, y - r); py <= Math.min(height - 1, y + r); py++) {
        const half = reach[Math.abs(py - y)];
        const left = Math.max(0, x - half), right = Math.min(width, x + half + 1);
        if (left < right) labels.fill(stroke.value, py * width + left, py * width + right);
      }
    }
    if (kind !== "points" || stroke.points) paint(kind, ...box);
  }
  stroke.box = stroke.box.map((side, index) => (index < 2 ? Math.min : Math.max)(side, box[index]));
}

function begins(at, pointer) {
  const erases = tool() === "eraser", kinds = erases ? Object.keys(canvases) : ["scribbles"];
  const before = Object.fromEntries(kinds.map((kind) => [kind, image.labels[kind].slice()]));
  stroke = {
    at, pointer, kinds, before, value: erases ? UNLABELLED : selected, radius: radius(),
    points: erases && before.points.some((label) => label !== UNLABELLED),
    box: [Infinity, Infinity, -Infinity, -Infinity],
  };
  draw(at, at);
}

// Ends and saves the stroke that is being drawn, if there is one: before anything else happens to the image.
function finish() {
  if (!stroke) return;
  const { at, kinds, before, box } = stroke;
  stroke = null;
  cursor.at = at;
  remember(kinds.map((kind) => part(kind, before[kind], ...box)));
  save(kinds);
}

// What lay in a rectangle, cut to the image.
function part(kind, labels, left, top, right, bottom) {
  left = Math.max(0, left); top = Math.max(0, top);
  right = Math.max(left, Math.min(image.width, right)); bottom = Math.max(top, Math.min(image.height, bottom));
  const values = new Uint8Array((right - left) * (bottom - top));
  for (let y = top; y < bottom; y++) {
    values.set(labels.subarray(y * image.width + left, y * image.width + right), (y - top) * (right - left));
  }
  return { kind, values, left, top, right, bottom };
}

function remember(parts) {
  image.undo.push(parts);
  let bytes = image.undo.flat().reduce((sum, { values }) => sum + values.length, 0);
  while (image.undo.length > UNDO_STEPS || (image.undo.length > 1 && bytes > UNDO_BYTES)) {
    bytes -= image.undo.shift().reduce((sum, { values }) => sum + values.length, 0);
  }
  find("[data-do=undo]").disabled = false;
}

function undo() {
  finish();
  if (!image || !image.undo.length) return;
  const parts = image.undo.pop();
  for (const { kind, values, left, top, right, bottom } of parts) {
    for (let y = top; y < bottom; y++) {
      const row = values.subarray((y - top) * (right - left), (y - top + 1) * (right - left));
      image.labels[kind].set(row, y * image.width + left);
    }
    paint(kind, left, top, right, bottom);
  }
  find("[data-do=undo]").disabled = !image.undo.length;
  save(parts.map(({ kind }) => kind));
}

function runs(labels) {
  const found = [];
  for (let at = 0; at < labels.length;) {
    const start = at, value = labels[at];
    while (at < labels.length && labels[at] === value) at++;
    found.push(value, at - start);
  }
  return found;
}

function save(kinds) {
  kinds.forEach((kind) => image.changed.add(kind));
  unsaved.set(image.name, image);
  say("Saving …");
  flush();
}

// One request after another, each with the labels as they are then: the file is never older than the page. What fails
// is tried again, at the latest with the next stroke, and waits here for as long as the page is open.
let passing = null, retry = 0, delay = RETRY_FIRST;
function flush() {
  clearTimeout(retry);
  passing = passing || pass().finally(() => { passing = null; });
  return passing;
}

async function pass() {
  const failed = new Set();
  const next = () => [...unsaved.values()].find((target) => !failed.has(target));
  for (let target = next(); target; target = next()) {
    if (!(await store(target))) failed.add(target);
    else delay = RETRY_FIRST;
    showUnsaved(failed);
  }
  if (!failed.size) return;
  retry = setTimeout(flush, delay);
  delay = Math.min(2 * delay, RETRY_LAST);
}

function showUnsaved(failed) {
  const names = [...failed].map((target) => target.name).join(", "), [first] = failed;
  find(".unsaved").hidden = !failed.size;
  find(".unsaved").textContent = first
    ? "Not saved yet: " + names + ". " + first.problem + " It is kept while this page is open, and tried again."
    : "";
}

async function store(target) {
  for (const kind of ["tags", ...Object.keys(canvases)]) {
    if (!target.sent[kind]) {
      if (!target.changed.delete(kind)) continue;
      target.sent[kind] = kind === "tags"
        ? { name: target.name, tags: target.tags }
        : { name: target.name, kind, revision: target.revisions[kind], runs: runs(target.labels[kind]) };
    }
    const answer = await ask(kind === "tags" ? "save_tags" : "save_labels", target.sent[kind], () => false);
    if (unsaved.get(target.name) !== target) return true; // given up meanwhile
    // Without an answer nobody knows whether it was saved: then the same has to be sent again.
    if (!answer.unanswered) delete target.sent[kind];
    if (answer.conflict) { giveUp(target, answer.error); return true; }
    if (answer.error) {
      if (!answer.unanswered) target.changed.add(kind);
      target.problem = answer.error;
      if (target === image) say("");
      return false;
    }
    if (kind !== "tags") target.revisions[kind] = answer.revision;
    showProgress(answer);
  }
  if (target.changed.size || Object.keys(target.sent).length) return true; // drawn on meanwhile: once more
  unsaved.delete(target.name);
  say("Saved " + target.name + " at " + new Date().toLocaleTimeString());
  if (target === image) predict();
  return true;
}

// Somebody else's newer labels are kept and shown.
function giveUp(target, text) {
  if (stroke && target === image) stroke = null;
  unsaved.delete(target.name);
  note = target.name + ": " + text;
  if (wanted === target.name) open(target.name, true);
  else tell(note);
}

function saveTags() {
  if (!image) return;
  image.tags = [...root.querySelectorAll(".tags input:checked")].map((input) => Number(input.value));
  save(["tags"]);
}

let predicting = false, again = false;
async function predict() {
  prediction.style.opacity = find(".opacity").value;
  const shows = find(".show"), asks = find(".ask");
  if (!shows.checked || !image) prediction.hidden = true;
  if (!asks.checked || !image) { asked.hidden = true; showDoubt(undefined); }
  if (!(shows.checked || asks.checked) || !image) return;
  if (predicting) { again = true; return; }
  predicting = true;
  do {
    again = false;
    const target = image, answer = target && await ask("predict", { name: target.name }, () => target === image);
    if (!target || target !== image) continue;
    prediction.hidden = !answer.image || !shows.checked;
    if (answer.image) prediction.src = answer.image;
    asked.hidden = !answer.place || !asks.checked;
    if (answer.place) asked.src = answer.place.image;
    showDoubt(asks.checked && answer.image ? answer.place : undefined);
    find(".about").textContent = answer.image
      ? answer.model + ": mean confidence " + answer.confidence.toFixed(2) + ". Strokes spread along the image."
      : answer.error || answer.reason;
  } while (again);
  predicting = false;
}

// Null: the model is sure enough; undefined: nothing is known.
function showDoubt(found) {
  doubt = found ? found.center : null;
  find("[data-do=go]").disabled = !doubt;
  const percent = (part) => Math.round(100 * part) + " %";
  find(".least").textContent = doubt
    ? "Least sure inside the outline, " + percent(doubt[1]) + " across and " + percent(doubt[0]) + " down."
    : found === null ? "The model is sure enough wherever no stroke is near." : "";
}

function go() {
  if (!image || !doubt) return;
  finish();
  stage.focus();
  cursor.at = [Math.floor(doubt[1] * image.width), Math.floor(doubt[0] * image.height)];
  showCursor();
}

async function suggest() {
  finish();
  const from = wanted, still = () => wanted === from;
  say("Looking for the image that helps most …");
  const answer = await ask("suggest", { name: from }, still);
  if (!still()) return; // somebody has gone on meanwhile
  if (answer.error) { say(""); tell(answer.error); return; }
  if (answer.name) await open(answer.name);
  if (!answer.name || wanted === answer.name) say(answer.reason);
}

function step(by) {
  const names = set.names;
  open(names[(names.indexOf(wanted) + by + names.length) % names.length]);
}

function place(event) {
  const box = stage.getBoundingClientRect();
  return [Math.floor((event.clientX - box.left) * image.width / box.width),
    Math.floor((event.clientY - box.top) * image.height / box.height)];
}

const inside = ([x, y]) => x >= 0 && y >= 0 && x < image.width && y < image.height;

function setPoint(at) {
  if (!inside(at)) return;
  finish();
  remember([part("points", image.labels.points, at[0], at[1], at[0] + 1, at[1] + 1)]);
  image.labels.points[at[1] * image.width + at[0]] = selected;
  paint("points");
  save(["points"]);
}

stage.addEventListener("pointerdown", (event) => {
  if (!image || event.button !== 0 || stroke) return;
  stage.focus({ preventScroll: true });
  event.preventDefault();
  cursor.hidden = true;
  cursor.at = place(event);
  if (tool() === "point") { setPoint(cursor.at); return; }
  stage.setPointerCapture(event.pointerId);
  begins(cursor.at, event.pointerId);
});
stage.addEventListener("pointermove", (event) => {
  if (!stroke || stroke.pointer !== event.pointerId) return;
  const at = place(event);
  draw(stroke.at, at);
  stroke.at = at;
});
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
  stage.addEventListener(end, (event) => { if (stroke && stroke.pointer === event.pointerId) finish(); });
}

function moveCursor(dx, dy, large) {
  const by = Math.max(1, Math.round(image.width / (large ? 16 : 64)));
  cursor.at = [Math.min(image.width - 1, Math.max(0, cursor.at[0] + dx * by)),
    Math.min(image.height - 1, Math.max(0, cursor.at[1] + dy * by))];
  showCursor();
}

function showCursor() {
  cursor.hidden = false;
  cursor.style.left = 100 * (cursor.at[0] + 0.5) / image.width + "%";
  cursor.style.top = 100 * (cursor.at[1] + 0.5) / image.height + "%";
}

const actions = { previous: () => step(-1), next: () => step(1), suggest, undo, go };
root.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button && wanted !== null) actions[button.dataset.do]();
});
find(".images").addEventListener("change", (event) => open(event.target.value));
root.querySelectorAll("input[name=annotate-tool]").forEach((input) => input.addEventListener("change", finish));
find(".radius").addEventListener("input", showWidth);
find(".opacity").addEventListener("input", (event) => { prediction.style.opacity = event.target.value; });
for (const box of [".show", ".ask"]) find(box).addEventListener("change", predict);
let warned = null; // the class names that the page has warned of
function warn(text, warning) {
  warned = text;
  tell(warning);
  find(".setup button").textContent = text === null ? "Use these classes" : "Use them without a background";
}
find("#class-names").addEventListener("input", () => { if (warned !== null) warn(null, ""); });
find(".setup").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = find("#class-names").value;
  const answer = await ask("name_classes", { text, confirmed: text === warned });
  if (answer.warning) {
    // What was typed while the server answered is asked about in its turn.
    if (find("#class-names").value === text) warn(text, answer.warning);
    return;
  }
  tell(answer.error || "");
  if (!answer.error) begin(answer);
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function key(event) {
  if (!root.isConnected) { document.removeEventListener("keydown", key); return; }
  if (wanted === null || root.offsetParent === null || event.altKey) return;
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const typing = event.target.closest && event.target.closest("textarea, select, input:not([type=radio], [type=checkbox], [type=range])");
  if (typing) return;
  if (event.ctrlKey || event.metaKey) {
    if (name === "z") { event.preventDefault(); undo(); }
    return;
  }
  const onStage = image && document.activeElement === stage;
  const does = {
    b: () => setTool("brush"), p: () => setTool("point"), e: () => setTool("eraser"), z: undo,
    n: suggest, ",": () => step(-1), ".": () => step(1),
    v: () => { find(".show").click(); },
    u: () => { find(".ask").click(); },
    g: go,
    "[": () => { find(".radius").value = radius() - 1; showWidth(); },
    "]": () => { find(".radius").value = radius() + 1; showWidth(); },
  };
  if (onStage && ARROWS[name]) moveCursor(...ARROWS[name], event.shiftKey);
  else if (onStage && (name === "Enter" || name === " ")) {
    if (tool() === "point") setPoint(cursor.at);
    else { finish(); begins(cursor.at, null); finish(); }
  } else if (/^[0-9]$/.test(name)) { if (Number(name) < set.classes.length) choose(Number(name)); }
  else if (does[name]) does[name]();
  else return;
  event.preventDefault();
}
document.addEventListener("keydown", key);
function leave(event) {
  if (!root.isConnected) { window.removeEventListener("beforeunload", leave, true); return; }
  finish();
  if (!unsaved.size) return;
  event.preventDefault(); // the browser asks whether to leave
  event.stopImmediatePropagation(); // gradio would close its connection, also when one stays
}
window.addEventListener("beforeunload", leave, true);
new ResizeObserver(() => { fit(); if (image) paint("points"); }).observe(stage.parentElement);
insist("start", {}).then((answer) => {
  tell(answer.error || "");
  if (!answer.error) begin(answer);
});
