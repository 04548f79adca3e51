// Asks the server what its workers report, again and again, and shows it.

import { Card, differences, stack } from "./charts.js";
import { ExpertMap, decode, stateOf, useOf } from "./expert_map.js";
import { bytes, clock, count, hitRate, layerNumber, percent, rate, seconds } from "./figures.js";

const EVERY_MS = 2000;
const SAMPLES_KEPT = 600;
const KEY = "moe-offload-key";
const DATA = new URL("data", new URL("./", import.meta.url));

const $ = (id) => document.getElementById(id);
const map = new ExpertMap($("map"), $("cell"));
const cards = {
  hits: new Card($("cards"), "hits", "Hit rate", { top: 1 }),
  waiting: new Card($("cards"), "waiting", "Waiting for experts"),
  tokens: new Card($("cards"), "tokens", "Tokens per second"),
  loads: new Card($("cards"), "loads", "Read from disk", { base: 1024 }),
};

let series = null;
let shown = { name: "", started: 0 };
let model = null;
let paused = false;
let timer = 0;

async function poll() {
  clearTimeout(timer);
  try {
    const answer = await fetch(address(), { headers: credentials(), cache: "no-store" });
    if (answer.status === 401 || answer.status === 403) return askForKey();
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    show(await answer.json());
    connected();
  } catch (error) {
    disconnected(error);
  }
  if (!paused && !document.hidden) timer = setTimeout(poll, EVERY_MS);
}

function address() {
  const query = new URLSearchParams({ since: series?.time.at(-1) ?? 0 });
  for (const name of ["model", "worker"]) {
    const { value } = $(`choose-${name}`).querySelector("select");
    if (value) query.set(name, value);
  }
  if ($("requests-details").open) query.set("requests", "true");
  return `${DATA}?${query}`;
}

function credentials() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function askForKey() {
  $("refused").textContent = sessionStorage.getItem(KEY) ? "The server refused this key." : "";
  sessionStorage.removeItem(KEY);
  $("login").hidden = false;
  $("figures").hidden = true;
  setConnection("locked", "Locked");
  $("key").focus();
}

function connected() {
  delete document.body.dataset.lost;
  $("login").hidden = true;
  $("figures").hidden = false;
  setConnection(paused ? "paused" : "live", paused ? "Paused" : "Live");
}

function disconnected(error) {
  if (!("lost" in document.body.dataset)) {
    document.body.dataset.lost = "";
    const reason = error instanceof TypeError ? "" : ` (${error.message})`;
    setConnection("lost", `Server not reachable since ${clock(Date.now() / 1000)}${reason}; trying again`);
  }
}

function setConnection(state, text) {
  const element = $("connection");
  if (element.textContent !== text) element.textContent = text;
  element.dataset.state = state;
}

function show(data) {
  model = data.model;
  $("version").textContent = data.version;
  options($("choose-model"), data.models.map((name) => [name, name]));
  document.body.toggleAttribute("data-empty", !model);
  if (!model) {
    $("sentence").textContent = "No worker has reported yet.";
    $("as-of").textContent = "";
    series = null;
    return;
  }
  remember(model);
  $("model").textContent = model.name;
  document.title = `${model.name} · MoE offloading`;
  options($("choose-worker"), model.workers.map((worker, index) => [index, nameOf(worker)]));
  $("as-of").textContent = model.time ? `as of ${clock(model.time)}, running for ${seconds(data.time - model.started)}` : "";
  showSummary(model.summary);
  showCards(model.recent);
  $("experts").hidden = !model.experts;
  if (model.experts) {
    map.show(model.experts);
    showExperts(model.experts);
  }
  showPrefetch(model);
  showMemory(model);
  showRequests(model.requests ?? []);
  showWorkers(model.workers);
}

function remember({ name, started, series: latest }) {
  const isSame = series && shown.name === name && shown.started === started;
  shown = { name, started };
  if (!isSame) {
    series = latest;
    return;
  }
  for (const [column, values] of Object.entries(latest)) {
    series[column] = series[column].concat(values).slice(-SAMPLES_KEPT);
  }
}

