"""The report's page: its answers, and how it looks in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from attnserve.evaluation.intervals import Estimate, mean_interval
from quant import store
from quant.config import UNQUANTIZED, QuantConfig
from quant.report.compare import Answers
from quant.report.figures import told_apart
from quant.report.write import write
from quant.store import SweepResult
from tests.quant.test_report import result

NOISE = (-1.0, 0.0, 1.0)


def rising(
    variant: str, config: QuantConfig, by: float, noise: float = 0.001, kl: float | None = None
) -> SweepResult:
    """Return a result whose losses rise by about `by`."""
    found = result(variant, config, [by + noise * each for each in NOISE])
    if config != UNQUANTIZED:
        found.summary["test KL"] = mean_interval([kl or by] * 3)
    return found


def weights(bits: int, scheme: str = "gptq") -> QuantConfig:
    return QuantConfig(weights=bits, scheme=scheme, group_size=64)


def test_the_scheme_with_the_least_divergence_is_taken() -> None:
    """By the validation text where there is one; a scheme of one checkpoint cannot win."""
    results = []
    for variant in ("softmax", "softpick"):
        results.append(rising(variant, UNQUANTIZED, 0, 0))
        for scheme, rise in (("rtn", 0.3), ("gptq", 0.1), ("hqq", 0.2)):
            results.append(rising(variant, weights(2, scheme), rise))
    results.append(rising("softmax", weights(2, "bnb-nf4"), 0.001))
    (choice,) = Answers.of(results).choices
    assert choice.setting == "gptq, groups of 64" and choice.second == "hqq, groups of 64"
    assert choice.margin == pytest.approx((0.1, 0.1, 0.1)) and len(choice.results) == 2
    for each in results:
        if each.config.weights:
            order = {"rtn": 0.1, "hqq": 0.2, "gptq": 0.3, "bnb-nf4": 0.0001}
            each.summary["validation KL"] = mean_interval([order[str(each.config.scheme)]] * 2)
    (choice,) = Answers.of(results).choices
    assert choice.setting == "rtn, groups of 64"
    assert choice.margin is not None and choice.margin.value == pytest.approx(-0.1)


def test_differences_are_paired_and_corrected() -> None:
    nothing, config = [0.0] * 3, weights(2)
    soft, pick, close = [0.10, 0.12, 0.11], [0.30, 0.33, 0.30], [0.13, 0.10, 0.11]
    results = []
    for variant, rise in (("softmax", soft), ("softpick", pick), ("ssmax", close)):
        results += [result(variant, UNQUANTIZED, nothing), result(variant, config, rise)]
    answers = Answers.of(results)
    found = {(each.first, each.second): each for each in answers.differences}
    assert list(found) == [("softpick", "softmax"), ("ssmax", "softmax"), ("ssmax", "softpick")]
    alone = [stats.ttest_rel(a, b).pvalue for a, b in ((pick, soft), (close, soft), (close, pick))]
    corrected = stats.false_discovery_control(alone)
    assert [each.chance for each in found.values()] == pytest.approx(list(corrected))
    exact = mean_interval(np.subtract(pick, soft))
    assert found["softpick", "softmax"].rise == pytest.approx(exact)
    assert answers.measures == ["loss"]
    header, (row,) = answers.verdicts("loss")
    assert header[2] == "more loss than softmax"
    assert row == ["the weights", "2", "softpick (+0.2000)", "none", "ssmax", "2 of 3"]

    results[2].key["texts"] = results[3].key["texts"] = "another text"
    pairs = [(each.first, each.second) for each in Answers.of(results).differences]
    assert pairs == [("ssmax", "softmax")]


SOFT, PICK = [0.10, 0.12, 0.11], [0.15, 0.16, 0.165]


def on_two_books(second: list[float]) -> list[SweepResult]:
    """Return results of two checkpoints, of which one loses more on the first book; `second` is
    what it loses more on the other."""
    results = []
    for variant, rise, more in (("softmax", SOFT, [0.0] * 3), ("softpick", PICK, second)):
        for config, change in ((UNQUANTIZED, [0.0] * 3), (weights(2), rise)):
            own = result(variant, config, change)
            other = np.add(own.units["perplexity"]["test"]["sequence_losses"], 1)
            if config != UNQUANTIZED:
                other += np.subtract(more, rise) + SOFT
                own.summary["validation KL"] = own.summary["test KL"]
            own.units["perplexity"]["validation"] = {"sequence_losses": other.tolist()}
            results.append(own)
    return results


def test_checkpoints_differ_on_every_book() -> None:
    """The larger p of the two books counts, and books that contradict each other show nothing."""
    first, same, opposite = [0.05, 0.04, 0.055], [0.06, 0.05, 0.05], [-0.02, -0.021, -0.019]
    assert np.subtract(PICK, SOFT) == pytest.approx(first)
    (found,) = Answers.of(on_two_books(same)).differences
    chances = [float(stats.ttest_1samp(own, 0).pvalue) for own in (first, same)]
    assert found.chance == pytest.approx(max(chances)) and found.significant
    assert found.rise == pytest.approx(mean_interval(first + same))
    (found,) = Answers.of(on_two_books(opposite)).differences
    assert found.rise.value > 0 and found.chance == 1 and not found.significant
    (found,) = Answers.of(on_two_books([0.3, -0.2, 0.1])).differences
    assert not found.significant

    header, (row,) = Answers.of(on_two_books(same)).texts
    assert header[2:] == ["test book", "validation book"]
    change = float(np.mean(np.add(SOFT, np.divide(same, 2))))
    assert row[3].startswith(f"{change:+.4f} [")


def test_checkpoints_are_compared_by_divergence_too() -> None:
    """Sequence by sequence, where it was kept; it can tell what the loss cannot."""
    results = on_two_books([0.3, -0.2, 0.1])
    kls = {"softmax": [0.010, 0.011, 0.012], "softpick": [0.014, 0.0152, 0.0161]}
    for each in results:
        if each.config != UNQUANTIZED:
            own = kls[each.checkpoint]
            each.units["divergence"] = {"test": own, "validation": [2 * kl for kl in own]}
    answers = Answers.of(results)
    assert answers.measures == ["loss", "KL divergence"]
    _, found = answers.differences
    exact = np.subtract(kls["softpick"], kls["softmax"])
    assert found.measure == "KL divergence" and found.significant
    assert found.rise == pytest.approx(mean_interval([*exact, *(2 * exact)]))
    assert found.chance == pytest.approx(float(stats.ttest_1samp(exact, 0).pvalue))
    header, (row,) = answers.verdicts("KL divergence")
    assert header[2] == "more KL divergence than softmax"
    assert row[2] == f"softpick ({found.rise.value:+.2g})" and row[-1] == "1 of 1"
    assert answers.verdicts("loss")[1][0][2:5] == ["none", "none", "softpick"]


def test_one_sentence_in_front() -> None:
    results = [rising("softpick", UNQUANTIZED, 0, 0)]
    assert Answers.of(results).headline == "Only unquantized models were measured so far."
    results += [rising("softpick", weights(4), 0.01), rising("softpick", weights(2), 0.2)]
    said = "Storing the weights in few bits raises the loss of "
    assert Answers.of(results).headline == (
        f"{said}softpick by 0.0100 at 4 bits and 0.2000 at 2 bits (nats a token; at 2 bits that is "
        "1.22 times the perplexity)."
    )
    few = [*results[:1], rising("softpick", weights(4), 0.01, noise=1.0)]
    assert "by 0.0100 at 4 bits" in Answers.of(few).headline
    assert Answers.of(few).headline.endswith("none of which these few texts show to be a rise.")
    results += [rising("softmax", UNQUANTIZED, 0, 0), rising("softmax", weights(4), 0.02)]
    results.append(rising("softmax", weights(2), 0.1))
    assert Answers.of(results).headline == (
        f"{said}any of 2 checkpoints by at most 0.0200 at 4 bits and 0.2000 at 2 bits (nats a "
        "token; at 2 bits that is 1.22 times the perplexity for softpick, 1.11 times for softmax)."
    )


def test_labels_are_short() -> None:
    settings = ["two-level", "gptq, groups of 64", "gptq, groups of 64, act-order", "rtn, x"]
    assert told_apart(settings) == ["two-level", "gptq", "gptq, act-order", "rtn"]
    same = ["rtn, groups of 32", "rtn, channel"]
    assert told_apart(same) == same


VARIANTS = ("softmax", "lssa", "lssar", "selective", "softpick", "ssmax")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of six checkpoints, three schemes and the cache, at 2 to 8 bits."""
    folder = tmp_path_factory.mktemp("sweep")
    for place, variant in enumerate(VARIANTS):
        # Of text that softpick attends to little of, some outliers are 10^9 times the median.
        found = [result(variant, UNQUANTIZED, [0.0] * 3, outliers=10.0 ** (1 + 2 * place))]
        size = {**found[0].size, "cache_bytes_per_token": 4096}
        for bits in (2, 3, 4, 8):
            rise = (1 + 0.1 * place) * 4.0**-bits
            for scheme, more in (("gptq", 1), ("rtn", 2)):
                found.append(rising(variant, weights(bits, scheme), more * rise, rise / 9))
            ordered = dataclasses.replace(weights(bits), act_order=True, search=True)
            found.append(rising(variant, ordered, 1.5 * rise, rise / 9))
            # Losses that fall, and lines that lie on each other.
            found.append(rising(variant, QuantConfig(kv=bits), -rise, rise, kl=4.0**-bits))
        for each in found:
            size["bytes"] = 1_000_000 + 420_000 * (each.config.weights or 16)
            each.size.update(size)
            if each.config != UNQUANTIZED:
                kl = each.summary["test KL"].value
                each.units["divergence"] = {"test": [kl, 1.1 * kl, 1.3 * kl]}
            store.write(store.path_of(folder, variant, each.config), each)
    # Measured for one checkpoint at one width: no panel of its own.
    nf4 = rising("softmax", weights(4, "bnb-nf4"), 0.01)
    store.write(store.path_of(folder, "softmax", nf4.config), nf4)
    return Path(write(folder)["html"])


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert "http" not in text and "<img" not in text and "src=" not in text
    assert len(text) < 2_000_000
    first, _ = text.split("<h2>", 1)
    assert "Storing the weights in few bits raises" in first and 'id="answer"' in first
    assert first.count('class="step') + first.count('class="none"') >= 2 * 6 * 4
    assert "at most 5 % false" in " ".join(text.split())
    assert "degradation" not in text and "data-tip" in text


