"use strict";
// The page asks for clips, follows its request until every clip is there, and shows them. A newer request of the page
// supersedes the older one, here and in the server's queue.

const DEBOUNCE = 250;  // ms without a key before a request
const TILES = 24;  // of the gallery
const at = id => document.getElementById(id);
const settings = JSON.parse(at("settings").textContent);
const panels = [...document.querySelectorAll(".panel")];
const page = [...crypto.getRandomValues(new Uint8Array(12))].map(byte => byte.toString(16).padStart(2, "0")).join("");

let turn = 0;  // of the newest request
let timer = 0;
let image = null;  // {name, preview} of the first frame
let latest = null;  // the newest gallery entry

// Text as a number where it is one: the server says what is wrong with anything else.
function number(text) {
  const trimmed = text.trim();
  return trimmed !== "" && Number.isFinite(Number(trimmed)) ? Number(trimmed) : trimmed;
}

function asked() {
  const models = {};
  for (const panel of panels) {
    const own = models[panel.dataset.model] = {};
    for (const name of ["steps", "guidance"]) {
      const text = panel.querySelector(`.${name}`).value;
      if (text.trim()) own[name] = number(text);
    }
  }
  return { page, prompt: at("prompt").value, seed: number(at("seed").value), image: image && image.name, models };
}

function fail(line) { at("fault").textContent = line; if (line) at("status").textContent = ""; }

// The answer as JSON. Throws an error whose message is the server's line.
async function talk(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer; is the program still running?");
  }
  const found = await answer.json().catch(() => ({ error: `The server answered with status ${answer.status}.` }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function seconds(value) { return value < 0.9995 ? `${Math.round(1000 * value)} ms` : `${value.toPrecision(3)} s`; }

function put(panel, part, text) { panel.querySelector(`.${part}`).textContent = text; }

function play(video, clip) {
  const address = `/clips/${clip.name}.mp4`;
  video.classList.toggle("pixels", clip.width < 200);
  if (video.getAttribute("src") !== address) video.src = address;
}

function show(panel, outcome) {
  const busy = { waiting: "", making: "making the clip", compiling: "compiling for these settings, once" }[outcome.state];
  panel.dataset.state = busy === undefined ? outcome.state : "busy";
  put(panel, "note", busy ?? outcome.error ?? "");
  const video = panel.querySelector("video"), link = panel.querySelector(".download"), clip = outcome.clip;
  if (outcome.state === "failed") {
    video.removeAttribute("src");
    video.load();
  }
  if (busy !== undefined) return;
  link.hidden = !clip;
  for (const part of ["encoding", "network", "decoding", "total"]) put(panel, part, clip ? seconds(clip.seconds[part]) : "–");
  put(panel, "evaluations", clip ? `${clip.evaluations}${clip.per_chunk ? " per chunk" : ""}` : "–");
  put(panel, "remark", clip && clip.compiles ? "these times include compiling" : "");
  if (!clip) return;
  play(video, clip);
  link.href = `/clips/${clip.name}.mp4`;
  link.download = `${panel.dataset.model}-seed${at("seed").value.trim()}.mp4`.replace(/[^\w.-]+/g, "_");
}

// How much faster every other model is than the first one.
function compare(outcomes) {
  const [first, ...others] = outcomes;
  others.forEach((outcome, place) => {
    if (!first.clip || !outcome.clip || first.clip.compiles || outcome.clip.compiles) return;
    const ratio = first.clip.seconds.total / outcome.clip.seconds.total;
    if (ratio >= 1.1) {
      put(panels[place + 1], "remark", `${ratio.toPrecision(ratio < 10 ? 2 : 3)}× as fast as ${first.model}`);
    }
  });
}

function showAll(outcomes) {
  for (const outcome of outcomes) show(panels.find(panel => panel.dataset.model === outcome.model), outcome);
  compare(outcomes);
}

function say(found) {
  if (found.state === "waiting") {
    return found.ahead ? `In the queue: ${found.ahead} ahead of this request` : "In the queue: next";
  }
  return found.state === "running" ? "Making the clips" : "";
}

const wait = time => new Promise(done => setTimeout(done, time));

async function ask() {
  clearTimeout(timer);
  const mine = ++turn, request = asked();
  if (settings.typing && !request.prompt.trim()) { fail(""); at("status").textContent = "Type a prompt."; return; }
  try {
    const { request: name } = await talk("/requests", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request),
    });
    if (mine === turn) fail("");
    for (let pause = 60; mine === turn; pause = Math.min(1.25 * pause, 1000)) {
      const found = await talk(`/requests/${name}`);
      if (mine !== turn || found.state === "superseded") return;
      at("status").textContent = say(found);
      showAll(found.clips);
      if (found.state === "done") { keep(request, found.clips); return; }
      await wait(pause);
    }
  } catch (error) {
    if (mine !== turn) return;
    fail(error.message);
    for (const panel of panels) if (panel.dataset.state === "busy") { delete panel.dataset.state; put(panel, "note", ""); }
  }
}

