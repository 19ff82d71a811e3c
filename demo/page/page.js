// The page: its form is built from /about, its pictures come from /generate, one line of JSON per sampling step.

const find = (css, within = document) => within.querySelector(css);
const form = find("#settings"), fields = form.elements, canvas = find("#canvas");
const edit = { image: null, tokens: new Set(), cursor: 0, paints: true }; // tokens: numbers of the cells to regenerate
let model, job; // /about; the AbortController of the running request

// ---- form and link

function buildForm() {
  document.title = find("#title").textContent = model.title;
  const tokens = `${model.grid ** 2} tokens of ${model.dimensions} dimensions`;
  find("#about").textContent = `${model.size} × ${model.size} pixels, ${model.classes.length - 1} classes, ${tokens}. Grey: still masked.`;
  document.documentElement.style.setProperty("--size", model.size);
  document.body.classList.toggle("small", model.size < 128);
  for (const [value, name] of model.classes) fields.class.add(new Option(name, value));
  for (const name of model.orders) fields.order.add(new Option(name, name));
  for (const [name, number] of Object.entries(model.numbers)) {
    Object.assign(fields[name], { min: number.lowest, max: number.highest, step: number.step, value: number.value });
  }
}

function showValues() {
  for (const range of form.querySelectorAll("[type=range]")) find("output", range.parentElement).value = range.value;
}

// A setting as the server wants it: numbers as numbers, null where a field is empty.
function setting(name) {
  const value = fields[name].value;
  return value === "" || isNaN(value) ? value || null : Number(value);
}

function settings() {
  const names = ["class", "order", ...Object.keys(model.numbers)];
  return Object.fromEntries(names.map((name) => [name, setting(name)]));
}

// Fill the form from the address; true if there was something. Throws a sentence for what this model does not have.
function readLink() {
  const given = [...new URLSearchParams(location.search)].filter(([name]) => Object.hasOwn(settings(), name));
  for (const [name, value] of given) {
    fields[name].value = value;
    if (fields[name].value !== value) throw Error(`the link has ${name} ${value.slice(0, 40)}, which this page does not take`);
  }
  showValues();
  return given.length > 0;
}

function writeLink(values) {
  history.replaceState(null, "", `?${new URLSearchParams(values)}`);
  find("#link").value = location.href;
  find("#share").hidden = false;
}

// ---- pictures

const className = (value) => model.classes.find(([number]) => number === value)?.[1] ?? value;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showPictures(panel, images, values, done) {
  const items = images.map((src, i) => {
    const label = `${i} · ${className(values.class)}`;
    const caption = element("figcaption", {}, element("span", { textContent: label }));
    if (done) {
      const save = element("a", { href: src, download: `class${values.class}-seed${values.seed}-${i}.png`, textContent: "save" });
      const take = element("button", { type: "button", textContent: "edit", onclick: () => takePicture(src) });
      take.setAttribute("aria-label", `edit picture ${i}`);
      save.setAttribute("aria-label", `save picture ${i}`);
      caption.append(element("span", {}, take, save));
    }
    return element("li", {}, element("figure", {}, element("img", { src, alt: `picture ${label}` }), caption));
  });
  find(".gallery", panel).replaceChildren(...items);
}

function extendStrip(panel, src, words) {
  const strip = find(".strip", panel);
  strip.hidden = false;
  find("ol", strip).append(element("li", {}, element("img", { src, alt: words }), words));
}

// ---- requests

function say(line, error = "") {
  find("#line").textContent = line;
  find("#error").textContent = error;
}

// The lines of an answer as objects. Throws the server's sentence.
async function* lines(response) {
  const decoder = new TextDecoder();
  let text = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    const parts = (text += decoder.decode(value, { stream: !done })).split("\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part);
    if (done) return;
  }
}

async function post(path, body) {
  const response = await fetch(path, { method: "POST", body, signal: job?.signal });
  if (!response.ok) throw Error((await response.json()).error);
  return response;
}

async function generate(panel, request) {
  const bar = find("progress");
  let finished = false;
  find(".strip", panel).hidden = true;
  find(".strip ol", panel).replaceChildren();
  bar.value = 0;
  for await (const event of lines(await post("generate", JSON.stringify(request)))) {
    if (event.error) throw Error(event.error);
    if (event.waiting) say(`waiting: ${event.waiting} before you`);
    if (event.step) {
      bar.value = event.step / event.steps;
      say(`step ${event.step} of ${event.steps}: ${event.known} of ${event.tokens} tokens are known`);
    }
    if (event.images) showPictures(panel, event.images, request, event.done);
    if (event.strip) extendStrip(panel, event.images[0], `step ${event.step}`);
    if (event.done) {
      if (request.watch) extendStrip(panel, event.images[0], "done");
      say(`done: ${event.class}, seed ${request.seed}, ${event.seconds} s`);
      finished = true;
    }
  }
  if (!finished) throw Error("the connection to demo.app was lost");
}

// Run one request at a time; errors become a sentence on the page.
async function run(action) {
  if (job) return;
  job = new AbortController();
  find("#go").disabled = !(find("#stop").disabled = false);
  say("starting");
  if (matchMedia("(max-width: 45rem)").matches) find("section").scrollIntoView({ behavior: "smooth" });
  try {
    await action();
  } catch (error) {
    const lost = error instanceof TypeError ? "demo.app does not answer: is it still running?" : error.message;
    job.signal.aborted ? say("stopped") : say("", lost);
  }
  job = null;
  find("#go").disabled = !(find("#stop").disabled = true);
}