function options(label, entries) {
  const select = label.querySelector("select");
  label.hidden = entries.length < 2;
  const wanted = JSON.stringify(entries);
  if (select.dataset.entries === wanted) return;
  select.dataset.entries = wanted;
  const before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === before)) select.value = before;
}

const nameOf = ({ replica, rank, engine }) => {
  const engines = new Set(model.workers.map((worker) => worker.engine));
  const of = engines.size > 1 ? `${engine.slice(0, 6)} ` : "";
  return `${of}${replica ? `replica ${replica}, ` : ""}rank ${rank}`;
};

function showSummary({ state, sentence, advice }) {
  document.querySelector(".summary").dataset.state = state;
  if ($("sentence").textContent !== sentence) $("sentence").textContent = sentence;
  const items = advice.map((text) => Object.assign(document.createElement("li"), { textContent: text }));
  $("advice").replaceChildren(...items);
  $("advice").hidden = !advice.length;
}

function showCards(recent) {
  const rows = differences(series);
  const waited = (row) => (row.busy_seconds ? Math.min(1, row.stall_seconds / row.busy_seconds) : NaN);
  const perSecond = (name) => (row) => row[name] / row.seconds;
  const { hits, misses, busy_seconds: busy, ...now } = recent ?? {};
  cards.hits.show(percent(hitRate(hits, misses)), rows, (row) => hitRate(row.hits, row.misses), percent);
  cards.waiting.show(percent(busy ? Math.min(1, now.stall_seconds / busy) : NaN), rows, waited, percent);
  cards.tokens.show(busy ? rate(now.tokens / busy) : "0", rows, perSecond("tokens"), rate);
  const loaded = now.time ? now.loaded_bytes / now.time : 0;
  cards.loads.show(`${bytes(loaded)}/s`, rows, perSecond("loaded_bytes"), (value) => `${bytes(value)}/s`);
}

function showExperts(experts) {
  const { layers, known } = experts;
  $("legend").dataset.known = known;
  let resident = 0;
  let uses = 0;
  let covered = 0;
  for (const cell of map.cells) {
    const use = useOf(experts, cell);
    uses += use;
    if (stateOf(cell)) {
      resident += 1;
      covered += use;
    }
  }
  const total = model.totals.experts || map.cells.length;
  const shape = `${layers.length} layers of ${experts.experts}`;
  const of = uses ? `, which take ${percent(covered / uses)} of recent uses` : "";
  $("experts-text").textContent = known
    ? `${shape}; ${count(resident)} of ${count(total)} are in memory${of}`
    : `${shape}; the device decides which are in its slots`;
  fill($("layers"), layers.map((name, layer) => layerRow(experts, name, layer)));
}

function layerRow(experts, name, layer) {
  const row = map.cells.subarray(layer * experts.experts, (layer + 1) * experts.experts);
  const resident = row.reduce((total, cell) => total + (stateOf(cell) ? 1 : 0), 0);
  const most = [...row.keys()].filter((expert) => row[expert] >> 2).sort((a, b) => (row[b] >> 2) - (row[a] >> 2));
  return [
    layerNumber(name, layer),
    experts.known ? count(resident) : "–",
    percent(hitRate(experts.hits[layer], experts.misses[layer])),
    count(experts.misses[layer]),
    seconds(experts.stall_seconds[layer]),
    most.slice(0, 4).map((expert) => (experts.known && !stateOf(row[expert]) ? `${expert} (absent)` : expert)).join(", "),
  ];
}

