// The page's form: key, models, prompt, and the run that is going on.
import { ask, key } from "./api.js";
import { $, badges, element } from "./elements.js";
import { watch } from "./live.js";
import { runCompare, runEach } from "./runs.js";

let models = []; // of /v1/models
let abort = null; // of the run that is going on

function say(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function listed() {
  return (await (await ask("v1/models")).json()).data;
}

async function loadModels() {
  $("forget").hidden = !key.get();
  try {
    models = await listed();
  } catch (error) {
    models = [];
    $("model-list").replaceChildren("none yet");
    return say(error.message);
  }
  $("key-form").hidden = true;
  say("");
  $("model-list").replaceChildren(...models.map(choice));
  offerReferences();
}

function choice(model, i) {
  const box = element("input");
  box.type = "checkbox";
  box.value = model.id;
  box.checked = i < 2;
  const label = element("label", "", "model");
  label.append(box, element("span", model.id), ...badges(model));
  return label;
}

function picked() {
  const names = [...$("model-list").querySelectorAll(":checked")].map((box) => box.value);
  return models.filter((model) => names.includes(model.id));
}

function comparing() {
  return $("mode").value === "compare";
}

/** The reference is one of the models that are picked. */
function offerReferences() {
  const before = $("reference").value;
  const names = picked().map((model) => model.id);
  $("reference").replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(before)) $("reference").value = before;
  $("reference-label").hidden = !comparing();
  $("legend-d").hidden = !comparing();
}

async function run() {
  const chosen = picked();
  if (!chosen.length) return say("Pick a model.");
  if (comparing() && chosen.length < 2) return say("Pick two or more models.");
  say("");
  const fields = {
    prompt: $("prompt").value,
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
  };
  if ($("seed").value) fields.seed = $("seed").valueAsNumber;
  abort = new AbortController();
  $("columns").replaceChildren();
  $("run").disabled = true;
  $("stop").disabled = false;
  const now = await listed().catch(() => []); // a server may run something else by now
  chosen.forEach((model, i) => (chosen[i] = now.find(({ id }) => id === model.id) ?? model));
  if (comparing()) {
    const first = (model) => (model.id === $("reference").value ? 0 : 1);
    await runCompare(chosen.sort((a, b) => first(a) - first(b)), fields, abort.signal);
  } else {
    await runEach(chosen, fields, abort.signal);
  }
  $("run").disabled = false;
  $("stop").disabled = true;
  abort = null;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!abort) run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => abort?.abort());
$("model-list").addEventListener("change", offerReferences);
$("mode").addEventListener("change", offerReferences);

document.addEventListener("needkey", () => {
  if (!$("key-form").hidden) return; // whoever is typing keeps the focus
  $("key-form").hidden = false;
  $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value);
  $("key").value = "";
  loadModels();
});
$("forget").addEventListener("click", () => {
  key.forget();
  abort?.abort();
  $("columns").replaceChildren();
  loadModels();
});

await loadModels();
watch();