function start() {
  const request = settings(), panel = find("[role=tabpanel]:not([hidden])");
  if (panel.id === "generate") writeLink(request);
  else Object.assign(request, { image: edit.image, tokens: [...edit.tokens] });
  return run(() => generate(panel, { ...request, watch: fields.watch.checked }));
}

// ---- the edit tab

function choose(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    find(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
  }
  find("#go").textContent = tab.id === "tab-edit" ? "Regenerate" : "Generate";
}

async function takePicture(src) {
  edit.image = src;
  choose(find("#tab-edit"));
  await draw();
  canvas.focus();
}

const upload = (file) => run(async () => {
  if (!file) return say("");
  if (file.size > model.upload) throw Error(`the picture is too large: at most ${model.upload / 1e6} MB`);
  const answer = await (await post("crop", file)).json();
  await takePicture(answer.image);
  say("the middle square of the picture, at the model's size");
});

// The picture, the cells to regenerate in blue, the grid, and the keyboard's cursor.
async function draw() {
  const scale = Math.ceil(384 / model.size), side = model.size * scale, cell = side / model.grid;
  const picture = edit.image && Object.assign(new Image(), { src: edit.image });
  await picture?.decode();
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale === 1;
  context.fillStyle = "#808080";
  context.fillRect(0, 0, side, side);
  if (picture) context.drawImage(picture, 0, 0, side, side);
  context.strokeStyle = "#8888";
  context.fillStyle = "#2563eb99";
  for (let token = 0; token < model.grid ** 2; token++) {
    const box = [(token % model.grid) * cell, Math.floor(token / model.grid) * cell, cell, cell];
    if (edit.tokens.has(token)) context.fillRect(...box);
    context.strokeRect(...box);
    if (token === edit.cursor && document.activeElement === canvas) {
      Object.assign(context, { strokeStyle: "#f59e0b", lineWidth: 4 });
      context.strokeRect(box[0] + 3, box[1] + 3, cell - 6, cell - 6);
      Object.assign(context, { strokeStyle: "#8888", lineWidth: 1 });
    }
  }
  const count = edit.tokens.size;
  canvas.setAttribute("aria-label", `${count} of ${model.grid ** 2} tokens to regenerate; at row ${Math.floor(edit.cursor / model.grid) + 1}, column ${(edit.cursor % model.grid) + 1}`);
}

function paint(token) {
  edit.cursor = token;
  edit.paints ? edit.tokens.add(token) : edit.tokens.delete(token);
  draw();
}

function tokenAt(event) {
  const box = canvas.getBoundingClientRect();
  const [column, row] = [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height]
    .map((share) => Math.min(model.grid - 1, Math.max(0, Math.floor(share * model.grid))));
  return row * model.grid + column;
}

function onKey(event) {
  const { grid } = model, row = Math.floor(edit.cursor / grid), column = edit.cursor % grid;
  const moves = { ArrowLeft: column && -1, ArrowRight: column < grid - 1 && 1, ArrowUp: row && -grid, ArrowDown: row < grid - 1 && grid };
  if (event.key in moves) edit.cursor += Number(moves[event.key]);
  else if (event.key === " ") edit.tokens.delete(edit.cursor) || edit.tokens.add(edit.cursor);
  else return;
  event.preventDefault();
  draw();
}

function chooseRegion(name) {
  const half = model.grid / 2, all = [...Array(model.grid ** 2).keys()];
  const row = (token) => Math.floor(token / model.grid), column = (token) => token % model.grid;
  const tests = { all: () => true, top: (t) => row(t) < half, bottom: (t) => row(t) >= half, left: (t) => column(t) < half, right: (t) => column(t) >= half };
  edit.tokens = new Set(name === "none" ? [] : all.filter(tests[name]));
  draw();
}

// ---- events

form.addEventListener("input", showValues);
form.addEventListener("submit", (event) => { event.preventDefault(); start(); });
form.noValidate = true; // the server says what is wrong, in a sentence
find("#stop").onclick = () => job?.abort();
find("#next").onclick = () => { fields.seed.value = Number(fields.seed.value) + 1; };
find("#upload").onchange = (event) => upload(event.target.files[0]);
find("#regions").onclick = (event) => event.target.value && chooseRegion(event.target.value);
find("#copy").onclick = async () => {
  find("#link").select();
  try {
    await navigator.clipboard.writeText(find("#link").value);
  } catch { // browsers have no clipboard for pages of other machines without https
    document.execCommand("copy");
  }
  say("the link is copied");
};
document.addEventListener("keydown", (event) => event.key === "Escape" && job?.abort());
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.onclick = () => { choose(tab); draw(); };
  tab.onkeydown = (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = find(`[role=tab]:not(#${tab.id})`);
    other.click();
    other.focus();
  };
}
canvas.onkeydown = onKey;
canvas.onfocus = canvas.onblur = draw;
canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  edit.paints = !edit.tokens.has(tokenAt(event));
  paint(tokenAt(event));
};
canvas.onpointermove = (event) => event.buttons && paint(tokenAt(event));

run(async () => {
  model = await (await fetch("about")).json();
  buildForm();
  showValues();
  say("");
  if (readLink()) setTimeout(start);
});