LOOK = """
const box = (e) => e.getBoundingClientRect();
const seen = (e) => e.checkVisibility();
const views = [...document.querySelectorAll(".view")].filter(seen);
const overlaps = [], clipped = [], empty = [];
for (const view of views) {
  const texts = [...view.querySelectorAll("text")].filter((e) => e.textContent.trim());
  const around = box(view), name = view.ariaLabel;
  for (const [i, a] of texts.entries()) {
    const p = box(a);
    if (p.left < around.left - 1 || p.right > around.right + 1 || p.top < around.top - 8
        || p.bottom > around.bottom + 1) clipped.push([name, a.textContent]);
    for (const b of texts.slice(i + 1)) {
      const q = box(b);
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2
          && q.top < p.bottom - 2) overlaps.push([name, a.textContent, b.textContent]);
    }
  }
  if (view.querySelectorAll("[data-tip]").length < 4) empty.push(name);
  if (around.height < 150) empty.push(name);
}
return {
  overlaps, clipped, empty,
  views: views.length,
  texts: views.map((v) => [...v.querySelectorAll("text")].map((e) => e.textContent.trim())),
  smallest: Math.min(...[...document.querySelectorAll("svg text")].filter(seen)
    .map((e) => box(e).height)),
  width: document.documentElement.scrollWidth,
  cut: [...document.querySelectorAll(".wide")].filter(seen)
    .filter((e) => e.scrollWidth > e.clientWidth + 1)
    .map((e) => e.textContent.trim().slice(0, 40)),
};
"""
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgb = (c) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = c;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const back = (e) => {
  const colour = rgb(getComputedStyle(e).backgroundColor);
  return colour[3] === 0 ? back(e.parentElement) : colour;
};
return [...document.querySelectorAll("h1, h2, p, td, td small, .key span, figcaption, svg text")]
  .filter((e) => e.checkVisibility())
  .map((e) => {
    const style = getComputedStyle(e);
    const ink = rgb(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(back(e))].sort((x, y) => y - x);
    return [`${e.tagName} ${e.className.baseVal ?? e.className}`, (a + 0.05) / (b + 0.05)];
  });
