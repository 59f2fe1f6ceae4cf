"""Small random models of many architectures, served with the attention that they were trained with:
log-probabilities and tokens are transformers', or one line says why not.

`python -m tests.vllm_attn.test_architectures` writes the table of docs/MODELS.md again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from attnserve.files import CHECKOUT
from tests.tiny import tiny_tokenizer
from tests.tiny_models import ARCHITECTURES, tiny_model
from tests.vllm_attn.offline import answers

TABLE = CHECKOUT / "docs/results/architectures.csv"
PROMPT_LENGTH, NUM_TOKENS = 100, 16

OF_STOCK = ("gemma3n_text", "bloom", "falcon, ALiBi", "cohere2", "apertus")
"""Those whose vLLM classes compute something else, or in another precision, than transformers':
they are compared with vLLM's own attention."""


def write(name: str, folder: Path, **changed: Any) -> PreTrainedModel:
    """Write a model of an architecture and a tokenizer; return it. `changed`: as `tiny_model`."""
    model = tiny_model(name, **changed)
    model.save_pretrained(folder)
    tiny_tokenizer(512).save_pretrained(folder)
    return model


def served(folders: Mapping[Path, str], prompt: list[int]) -> list[Mapping[str, Any]]:
    """Return what vLLM finds of each checkpoint with its backend: log-probabilities of the prompt's
    tokens and greedy tokens, or why it was refused."""
    jobs = [(folder, {"attention_backend": backend}) for folder, backend in folders.items()]
    found: list[Mapping[str, Any]] = []
    for each in answers(jobs, [prompt], NUM_TOKENS):
        if "refused" in each:
            found.append(each)
        else:
            (answer,) = each["answers"]
            found.append(answer | {"logprobs": answer["logprobs"][: len(prompt) - 1]})
    return found


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Return transformers' log-probabilities of a prompt's tokens, and its greedy tokens."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1]
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        last = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(last.argmax()))
    logprobs = logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    return logprobs, tokens[len(prompt) :]


def measure(folder: Path, names: Sequence[str] = tuple(ARCHITECTURES)) -> pd.DataFrame:
    """Serve architectures; return a row each: the largest difference of a log-probability from
    the reference's, absolute and in units of their spread, whether all tokens are the same, or the
    line with which it is refused."""
    prompt = torch.randint(2, 256, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(0))
    expected = {}
    for name in names:
        model = write(name, folder / name)
        expected[name] = (model.config.architectures[0], *reference(model, prompt.tolist()))
    rows = []
    backends = {name: "sinks" if name == "gpt_oss" else "softmax" for name in names}
    answers = served({folder / name: backends[name] for name in names}, prompt.tolist())
    stock = {folder / name: "cpu_attn" for name in names if name in OF_STOCK}
    for place, found in zip(stock, served(stock, prompt.tolist()), strict=True):
        logprobs = torch.tensor(found["logprobs"])
        expected[place.name] = (expected[place.name][0], logprobs, found["tokens"])
    for name, found in zip(names, answers, strict=True):
        architecture, logprobs, tokens = expected[name]
        row = {"model_type": name, "architecture": architecture, "backend": backends[name]}
        row["compared_with"] = "stock vLLM" if name in OF_STOCK else "transformers"
        if reason := found.get("refused"):
            lines = [line for line in reason.splitlines() if "errors.pydantic.dev" not in line]
            row["refused"] = lines[-1].strip()
        else:
            difference = float((torch.tensor(found["logprobs"]) - logprobs).abs().max())
            row["largest_difference"] = difference
            row["of_spread"] = difference / float(logprobs.std())
            row["same_tokens"] = found["tokens"] == tokens
        rows.append(row)
    columns = ["largest_difference", "of_spread", "same_tokens", "refused"]
    return pd.DataFrame(
        rows, columns=["model_type", "architecture", "backend", "compared_with", *columns]
    )


@pytest.mark.integration
def test_soft_caps_alibi_and_sinks(tmp_path: Path) -> None:
    """Models that ask for more than plain softmax; Granite passes `sinks=None`."""
    found = measure(tmp_path, ["granite", "gemma2", "bloom", "gpt_oss"])
    assert found["refused"].isna().all() and found["same_tokens"].all(), found
    assert found["of_spread"].max() < 1e-4, found


@pytest.mark.slow
def test_heads_that_contradict_the_model(tmp_path: Path) -> None:
    """GPT-BigCode's are one, whatever config.json says; vLLM reads keys by the latter."""
    write("gpt_bigcode", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    (found,) = serve({tmp_path: "softmax"}, list(range(2, 50)))
    assert "makes other keys than the 2 heads of 32 that config.json says" in found["refused"]


@pytest.mark.slow
def test_architectures(tmp_path: Path) -> None:
    """Those that the table has as served: the same float32 sums in another order."""
    table = pd.read_csv(TABLE).set_index("model_type")
    assert list(table.index) == list(ARCHITECTURES)
    found = measure(tmp_path).set_index("model_type")
    assert list(found["refused"].isna()) == list(table["refused"].isna()), found
    served = found[found["refused"].isna()]
    assert served["of_spread"].max() < 1e-4 and served["same_tokens"].all(), served


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        measure(Path(made)).to_csv(TABLE, index=False, float_format="%.2e")
