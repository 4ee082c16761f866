// The overview kept up to date: the state's panel comes as HTML from the server, the steps' numbers as they are told.
"use strict";
document.documentElement.classList.add("script");

const parent = document.getElementById("charts");
const legend = document.getElementById("legend");
const said = document.getElementById("status");
const freshness = document.getElementById("freshness");
const MOST_ADDED = 400; // points that are added before all are asked for anew, fewer
const PAUSE = 3000;

let found = null;
let drawn = null;
let added = 0;
let asking = null;
let source = null;
let state = "";

const chosen = () => [...document.querySelectorAll("[name=over]:checked")].map((box) => box.value);

async function load() {
  const query = new URLSearchParams(chosen().map((name) => ["over", name]));
  const answer = await fetch(`/console/curves?${query}`, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(`curves: ${answer.status}`);
  found = await answer.json();
  added = 0;
  if (drawn) drawn.remove();
  drawn = Charts.show(parent, legend, found);
}

// One load at a time; one more when something changed meanwhile.
function reload() {
  asking = (asking || Promise.resolve()).then(load).catch(() => {
    freshness.textContent = "The curves could not be read; trying again.";
  });
  return asking;
}

function add(rows) {
  if (!found) return;
  const fields = new Set(found.charts.map((chart) => chart.field));
  const curves = found.runs[0].curves;
  for (const row of rows) {
    if (row.step <= found.step) continue;
    found.step = row.step;
    added += 1;
    for (const field of fields) {
      curves[field][0].push(row.step);
      curves[field][1].push(row[field] ?? null);
    }
  }
  const isNew = rows.some((row) =>
    Object.keys(row).some((name) => /^(components|accuracy)\./.test(name) && row[name] !== null && !fields.has(name)),
  );
  if (isNew || added > MOST_ADDED || !found.charts.length) reload();
  else requestAnimationFrame(() => drawn.refresh());
  freshness.textContent = `Step ${found.step}, ${new Date().toLocaleTimeString()}`;
}

// Only the parts that changed, so that what is being read stays. The HTML is of the server's templates, which escape.
function showState(html) {
  const made = document.createElement("div");
  made.innerHTML = html;
  const shown = document.getElementById("state");
  if (made.children.length !== shown.children.length) return shown.replaceChildren(...made.children);
  [...made.children].forEach((part, place) => {
    if (!part.isEqualNode(shown.children[place])) shown.children[place].replaceWith(part);
  });
}

function follow() {
  const from = new URLSearchParams({ since: found ? found.step : 0, undone: found ? found.undone : 0 });
  source = new EventSource(`/console/events?${from}`);
  source.addEventListener("state", (event) => {
    const news = JSON.parse(event.data);
    showState(news.html);
    if (state && news.state !== state) said.textContent = `The run is ${news.state}`;
    state = news.state;
  });
  source.addEventListener("rows", (event) => add(JSON.parse(event.data).rows));
  source.addEventListener("again", reload);
  source.addEventListener("error", () => {
    source.close();
    freshness.textContent = "Not connected; trying again.";
    setTimeout(follow, PAUSE);
  });
}

for (const box of document.querySelectorAll("[name=over]")) box.addEventListener("change", reload);
addEventListener("pagehide", () => source && source.close());
addEventListener("pageshow", (event) => event.persisted && reload().then(follow));
reload().then(follow);
