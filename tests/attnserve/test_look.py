"""`attnserve look`: its figures and what it drops, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from attn_kernels import variant_names
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.look.command import look
from attnserve.look.maps import maps
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint, tiny_tokenizer

TOKENS = list(range(3, 27))
N = len(TOKENS)


def unpacked(text: str) -> NDArray[np.float32]:
    """Return the numbers that the page's script reads."""
    return (np.frombuffer(base64.b64decode(text), "<u2").astype(np.uint32) << 16).view(np.float32)


def data_of(page: Path) -> dict[str, Any]:
    """Return what is in a page."""
    text = page.read_text()
    assert "http" not in text and "src=" not in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.mark.parametrize("variant", variant_names())
def test_figures_of_every_variant(variant: str, tmp_path: Path) -> None:
    """Against loops over the model's own weights."""
    folder = tiny_checkpoint(tmp_path / variant, variant, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = maps(Checkpoint(folder), TOKENS)
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([TOKENS]), use_cache=False, output_attentions=True)
    assert (
        found.weights.shape == (2, 4, N, N)
        and (found.penalties is None) != model.config.variant.stateful
    )
    for layer, attention in enumerate(output.attentions):
        for head in range(4):
            rows = attention[0, head].double().numpy()
            figures = {name: values[layer, head] for name, values in found.figures.items()}
            entropies = []
            for row in rows:
                p = row[row > 0] / row.sum() if row.sum() else np.ones(1)
                entropies.append(-(p * np.log(p)).sum())
            zeros = sum(int((rows[i, : i + 1] == 0).sum()) for i in range(N))
            assert figures["first token"] == pytest.approx(rows[:, 0].mean())
            assert figures["zeros"] == pytest.approx(zeros / (N * (N + 1) / 2))
            assert figures["entropy"] == pytest.approx(np.mean(entropies), abs=1e-6)
            assert figures["sum"] == pytest.approx(rows.sum(1).mean())


def test_what_a_budget_drops_is_what_a_pruned_model_drops(tmp_path: Path) -> None:
    budget = 9
    selective = maps(Checkpoint(tiny_checkpoint(tmp_path / "all", "selective")), TOKENS)
    pruned = {"name": "selective", "kv_budgets": [budget] * 3}
    kept = maps(Checkpoint(tiny_checkpoint(tmp_path / "pruned", pruned)), TOKENS)
    # Later layers read other inputs where the first has dropped something.
    gone = np.arange(N)[:, None] >= selective.dropped(budget)[0].numpy()
    lost = (kept.weights[0] == 0).all(0).numpy() & np.tri(N, dtype=bool)
    assert gone.sum() > N and (gone == lost).all()
    assert kept.kv_budgets == (budget,) * 3


def test_two_checkpoints_on_one_page(tmp_path: Path, commands: Commands) -> None:
    names = ("selective", "softpick")
    folders = [tiny_checkpoint(tmp_path / name, name) for name in names]
    out, text = tmp_path / "page.html", "Licensed to all <b>who</b> & look"
    arguments = (*folders, "--prompt", text, "--budgets", "4", "6", "--out", out)
    printed = json.loads(commands.run(look, *arguments, "--json"))
    data = data_of(out)
    assert data["words"][0] == "<|end|>" and "".join(data["words"][1:]) == text
    n = len(data["words"])
    assert printed["tokens"] == n and printed["out"] == str(out)
    rows, columns = np.tril_indices(n)
    for folder, model in zip(folders, data["models"], strict=True):
        checkpoint = Checkpoint(folder)
        found = maps(checkpoint, [checkpoint.bos, *checkpoint.encode(text)])
        weights = unpacked(model["weights"]).reshape(3, 4, -1)
        expected = found.weights.numpy()[..., rows, columns]
        assert ((weights == 0) == (expected == 0)).all()
        np.testing.assert_allclose(weights, expected, rtol=2**-8, atol=2e-38)
        assert printed["figures"][model["name"]]["sink rate"] == found.sink_rate
    selective, softpick = data["models"]
    assert list(selective["dropped"]) == ["4 tokens a layer", "6 tokens a layer"]
    assert softpick["penalties"] is None and not softpick["dropped"]
    assert "sink rate" in commands.run(look, *arguments)


