// The page: puts its parts together and tells them what the server says.

import { ServerError, rememberKey, request } from "./api.js";
import { Cells } from "./cells.js";
import { Chat } from "./chat.js";
import { Figures } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { follow } from "./live.js";
import { Steps } from "./steps.js";
import { layerTable } from "./table.js";
import { themeButton } from "./theme.js";
import { Tooltip } from "./tooltip.js";
import { bytes, count } from "./words.js";

const find = (id) => document.getElementById(id);
const tooltip = new Tooltip(find("tooltip"));
const map = new HeatMap({
  box: find("map"), legend: find("legend"), summary: find("map-summary"), spoken: find("cell"), tooltip,
});
const steps = new Steps({ box: find("steps"), summary: find("steps-summary"), spoken: find("step"), tooltip });
const figures = new Figures(find("figures"));
const chat = new Chat(find("chat"), askForKey);
const table = layerTable(find("table"));
let cells = null;
let state = "connecting";
let following = null; // one connection at a time, whoever asks for it

themeButton(find("theme"), () => {
  map.restyle();
  steps.restyle();
});
for (const choice of document.getElementsByName("view")) choice.addEventListener("change", () => map.show(choice.value));
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault(); // the page may send no forms
  find("key-dialog").close();
  rememberKey(find("key").value);
  find("key").value = "";
  start();
});
start();

function start() {
  following ??= follow({ event: show, state: tell }).finally(() => { following = null; });
}

function tell(now, error) {
  if (now === "live" && state !== "live") learnModel(); // also after a restart, perhaps with another model
  const said = { live: "live", lost: "connection lost, trying again", paused: "paused", refused: "key needed" }[now];
  const text = now === "lost" && error instanceof ServerError ? error.message : said;
  const shown = find("connection");
  // Set only when it changes: it is read out each time.
  if (shown.textContent !== text) shown.textContent = text;
  shown.dataset.state = now;
  shown.title = error?.message ?? "";
  document.body.classList.toggle("stale", now !== "live");
  if (now === "refused") askForKey(error.message);
  state = now;
}

async function learnModel() {
  try {
    const models = await (await request("v1/models")).json();
    const [model] = models.data;
    find("model").textContent = model.id;
    document.title = `${model.id} · ExpertFlow`;
    chat.serve(model);
  } catch (error) {
    if (error instanceof ServerError && error.status === 401) askForKey(error.message);
    else find("connection").title = error.message;
  }
}

function askForKey(reason) {
  const dialog = find("key-dialog");
  find("key-error").textContent = sessionStorage.length ? reason : "";
  if (!dialog.open) dialog.showModal();
}

function show(event) {
  if (!cells?.continuesWith(event)) {
    cells = new Cells(event);
    figures.restart();
  }
  cells.update(event, performance.now());
  const experts = event.resident_LE.flat().filter((held) => held >= 0).length;
  const predictor = event.predictor ? `; predicted by ${event.predictor.name}` : "";
  find("held").textContent = `room for ${count(event.slots)} of ${count(experts)}, ${bytes(event.slot_bytes)} each${predictor}`;
  find("gate").textContent = event.predictor?.gate ? `Prefetching ${event.predictor.gate}` : "";
  figures.update(event);
  map.update(cells);
  steps.update(event.steps);
  table(cells);
}
