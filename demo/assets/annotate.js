// The annotation page. Labels are class ids in plain arrays, one per kind, 255 is unlabelled; canvases only show them,
// so that what is saved is exact: no smoothing, no colours to be read back.
const UNLABELLED = 255, UNDO_STEPS = 50, POINT_SIZE = 9;
const root = element.querySelector(".annotator");
const find = (selector) => root.querySelector(selector);
const stage = find(".stage"), photo = find(".photo"), prediction = find(".prediction"), cursor = find(".cursor");
const canvases = { scribbles: find("canvas.scribbles"), points: find("canvas.points") };
let set = null; // folder, classes, names
let image = null; // the open image: name, size, labels, revisions, undo
let selected = 0, last = null, opening = 0, saving = Promise.resolve();
const memory = () => "wsss-annotate:" + set.folder;

function tell(text) {
  find(".message").textContent = text;
  find(".message").hidden = !text;
}

async function ask(name, request) {
  try {
    const answer = await server[name](request);
    if (!answer.error) return answer;
    tell(answer.error);
    return answer;
  } catch (error) {
    tell("The server does not answer. What was drawn last may not be saved.");
    return { error: String(error) };
  }
}

function showProgress(answer) {
  find(".count").textContent = answer.done + " of " + answer.total + " annotated";
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
  selected = index;
  const input = find(".classes input[value='" + index + "']");
  if (input) input.checked = true;
  if (tool() === "eraser") setTool("brush");
}

const tool = () => find("input[name=annotate-tool]:checked").value;
const setTool = (name) => { find("input[name=annotate-tool][value=" + name + "]").checked = true; };
const radius = () => Number(find(".radius").value);
const showWidth = () => { find(".width").textContent = 2 * radius() + 1; };

async function open(name) {
  const number = ++opening;
  await saving;
  const answer = await ask("open_image", { name });
  if (number !== opening) return; // another one was asked for meanwhile
  find(".images").value = name;
  if (answer.error) return;
  tell("");
  localStorage.setItem(memory(), name);
  const size = answer.width * answer.height;
  image = { name, width: answer.width, height: answer.height, revisions: answer.revisions, undo: [], labels: {} };
  for (const kind of Object.keys(canvases)) {
    const labels = new Uint8Array(size), runs = answer.labels[kind];
    for (let index = 0, at = 0; index < runs.length; index += 2) {
      labels.fill(runs[index], at, at + runs[index + 1]);
      at += runs[index + 1];
    }
    image.labels[kind] = labels;
    canvases[kind].width = answer.width;
    canvases[kind].height = answer.height;
  }
  root.querySelectorAll(".tags input").forEach((input) => { input.checked = answer.tags.includes(Number(input.value)); });
  photo.src = answer.image;
  photo.alt = name;
  prediction.hidden = true;
  find(".about").textContent = "";
  find(".saved").textContent = "";
  cursor.hidden = true;
  cursor.at = [answer.width >> 1, answer.height >> 1];
  showProgress(answer);
  fit();
  paint("scribbles", 0, 0, image.width, image.height);
  paint("points", 0, 0, image.width, image.height);
  find("[data-do=undo]").disabled = true;
  stage.dataset.image = name; // says that the image is there and can be drawn on
  predict();
}

function fit() {
  if (!image) return;
  const room = stage.parentElement.clientWidth - (window.innerWidth > 720 ? 280 : 0);
  const scale = Math.min(room / image.width, Math.max(280, window.innerHeight - 210) / image.height);
  stage.style.width = Math.floor(image.width * scale) + "px";
  stage.style.height = Math.floor(image.height * scale) + "px";
}