"""


@pytest.fixture(params=[(800, "light"), (1280, "dark")], ids=["800 light", "1280 dark"])
def opened(request: pytest.FixtureRequest, browser: Chrome, page: Path) -> Iterator[Chrome]:
    """Open the page, at a width and in a color scheme; it may complain of nothing."""
    width, scheme = request.param
    feature = {"name": "prefers-color-scheme", "value": scheme}
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("browser")
    browser.get(page.as_uri())
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


def looks(browser: Chrome) -> dict[str, Any]:
    """Return what is seen of the figures' present views, none of which may be cut or overlap."""
    found: dict[str, Any] = browser.execute_script(LOOK)
    assert (found["overlaps"], found["clipped"], found["empty"], found["cut"]) == ([], [], [], [])
    return found


@pytest.mark.integration  # a browser
def test_nothing_is_empty_cut_or_covered(opened: Chrome, page: Path) -> None:
    """In any view of any figure; with a screenshot beside the page."""
    width = opened.execute_script("return innerWidth")
    found = looks(opened)
    assert found["views"] == 5 and found["width"] <= width
    assert found["smallest"] >= 10  # pixels
    for texts in found["texts"][:2]:  # variants by bits, in two panels
        assert all(texts.count(name) == 2 for name in VARIANTS)
        ticks = [text for text in texts if text.isdigit() and text not in "01"]
        assert sorted(ticks) == ["2", "2", "3", "3", "4", "4", "8", "8"]
    selects = [Select(e) for e in opened.find_elements(By.TAG_NAME, "select")]
    assert len(selects) == 3 and all(len(select.options) > 1 for select in selects)
    for number in range(1, max(len(select.options) for select in selects)):
        for select in selects:
            select.select_by_index(min(number, len(select.options) - 1))
        assert looks(opened)["views"] == 5
    assert [found for found in opened.execute_script(CONTRAST) if found[1] < 4.5] == []
    height = opened.execute_script("return document.documentElement.scrollHeight")
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    shot = page.with_name(f"{width}.png")
    assert opened.save_screenshot(str(shot)) and shot.stat().st_size > 100_000