function showPrefetch({ totals, predictor, prediction, prediction_reason: reason }) {
  const { prefetches: started, prefetch_useful: useful, prefetch_late: late, prefetch_wasted: wasted } = totals;
  const remembered = totals.history_requests ? `; ${count(totals.history_requests)} requests remembered` : "";
  $("prefetch-text").textContent = predictor
    ? `${predictor}, ${prediction}${reason ? `: ${reason}` : ""}${remembered}`
    : "";
  const share = (number) => (started ? number / started : 0);
  const wait = totals.misses ? totals.stall_seconds / totals.misses : 0;
  const moved = totals.prefetched_bytes + totals.copied_prefetched_bytes;
  const rest = Math.max(0, started - useful - late - wasted);
  showParts("prefetch", [
    ["good", "Useful", useful, share(useful), `there when needed; saved about ${seconds(useful * wait)}`],
    ["late", "Late", late, share(late), "still on their way when needed"],
    ["wasted", "Wasted", wasted, share(wasted), `evicted unused; about ${bytes(moved * share(wasted))} in vain`],
    ["rest", "Open", rest, share(rest), "not needed yet"],
  ]);
}

function showMemory({ totals, daemon }) {
  const { slots, experts, slot_bytes: held, expert_bytes: all } = totals;
  const share = experts ? Math.min(1, slots / experts) : 0;
  $("memory-text").textContent = daemon ? "kept by the daemon" : "";
  const parts = [
    ["good", "Slots", slots, share, `${bytes(held)} of ${bytes(all)} of experts (${percent(share)})`],
    ["rest", "Elsewhere", Math.max(0, experts - slots), 0, `${bytes(Math.max(0, all - held))} more, fetched when needed`],
    ["", "Read from disk", bytes(totals.loaded_bytes), 0, reasons(totals, "")],
  ];
  if (totals.copied_bytes) {
    parts.push(["", "Copied to the device", bytes(totals.copied_bytes), 0, reasons(totals, "copied_")]);
  }
  showParts("memory", parts);
}

// Why bytes came to a tier, largest first.
function reasons(totals, prefix) {
  return [["demanded", "on demand"], ["prefetched", "prefetched"], ["streamed", "ahead of long prefills"]]
    .map(([name, text]) => [totals[`${prefix}${name}_bytes`], text])
    .filter(([nbytes]) => nbytes > 0)
    .sort(([one], [other]) => other - one)
    .map(([nbytes, text]) => `${bytes(nbytes)} ${text}`)
    .join(", ");
}

// parts: [part, name, number or text of it, share of the bar, text].
function showParts(id, parts) {
  stack($(`${id}-stack`), parts.map(([part, , , share]) => ({ part, share })));
  const rows = parts.map(([part, name, number, , text]) => {
    const row = document.createElement("div");
    const term = Object.assign(document.createElement("dt"), { textContent: name });
    term.dataset.part = part;
    const shownNumber = typeof number === "number" ? count(number) : number;
    const value = Object.assign(document.createElement("dd"), { textContent: shownNumber });
    row.append(term, value, Object.assign(document.createElement("dd"), { textContent: text }));
    return row;
  });
  $(`${id}-parts`).replaceChildren(...rows);
}

function showRequests(requests) {
  fill($("requests"), requests.map((request) => [
    request.id,
    request.running ? "running" : "ended",
    count(request.tokens),
    count(request.experts),
    percent(hitRate(request.experts - request.misses, request.misses)),
    seconds(request.stall_seconds),
  ]));
}

function showWorkers(workers) {
  fill($("workers"), workers.map((worker) => [
    nameOf(worker),
    worker.pid,
    percent(hitRate(worker.hits, worker.misses)),
    count(worker.misses),
    seconds(worker.stall_seconds),
  ]));
}

function fill(table, rows) {
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((values, index) => {
    const row = body.rows[index] ?? body.insertRow();
    values.forEach((value, column) => {
      const cell = row.cells[column] ?? row.appendChild(document.createElement(column ? "td" : "th"));
      if (!column) cell.scope = "row";
      if (cell.textContent !== String(value)) cell.textContent = value;
    });
  });
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  poll();
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  if (paused) clearTimeout(timer);
  if (paused) setConnection("paused", "Paused");
  else poll();
});
$("requests-details").addEventListener("toggle", () => $("requests-details").open && poll());
for (const label of [$("choose-model"), $("choose-worker")]) {
  label.addEventListener("change", () => {
    series = null;
    poll();
  });
}
document.addEventListener("visibilitychange", () => !document.hidden && !paused && poll());
poll();