// Shows a part of the labels; points as discs, since one pixel can hardly be seen.
function paint(kind, left, top, right, bottom) {
  const context = canvases[kind].getContext("2d"), labels = image.labels[kind];
  if (kind === "points") {
    context.clearRect(0, 0, image.width, image.height);
    const size = Math.max(2, POINT_SIZE * image.width / Math.max(1, stage.clientWidth) / 2);
    labels.forEach((label, at) => {
      if (label === UNLABELLED) return;
      context.beginPath();
      context.arc(at % image.width + 0.5, Math.floor(at / image.width) + 0.5, size, 0, 7);
      context.fillStyle = "rgb(" + set.classes[label].color + ")";
      context.fill();
      context.lineWidth = size / 3;
      context.strokeStyle = "#fff";
      context.stroke();
    });
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

// A disc of whole pixels: those whose centres are at most r away.
function stamp(kind, x, y, value, r) {
  const labels = image.labels[kind];
  for (let dy = -r; dy <= r; dy++) {
    for (let dx = -r; dx <= r; dx++) {
      const px = x + dx, py = y + dy;
      if (dx * dx + dy * dy > r * r || px < 0 || py < 0 || px >= image.width || py >= image.height) continue;
      labels[py * image.width + px] = value;
    }
  }
}

function draw(from, to, value) {
  const r = radius(), kinds = value === UNLABELLED ? ["scribbles", "points"] : ["scribbles"];
  const steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 1);
  for (const kind of kinds) {
    for (let step = 0; step <= steps; step++) {
      const x = Math.round(from[0] + (to[0] - from[0]) * step / steps);
      const y = Math.round(from[1] + (to[1] - from[1]) * step / steps);
      stamp(kind, x, y, value, r);
    }
    paint(kind, Math.min(from[0], to[0]) - r, Math.min(from[1], to[1]) - r,
      Math.max(from[0], to[0]) + r + 1, Math.max(from[1], to[1]) + r + 1);
  }
}

function remember() {
  image.undo.push({ scribbles: image.labels.scribbles.slice(), points: image.labels.points.slice() });
  if (image.undo.length > UNDO_STEPS || image.undo.length * image.width * image.height > 2e8) image.undo.shift();
  find("[data-do=undo]").disabled = false;
}

function undo() {
  if (!image || !image.undo.length || last) return;
  image.labels = image.undo.pop();
  for (const kind of Object.keys(canvases)) paint(kind, 0, 0, image.width, image.height);
  find("[data-do=undo]").disabled = !image.undo.length;
  save(Object.keys(canvases));
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

// One request after another, each with the labels as they are then: the file is never older than the page.
function save(kinds) {
  const target = image;
  find(".saved").textContent = "Saving …";
  saving = saving.then(async () => {
    for (const kind of kinds) {
      const request = { name: target.name, kind, revision: target.revisions[kind], runs: runs(target.labels[kind]) };
      const answer = await ask("save_labels", request);
      if (answer.conflict && target === image) {
        const said = answer.error;
        saving = Promise.resolve();
        await open(target.name);
        tell(said);
        return;
      }
      if (answer.error) { find(".saved").textContent = "Not saved."; return; }
      target.revisions[kind] = answer.revision;
      showProgress(answer);
    }
    if (target === image) find(".saved").textContent = "Saved " + target.name + " at " + new Date().toLocaleTimeString();
  });
  saving.then(() => { if (target === image) predict(); });
}

async function saveTags() {
  const target = image;
  const tags = [...root.querySelectorAll(".tags input:checked")].map((input) => Number(input.value));
  find(".saved").textContent = "Saving …";
  saving = saving.then(async () => {
    const answer = await ask("save_tags", { name: target.name, tags });
    if (answer.error) { find(".saved").textContent = "Not saved."; return; }
    showProgress(answer);
    find(".saved").textContent = "Saved the tags of " + target.name + " at " + new Date().toLocaleTimeString();
  });
}

let predicting = false, again = false;
async function predict() {
  prediction.style.opacity = find(".opacity").value;
  if (!find(".show").checked || !image) { prediction.hidden = true; return; }
  if (predicting) { again = true; return; }
  predicting = true;
  do {
    again = false;
    const target = image, answer = await ask("predict", { name: target.name });
    if (target !== image || answer.error) continue;
    prediction.hidden = !answer.image || !find(".show").checked;
    if (answer.image) prediction.src = answer.image;
    find(".about").textContent = answer.image
      ? answer.model + ": mean confidence " + answer.confidence.toFixed(2) + ". Strokes spread along the image."
      : answer.reason;
  } while (again);
  predicting = false;
}

async function suggest() {
  find(".saved").textContent = "Looking for the image that helps most …";
  const answer = await ask("suggest", { name: image.name });
  if (answer.error) return;
  if (answer.name) await open(answer.name);
  find(".saved").textContent = answer.reason;
}

function step(by) {
  const names = set.names;
  if (image) open(names[(names.indexOf(image.name) + by + names.length) % names.length]);
}

function place(event) {
  const box = stage.getBoundingClientRect();
  return [Math.floor((event.clientX - box.left) * image.width / box.width),
    Math.floor((event.clientY - box.top) * image.height / box.height)];
}

const inside = ([x, y]) => x >= 0 && y >= 0 && x < image.width && y < image.height;

function setPoint(at) {
  if (!inside(at)) return;
  remember();
  image.labels.points[at[1] * image.width + at[0]] = selected;
  paint("points");
  save(["points"]);
}

const value = () => (tool() === "eraser" ? UNLABELLED : selected);
const touched = () => (tool() === "eraser" ? Object.keys(canvases) : ["scribbles"]);

stage.addEventListener("pointerdown", (event) => {
  if (!image || event.button !== 0 || last) return;
  stage.focus({ preventScroll: true });
  event.preventDefault();
  cursor.hidden = true;
  cursor.at = place(event);
  if (tool() === "point") { setPoint(cursor.at); return; }
  stage.setPointerCapture(event.pointerId);
  remember();
  last = cursor.at;
  draw(last, last, value());
});
stage.addEventListener("pointermove", (event) => {
  if (!last) return;
  const at = place(event);
  draw(last, at, value());
  last = at;
});
function finish() {
  if (!last) return;
  cursor.at = last;
  last = null;
  save(touched());
}
stage.addEventListener("pointerup", finish);
stage.addEventListener("pointercancel", finish);

function moveCursor(dx, dy, large) {
  const by = Math.max(1, Math.round(image.width / (large ? 16 : 64)));
  cursor.at = [Math.min(image.width - 1, Math.max(0, cursor.at[0] + dx * by)),
    Math.min(image.height - 1, Math.max(0, cursor.at[1] + dy * by))];
  cursor.hidden = false;
  cursor.style.left = 100 * (cursor.at[0] + 0.5) / image.width + "%";
  cursor.style.top = 100 * (cursor.at[1] + 0.5) / image.height + "%";
}

const actions = { previous: () => step(-1), next: () => step(1), suggest, undo };
root.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button && image) actions[button.dataset.do]();
});
find(".images").addEventListener("change", (event) => open(event.target.value));
find(".radius").addEventListener("input", showWidth);
find(".opacity").addEventListener("input", (event) => { prediction.style.opacity = event.target.value; });
find(".show").addEventListener("change", predict);
find(".setup").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await ask("name_classes", { text: find("#class-names").value });
  if (!answer.error) { tell(""); begin(answer); }
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function key(event) {
  if (!root.isConnected) { document.removeEventListener("keydown", key); return; }
  if (!image || root.offsetParent === null || event.altKey) return;
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const typing = event.target.closest && event.target.closest("textarea, select, input:not([type=radio], [type=checkbox], [type=range])");
  if (typing) return;
  if (event.ctrlKey || event.metaKey) {
    if (name === "z") { event.preventDefault(); undo(); }
    return;
  }
  const onStage = document.activeElement === stage;
  const does = {
    b: () => setTool("brush"), p: () => setTool("point"), e: () => setTool("eraser"), z: undo,
    n: suggest, ",": () => step(-1), ".": () => step(1),
    v: () => { find(".show").click(); },
    "[": () => { find(".radius").value = radius() - 1; showWidth(); },
    "]": () => { find(".radius").value = radius() + 1; showWidth(); },
  };
  if (onStage && ARROWS[name]) moveCursor(...ARROWS[name], event.shiftKey);
  else if (onStage && (name === "Enter" || name === " ")) {
    if (tool() === "point") setPoint(cursor.at);
    else { remember(); draw(cursor.at, cursor.at, value()); save(touched()); }
  } else if (/^[0-9]$/.test(name)) { if (Number(name) < set.classes.length) choose(Number(name)); }
  else if (does[name]) does[name]();
  else return;
  event.preventDefault();
}
document.addEventListener("keydown", key);
new ResizeObserver(() => { fit(); if (image) paint("points"); }).observe(stage.parentElement);
ask("start", {}).then((answer) => { if (!answer.error) begin(answer); });