def test_a_plain_model_is_shown_with_softmax(
    tiny_llama: Path, tmp_path: Path, commands: Commands
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("Licensed to the reader, word by word. " * 9)
    commands.run(look, tiny_llama, "--text", text, "--tokens", "20", "--out", out)
    (model,) = data_of(out)["models"]
    assert np.array(model["figures"]["sum"]) == pytest.approx(1, abs=1e-4)


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, commands: Commands) -> None:
    softpick = tiny_checkpoint(tmp_path / "softpick", "softpick")
    selective = tiny_checkpoint(tmp_path / "selective", "selective")
    other = tmp_path / "other"
    tokenizer = tiny_tokenizer(300)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    out = f"--out={tmp_path / 'page.html'}"
    prompt = ("--prompt", "one two three", out)
    for arguments, message in (
        ((tmp_path, *prompt), "has no config.json: name a checkpoint's folder"),
        ((softpick, "--prompt", "", out), "the prompt has no token: give more text"),
        ((softpick, *prompt, "--text", "x"), "--text and --prompt are both the text"),
        ((softpick, "--text", "nowhere.txt", out), "nowhere.txt is not there"),
        ((softpick, other, *prompt), "has another tokenizer than"),
        ((selective, *prompt, "--budgets", "900"), "a budget of 900 tokens shows nothing of"),
        ((softpick, *prompt, "--tokens", "9999"), "Input should be less than or equal to 512"),
    ):
        assert message in commands.refused(look, *arguments)
    assert not (tmp_path / "page.html").exists()


LOOK = """
const canvases = [...document.querySelectorAll("canvas")].map((canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height)
    .getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
  return Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 4).join());
});
const cut = [...document.querySelectorAll(".model, .words")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1).length;
return {canvases, cut, wide: document.documentElement.scrollWidth};
"""
"""The pixels of each map as `red,green,blue,alpha`, how many elements are cut off, and the page's
width."""


@pytest.mark.integration  # a browser
@pytest.mark.parametrize(("width", "scheme"), [(800, "light"), (1280, "dark")])
def test_in_a_browser(
    browser: Chrome, tmp_path: Path, commands: Commands, width: int, scheme: str
) -> None:
    folders = [tiny_checkpoint(tmp_path / name, name) for name in ("selective", "softpick")]
    out = tmp_path / "page.html"
    text = "Licensed to all who look at attention word by word and head by head, for free"
    commands.run(look, *folders, "--prompt", text, "--budgets", "8", "--out", out)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    screen = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("browser")
    browser.get(out.as_uri())
    words = data_of(out)["words"]
    n = len(words)

    def seen() -> list[list[str]]:
        found: dict[str, Any] = browser.execute_script(LOOK)
        assert found["wide"] <= width and not found["cut"]
        later = n * (n - 1) // 2
        assert all(pixels.count("0,0,0,0") == later for pixels in found["canvases"])
        canvases: list[list[str]] = found["canvases"]
        return canvases

    before = seen()
    assert all(len(set(pixels)) > 10 for pixels in before)
    browser.find_element(By.CSS_SELECTOR, "[aria-label^='layer 2, head 3']").click()
    assert all(now != then for now, then in zip(seen(), before, strict=True))
    pressed = browser.find_elements(By.CSS_SELECTOR, ".heads [aria-pressed='true']")
    assert len(pressed) == 2

    model = browser.find_element(By.CLASS_NAME, "model")
    said = model.find_element(By.CLASS_NAME, "said")
    model.find_elements(By.CSS_SELECTOR, ".words button")[5].click()
    assert said.text.startswith(f"{json.dumps(words[5])} (5): most to ")
    canvas = model.find_element(By.TAG_NAME, "canvas")
    ActionChains(browser).move_to_element_with_offset(
        canvas, -canvas.size["width"] // 2 + 3, canvas.size["height"] // 2 - 3
    ).perform()
    assert said.text.startswith(
        f"{json.dumps(words[-1], ensure_ascii=False)} ({n - 1}) to {json.dumps(words[0])} (0): "
    )
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()

    Select(browser.find_element(By.ID, "budget")).select_by_index(1)
    model.find_elements(By.CSS_SELECTOR, ".words button")[-1].click()
    assert len(model.find_elements(By.CSS_SELECTOR, ".words .gone")) == n - 8
    Select(browser.find_element(By.ID, "shown")).select_by_value("penalties")
    for option in range(4):
        Select(browser.find_element(By.ID, "figure")).select_by_index(option)
        seen()
    assert browser.save_screenshot(str(tmp_path / f"{width}.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []
