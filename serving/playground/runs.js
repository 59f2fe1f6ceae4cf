// The two kinds of run: every model on its own, or all on the reference's tokens.
import { ServerError, ask, events } from "./api.js";
import { Column, element, known, tokenSpan } from "./elements.js";

const AT_ONCE = 5; // streams; over HTTP/1.1 a browser opens six connections, and metrics need one
const ALTERNATIVES = 5;

const ms = (value) => (known(value) ? `${value.toFixed(value < 10 ? 1 : 0)} ms` : "–");

/** Stream an answer of each model into a column of its own. */
export async function runEach(models, fields, signal) {
  const line = models.map((model) => [model, new Column(model)]);
  for (const [, column] of line) column.state("waiting");
  const worker = async () => {
    while (line.length) {
      const [model, column] = line.shift();
      await column.during(() => complete(model, column, fields, signal));
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

async function complete(model, column, fields, signal) {
  const body = { model: model.id, ...fields, stream: true, logprobs: ALTERNATIVES };
  const meter = new Meter(column);
  const pending = [];
  let reason;
  for await (const data of events(await ask("v1/completions", body, signal))) {
    if (data === "[DONE]") {
      column.answer.append(...pending.map(tokenSpan)); // an end token has no text of its own
      return reason ? `done (${reason})` : "done";
    }
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message);
    const choice = event.choices?.[0];
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    meter.count(choice);
    column.answer.append(...tokensOf(choice, pending).map(tokenSpan));
  }
  throw new ServerError("The stream broke off.");
}

/** Times and counts of one stream, as this tab sees them. */
class Meter {
  constructor(column) {
    this.column = column;
    this.began = performance.now();
    this.tokens = this.sum = 0;
    this.show();
  }

  count({ text, logprobs }) {
    const values = logprobs?.token_logprobs ?? (text ? [NaN] : []); // not given: no mean either
    if (!values.length) return;
    this.last = performance.now();
    this.tokens += values.length;
    this.sum += values.reduce((a, b) => a + b, 0);
    this.first ??= { at: this.last, tokens: this.tokens };
    this.show();
  }

  show() {
    const { first, last, tokens } = this;
    const rate = (1000 * (tokens - first?.tokens)) / (last - first?.at);
    this.column.figures({
      TTFT: ms(first && first.at - this.began),
      "tokens/s": rate > 0 ? rate.toFixed(1) : "–",
      tokens,
      "mean logprob": tokens && this.sum <= 0 ? (this.sum / tokens).toFixed(3) : "–",
    });
  }
}

/** The tokens of an event. A character of several tokens comes with the last of them: until then
 * vLLM's text is empty, and `pending` keeps the tokens, which are then shown as one. */
function tokensOf({ text, logprobs }, pending) {
  const { tokens = [], token_logprobs = [], top_logprobs = [] } = logprobs ?? {};
  const found = tokens.map((token, i) => ({
    text: token,
    logprob: token_logprobs[i],
    top: Object.entries(top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
  if (text && !pending.length && tokens.join("") === text) return found;
  pending.push(...found);
  if (!text) return [];
  const several = pending.splice(0);
  if (several.length < 2) return [{ ...several[0], text }];
  const least = several.reduce((a, b) => (b.logprob < a.logprob ? b : a));
  return [{ ...least, text, more: [`${several.length} tokens; this is the least likely of them`] }];
}

/** Have the first model write, and the others read what it wrote (POST /v1/compare). */
export async function runCompare(models, fields, signal) {
  const columns = models.map((model) => new Column(model));
  const body = { ...fields, reference: models[0].id, models: models.slice(1).map((m) => m.id) };
  const request = ask("v1/compare", body, signal).then((answer) => answer.json());
  const written = async () => {
    const { reference } = await request;
    columns[0].answer.append(...reference.tokens.map((token) => tokenSpan(asRead(token))));
    columns[0].figures(costs(reference));
    return "the reference: it wrote these tokens";
  };
  const read = async (column, i) => {
    const { reference, models: others } = await request;
    return showReading(column, reference, others[i]);
  };
  await Promise.all(
    columns.map((column, i) => column.during(i ? () => read(column, i - 1) : written)),
  );
}

function asRead({ token, logprob, top }) {
  return { text: token, logprob, top: top.map((t) => [t.token, t.logprob]) };
}

function showReading(column, reference, model) {
  const { summary, generation } = model;
  const spans = model.tokens.map((token, i) => {
    const { token: text, logprob } = reference.tokens[i];
    const more = [
      `delta ${signed(token.delta)} (reference ${logprob.toFixed(3)}), KL ${token.kl.toFixed(4)}`,
      token.agrees ? "same most likely token as the reference's" : "another most likely token",
    ];
    return tokenSpan({ ...asRead({ ...token, token: text }), delta: token.delta, more });
  });
  const at = summary.first_divergence;
  spans[at]?.classList.add("diverges");
  column.answer.append(...spans);
  column.figures({
    "sum of deltas": signed(summary.delta_sum),
    "mean KL": summary.mean_kl.toFixed(4),
    "top-1 agreement": `${(100 * summary.agreement).toFixed(0)} %`,
    ...costs(model),
  });
  if (generation) {
    const own = element("details");
    own.append(element("summary", "its own answer"), element("p", generation.text, "own"));
    column.answer.after(own);
  }
  return known(at) ? `first divergence at token ${at + 1}` : "no divergence";
}

function costs({ generation, kv }) {
  return {
    TTFT: ms(generation?.ttft_ms),
    ITL: ms(generation?.itl_ms),
    "KV per token": bytes(kv?.bytes_per_token),
    "KV per request": bytes(kv?.bytes_per_request),
  };
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

function bytes(value) {
  if (!known(value)) return "–";
  const step = Math.min(3, Math.floor(Math.log2(Math.max(value, 1)) / 10));
  return `${+(value / 1024 ** step).toPrecision(3)} ${["B", "KiB", "MiB", "GiB"][step]}`;
}
