// The strip of live metrics: what /metrics says, every two seconds while the page is seen.
import { ask } from "./api.js";
import { $, element, known } from "./elements.js";

const POLL_MS = 2000;
const WINDOW_MS = 60000;

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const samples = []; // of the last minute: { at, sum, count, tokens }

/** Prometheus' text format: [{ name, labels, value }, ...]. */
function parse(text) {
  const unescaped = (s) => s.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
  const found = [];
  for (const line of text.split("\n")) {
    const [, name, labels = "", value] = SAMPLE.exec(line) ?? [];
    if (!name?.startsWith("attnserve_")) continue;
    const pairs = [...labels.matchAll(LABEL)].map((m) => [m[1], unescaped(m[2])]);
    found.push({
      name: name.slice("attnserve_".length),
      labels: Object.fromEntries(pairs),
      value: Number(value),
    });
  }
  return found;
}

function show(metrics) {
  const sum = (name) =>
    metrics.filter((m) => m.name === name).reduce((total, m) => total + m.value, 0);
  const now = {
    at: performance.now(),
    sum: sum("time_to_first_token_seconds_sum"),
    count: sum("time_to_first_token_seconds_count"),
    tokens: sum("completion_tokens_total"),
  };
  samples.push(now);
  while (now.at - samples[0].at > WINDOW_MS) samples.shift();
  const since = samples[0];
  const seconds = (now.at - since.at) / 1000;
  const streams = now.count - since.count;
  const ttft = streams > 0 ? `${((1000 * (now.sum - since.sum)) / streams).toFixed(1)} ms` : "–";
  $("in-flight").textContent = sum("requests_in_flight") - 1; // less the one that asks for this
  $("live-ttft").textContent = ttft;
  $("live-rate").textContent = seconds ? ((now.tokens - since.tokens) / seconds).toFixed(1) : "–";
  $("replicas").replaceChildren(...replicas(metrics).map(line));
}

/** Each replica once: it may stand under several models. */
function replicas(metrics) {
  const found = new Map();
  for (const { name, labels, value } of metrics) {
    if (!name.startsWith("replica_")) continue;
    const replica = found.get(labels.replica) ?? { url: labels.replica, models: new Set() };
    replica.models.add(labels.model);
    if (name === "replica_label_mismatch" && value) replica.mismatch = labels;
    replica[name.slice("replica_".length)] = value;
    found.set(replica.url, replica);
  }
  return [...found.values()];
}

function line(replica) {
  const made = element("li");
  const state = replica.healthy && !replica.circuit_open ? "up" : "down";
  made.title = replica.url;
  made.append(element("span", state, state), element("span", [...replica.models].join(", "), "name"));
  const kv = replica.kv_cache_usage_ratio;
  if (known(kv)) {
    const meter = element("meter");
    meter.value = kv;
    meter.setAttribute("aria-label", "KV cache in use");
    made.append(meter, element("span", `KV ${(100 * kv).toFixed(1)} %`));
  }
  made.append(element("span", `${replica.in_flight ?? 0} running`));
  if (replica.mismatch) {
    const { variant, bits } = replica.mismatch;
    made.append(element("span", `wrong label: it runs ${variant}, ${bits} bits`, "error"));
  }
  if (replica.waiting) made.append(element("span", `${replica.waiting} waiting`));
  return made;
}

async function poll() {
  if (document.hidden) return;
  let failed = "";
  try {
    show(parse(await (await ask("metrics")).text()));
  } catch (error) {
    failed = `no metrics: ${error.message}`;
  }
  $("live-error").textContent = failed;
  $("live-error").hidden = !failed;
}

/** Poll for ever. */
export async function watch() {
  document.addEventListener("visibilitychange", poll);
  for (;;) {
    await poll();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}