function changed() {
  if (!settings.typing) return;
  clearTimeout(timer);
  timer = setTimeout(ask, DEBOUNCE);
}

// One prompt that another one begins with was on its way to it: the gallery keeps where the typing ended.
function typedOn(older, newer) {
  const { prompt: before, ...rest } = older, { prompt: after, ...others } = newer;
  return JSON.stringify(rest) === JSON.stringify(others) && (after.startsWith(before) || before.startsWith(after));
}

function keep(request, outcomes) {
  const clips = outcomes.filter(outcome => outcome.clip);
  if (!clips.length) return;
  if (latest && typedOn(latest.request, request)) latest.tile.remove();
  const tile = document.createElement("li"), button = document.createElement("button");
  const strip = document.createElement("div"), words = document.createElement("div");
  button.type = "button";
  strip.className = "strip";
  words.className = "words";
  for (const { clip } of clips) {
    const video = Object.assign(document.createElement("video"), { muted: true, loop: true, autoplay: true, playsInline: true });
    play(video, clip);
    video.addEventListener("error", () => tile.remove());  // the server keeps the newest clips only
    strip.append(video);
  }
  const prompt = document.createElement("span"), seed = document.createElement("div");
  prompt.textContent = request.prompt;
  seed.className = "soft";
  seed.textContent = `seed ${request.seed}${request.image ? ", with image" : ""}`;
  words.append(prompt, seed);
  button.append(strip, words);
  tile.append(button);
  const first = image;
  button.addEventListener("click", () => restore(request, outcomes, first));
  latest = { request, tile };
  at("gallery").prepend(tile);
  while (at("gallery").children.length > TILES) at("gallery").lastElementChild.remove();
  at("past").hidden = false;
}

function restore(request, outcomes, first) {
  ++turn;
  clearTimeout(timer);
  fail("");
  at("status").textContent = "";
  at("prompt").value = request.prompt;
  at("seed").value = request.seed;
  for (const panel of panels) {
    const own = request.models[panel.dataset.model];
    for (const name of ["steps", "guidance"]) panel.querySelector(`.${name}`).value = own[name] ?? "";
  }
  setImage(first);
  showAll(outcomes);
  window.scrollTo({ top: 0, behavior: "smooth" });
}

function setImage(found) {
  image = found;
  if (!at("drop")) return;
  at("drop").classList.toggle("full", Boolean(found));
  at("drop").style.backgroundImage = found ? `url("${found.preview}")` : "";
  at("hint").hidden = at("remove").hidden = true;
  (found ? at("remove") : at("hint")).hidden = false;
  at("image").value = "";
}

async function upload(file) {
  try {
    if (file.size > settings.image_bytes) {
      throw new Error(`image has ${file.size} bytes, expected at most ${settings.image_bytes}; make it smaller`);
    }
    const { image: name } = await talk("/images", { method: "POST", body: file });
    fail("");
    setImage({ name, preview: URL.createObjectURL(file) });
    changed();
  } catch (error) {
    at("image").value = "";
    fail(error.message);
  }
}

at("form").addEventListener("submit", event => { event.preventDefault(); ask(); });
at("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
for (const input of document.querySelectorAll("#prompt, #seed, .steps, .guidance")) input.addEventListener("input", changed);
for (const input of document.querySelectorAll(".steps, .guidance")) {
  input.addEventListener("keydown", event => { if (event.key === "Enter") ask(); });
}
at("new-seed").addEventListener("click", () => {
  at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
  changed();
});
if (at("drop")) {
  at("image").addEventListener("change", event => { if (event.target.files[0]) upload(event.target.files[0]); });
  at("remove").addEventListener("click", () => { setImage(null); changed(); });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, event => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
    });
  }
}
at("prompt").setSelectionRange(-1, -1);  // the cursor behind the example
if (settings.typing && at("prompt").value) ask();
