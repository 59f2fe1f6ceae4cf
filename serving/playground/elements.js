// What the page is made of. All text goes through textContent: a token or a name is never HTML.

export const $ = (id) => document.getElementById(id);

export const known = (value) => value !== null && value !== undefined;

export function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

/** What a model's server says that it runs, or else the gateway's configuration; and labels of the
 * configuration that are wrong. */
export function badges(model) {
  const runs = model.attnserve ?? {};
  const texts = [
    runs.variant,
    runs.bits && `${[runs.bits].flat().join(", ")} bits`,
    runs.kv_cache_dtype && `KV ${runs.kv_cache_dtype}`,
    runs.kv_budgets && `KV budgets ${Math.min(...runs.kv_budgets)}–${Math.max(...runs.kv_budgets)}`,
  ];
  const made = texts.filter(Boolean).map((text) => element("span", text, "badge"));
  if (runs.unconfirmed?.length) {
    const badge = element("span", "unconfirmed", "badge unconfirmed");
    badge.title = `The server does not say its ${runs.unconfirmed.join(" and ")}.`;
    made.push(badge);
  }
  for (const text of runs.errors ?? []) made.push(element("span", text, "badge error"));
  return made;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
/** A token that is only a part of a character has no text of its own in vLLM. */
const shown = (text) => text || "\ufffd";
const quoted = (text) => JSON.stringify(shown(text));

/** The class of a token's colour, by its probability. */
function byProbability(logprob) {
  return `p${[0.5, 0.2, 0.05, 0.01, 0.001].filter((p) => Math.exp(logprob) < p).length}`;
}

/** The same, by its logprob less the reference's. */
function byDelta(delta) {
  const steps = [0.1, 0.5, 2].filter((d) => Math.abs(delta) >= d).length;
  return `${steps && delta < 0 ? "m" : "d"}${steps}`;
}

/** The token of a span: { text, logprob, top: [[text, logprob], ...], more: [line, ...] }, and
 * `delta` where it is coloured by that. */
const tokens = new WeakMap();

function lines(token) {
  return [
    `${quoted(token.text)}  logprob ${token.logprob.toFixed(3)} (${percent(token.logprob)})`,
    ...(token.more ?? []),
    ...(token.top ?? []).map(([text, p]) => `${percent(p).padStart(9)}  ${quoted(text)}`),
  ];
}

export function tokenSpan(token) {
  const span = element("span", shown(token.text), "token");
  if (known(token.logprob)) {
    span.classList.add(known(token.delta) ? byDelta(token.delta) : byProbability(token.logprob));
    span.title = lines(token).join("\n");
    tokens.set(span, token);
  }
  if (token.text.includes("\n")) span.classList.add("newline");
  return span;
}

/** The column of a model. Pointer and arrow keys choose a token, whose lines are shown below. */
export class Column {
  constructor(model) {
    this.root = $("column").content.cloneNode(true).firstElementChild;
    this.answer = this.part("answer");
    this.part("name").textContent = model.id;
    this.part("badges").append(...badges(model));
    this.answer.setAttribute("aria-label", `Answer of ${model.id}; arrow keys walk over its tokens`);
    this.answer.addEventListener("pointerover", (event) => this.choose(event.target));
    this.answer.addEventListener("click", (event) => this.choose(event.target));
    this.answer.addEventListener("keydown", (event) => this.walk(event));
    $("columns").append(this.root);
  }

  part(name) {
    return this.root.querySelector(`.${name}`);
  }

  choose(span) {
    if (!tokens.has(span)) return;
    this.chosen?.classList.remove("chosen");
    this.chosen = span;
    span.classList.add("chosen");
    const all = lines(tokens.get(span)).map((line) => element("p", line));
    this.part("detail").replaceChildren(...all);
  }

  walk(event) {
    const { firstElementChild } = this.answer;
    const next = this.chosen ? this.chosen.nextElementSibling : firstElementChild;
    const to = { ArrowRight: next, ArrowLeft: this.chosen?.previousElementSibling }[event.key];
    if (to) {
      this.choose(to);
      event.preventDefault();
    }
  }

  /** How far it is: text, and whether that is an error. */
  state(text, failed = false) {
    this.part("state").textContent = text;
    this.part("state").classList.toggle("error", failed);
  }

  /** Figures by their names. */
  figures(named) {
    const pairs = Object.entries(named).map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      return pair;
    });
    this.part("figures").replaceChildren(...pairs);
  }

  /** Do `work` for this column; what it returns, or why it failed, is the last state. */
  async during(work) {
    this.state("running");
    this.root.setAttribute("aria-busy", "true");
    try {
      this.state(await work());
    } catch (error) {
      if (error.name === "AbortError") this.state("stopped");
      else this.state(error.message, true);
    }
    this.root.removeAttribute("aria-busy");
  }
}