@pytest.mark.integration  # a browser
def test_values_on_hover(opened: Chrome) -> None:
    """Under the pointer, and by keyboard; the other lines step back, and come again."""
    tip = opened.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    point = opened.find_element(By.CSS_SELECTOR, "[data-tip^='lssa: 2 bits (gptq']")
    ActionChains(opened).move_to_element(point).perform()
    assert tip.is_displayed() and tip.text.startswith("lssa: 2 bits (gptq, groups of 64), loss +0")
    ActionChains(opened).move_to_element(opened.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    opened.execute_script("document.querySelector(`[data-tip^='softpick: 3 bits']`).focus()")
    rise = 1.4 * 4.0**-3
    assert (
        tip.is_displayed()
        and f"softpick: 3 bits (gptq, groups of 64), loss +{rise:.4f}" in tip.text
    )
    assert "KL 0.021" in tip.text and tip.text.endswith("2.26 MB")
    faded = opened.find_elements(By.CSS_SELECTOR, ".faded")
    names = {str(e.get_attribute("data-of") or e.get_attribute("data-tip")) for e in faded}
    assert names and not any(name.startswith("softpick") for name in names)
    opened.execute_script("document.activeElement.blur()")
    assert not tip.is_displayed() and not opened.find_elements(By.CSS_SELECTOR, ".faded")


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    """They are in the tables, and have the color of the largest losses; no scheme wins by them."""
    ssmax = [rising("ssmax", config, 0.01) for config in (UNQUANTIZED, weights(2))]
    results = [rising("softmax", UNQUANTIZED, 0, 0), rising("softmax", weights(4), 0.01), *ssmax]
    lost = rising("softmax", weights(2), 1)
    for figure in ("test loss change", "test KL"):
        lost.summary[figure] = Estimate(math.nan, -math.inf, math.inf)
    lost.units["perplexity"]["test"]["sequence_losses"] = [math.nan] * 3
    rtn = [rising(variant, weights(2, "rtn"), 1) for variant in ("softmax", "ssmax")]
    answers = Answers.of([*results, lost, *rtn])
    assert [each.setting for each in answers.choices] == ["gptq, groups of 64", "rtn, groups of 64"]
    for folder, own in (("some", [*results, lost]), ("all", [results[0], lost])):
        for each in own:
            store.write(store.path_of(tmp_path / folder, each.checkpoint, each.config), each)
        text = Path(write(tmp_path / folder)["html"]).read_text()
        assert text.count('<td class="step3"') == 1 and "nan" in text
        assert ("no finite values" in text) == (folder == "all")


def test_a_checkpoints_name_is_never_html(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    for config in (UNQUANTIZED, weights(2)):
        fields = json.loads(json.dumps(vars(rising("softmax", config, 0.1))))
        store.write(
            tmp_path / f"configs/a/{config.name}.json",
            SweepResult(
                **fields
                | {
                    "checkpoint": evil,
                    "summary": rising("softmax", config, 0.1).summary,
                }
            ),
        )
    assert "<img" not in Path(write(tmp_path)["html"]).read_text()
