"""docs/RESULTS.md from contrived results: the verdicts follow the figures, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attn_kernels import variant_names
from attnserve.budgets.model import Budgets
from attnserve.budgets.result import Found, Row
from attnserve.budgets.search import Target
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.measures import Result
from attnserve.reports import Range, Verdict
from quant.config import QuantConfig
from quant.store import path_of
from quant.store import write as write_result
from tests.conftest import Commands
from tests.quant.test_report import result
from training.analyze import store
from training.analyze.length import BINS, multiples
from training.report.__main__ import report
from training.report.claims import PAPERS
from training.report.document import document
from training.report.evidence import Evidence, Missing, load
from training.report.figures import Condition, decide, less_memory, widened

MULTIPLE = 16
FEW_BITS = [
    QuantConfig(weights=bits, scheme=scheme, group_size=64)
    for scheme in ("hqq", "gptq")
    for bits in (2, 3)
]


@dataclass
class World:
    """A contrived outcome: what each variant's results shall be, before the noise of the texts."""

    loss: dict[str, float] = field(default_factory=dict)
    """At the training length, above softmax's, nats per token."""
    slope: dict[str, float] = field(default_factory=dict)
    """What each doubling of the context costs at its end, nats per token."""
    sinks: dict[str, float] = field(default_factory=dict)
    kurtosis: dict[str, float] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    """Of the planted key, at every length but for softmax, whose is 0 beyond 1x."""
    far_gain: dict[str, float] = field(default_factory=dict)
    """Of the key beyond 1x, where that is another."""
    hits: dict[str, float] = field(default_factory=dict)
    rise: dict[str, float] = field(default_factory=dict)
    """Of the loss with the weights in few bits, nats per token."""
    noise: float = 0.001
    """Of each sequence."""
    steps: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def write(self, folder: Path) -> None:
        """All files that the report reads, under `folder`."""
        for name in variant_names():
            for factor in (1.0, 50.0):
                self._write(folder, name, "length", self.length(name), factor)
                self._write(folder, name, "passkey", self.passkey(name), factor)
            self._write(folder, name, "perplexity", self.perplexity(name))
            self._write(folder, name, "attention", self.attention(name))
            self._write(folder, name, "lambada", self.lambada(name))
            curve = folder / "checkpoints" / name / "loss.csv"
            curve.parent.mkdir(parents=True)
            count = self.steps.get(name, 200)
            loss = 5 - np.arange(count) / 200 + self.loss.get(name, 0.0) + self._noise(count)
            rates = np.full(count, 1e-3)
            frame = pd.DataFrame({"step": np.arange(count), "learning_rate": rates, "loss": loss})
            frame.to_csv(curve, index=False)
        rates = pd.DataFrame(
            {
                "variant": ["softmax", "softmax", "ssmax", "ssmax"],
                "learning_rate": [1e-3, 2e-3] * 2,
                "steps": 120,
                "validation_loss": [5.0, 4.5, 4.4, 4.6],
                "standard_error": 0.02,
            }
        )
        rates.to_csv(folder / "results" / "learning_rate.csv", index=False)
        for length in (512, 1024, 2048):
            self.pruning(length).write(folder / "results" / "budgets")
        self.sweep(folder / "sweep")
        self.swapped().to_csv(folder / "results" / "long_context.csv", index=False)

    def sweep(self, folder: Path) -> None:
        """Write softmax and softpick unquantized and in few bits, twenty sequences each."""
        for name in ("softmax", "softpick"):
            before = 4 + self._noise(20)
            for config in (QuantConfig(), *FEW_BITS):
                rise = self.rise.get(name, 1.0) + self._noise(20) if config.weights else 0 * before
                swept = result(name, config, rise, before=before)
                write_result(path_of(folder, name, config), swept)

    def swapped(self) -> pd.DataFrame:
        """SSMax loses 0.25 nats less in the second half of two windows of 4,096 tokens."""
        names = ("model", "rope_theta", "train_length", "finetuning", "dtype", "text")
        rows = [
            dict(zip(names, (model, 10000.0, 2048, tuned, "float32", "a"), strict=True))
            | {"start": start, "seen_from": a, "seen_to": b, "loss": loss + start / 1e5}
            for model, tuned, last in (
                ("smollm2-softmax", "", 5.0),
                ("smollm2-ssmax", "steps=40", 4.75),
            )
            for start in (0, 4096)
            for a, b, loss in ((1, 2048, 3.0), (2049, 4096, last))
        ]
        return pd.DataFrame(rows)

    def pruning(self, length: int = 512) -> Found:
        """Return a path to 16 tokens a layer, which costs 0.02 nats; softmax allows 0.05 more than
        selective's loss."""
        allowance = mean_interval(0.05 - self.loss.get("selective", 0.0) + self._noise(20))
        trained = "" if length == 512 else f"-{length}"
        about: dict[str, Any] = {
            "checkpoint": f"selective{trained}",
            "reference": f"softmax{trained}",
            "length": length,
            "search": "greedy",
        }
        sequences = {"search": 2, "judged": 20, "test": 2}
        target = Target("softmax", 4.05, [16] * 4, 4.02, True)
        rises = {length: 0.0, 32: 0.01, 16: 0.02}
        path: list[tuple[Budgets, float]] = [((b,) * 4, rise) for b, rise in rises.items()]
        losses = Estimate(4.0, 3.9, 4.1), Estimate(0.1, 0.0, 0.2)
        rows = [
            Row("softmax", "none", "unpruned", [length] * 4, 1.0, 1000, *losses),
            Row("selective", "selective", "softmax", [16] * 4, length / 16, 1000, *losses),
        ]
        return Found(about | {"sequences": sequences}, losses[0], allowance, [target], path, rows)

    def _noise(self, *shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self.rng.normal(0, self.noise, shape)

    def _write(
        self, folder: Path, name: str, measure: str, result: Result, factor: float = 1.0
    ) -> None:
        key = {"checkpoint": name, "context": 512, "settings": {"multiple": MULTIPLE}, "texts": {}}
        about = (name, name, 512, measure, "transformers", factor, key, "a machine", 60.0)
        store.write(folder / "results" / "analysis", store.Stored(*about, result=result))

    def length(self, name: str) -> Result:
        """Six windows."""
        base = 4 + self.loss.get(name, 0.0)
        octave = np.log2(np.maximum(1, np.arange(MULTIPLE * BINS) / BINS))
        windows = base + self.slope.get(name, 2.0) * octave + self._noise(6, MULTIPLE * BINS)
        pieces = np.full((6, MULTIPLE * BINS), base) + self._noise(6, 1)
        summary = {
            f"loss of windows of {m}x": mean_interval(windows[:, : m * BINS].mean(1))
            for m in multiples(MULTIPLE)
        }
        return Result(summary, {"windows": windows.tolist(), "pieces": pieces.tolist()})

    def passkey(self, name: str) -> Result:
        """Eight pairs a length."""
        summary, units = {}, {}
        for m in multiples(MULTIPLE):
            mean = self.gain.get(name, 0.5 if m == 1 else 0.0)
            gain = (mean if m == 1 else self.far_gain.get(name, mean)) + self._noise(8)
            summary[f"gain at {m}x"] = mean_interval(gain)
            summary[f"accuracy at {m}x"] = Estimate(0.0, 0.0, 0.3)
            units[str(m)] = {"gain": gain.tolist()}
        return Result(summary, units)

    def perplexity(self, name: str) -> Result:
        """Twenty sequences."""
        losses = 4 + self.loss.get(name, 0.0) + self._noise(20)
        summary = {"test per token": mean_interval(losses).exp()}
        return Result(summary, {"test": {"sequence_losses": losses.tolist()}})

    def attention(self, name: str) -> Result:
        """Twenty sequences."""
        sinks = mean_interval(self.sinks.get(name, 0.5) + self._noise(20))
        kurtosis = self.kurtosis.get(name, 100.0) * np.exp(self._noise(20))
        summary = {
            "sink rate at 0.2": sinks,
            "sink rate at 0.3": sinks,
            "kurtosis": mean_interval(kurtosis),
            "zeros": mean_interval(self.zeros.get(name, 0.0) + self._noise(20)),
        }
        units = {"sequence_kurtosis": kurtosis.tolist(), "dead_heads": 0, "heads": 16}
        return Result(summary, units)

    def lambada(self, name: str) -> Result:
        """Return the result of a thousand passages."""
        hits = (np.arange(1000) < 1000 * self.hits.get(name, 0.3)).astype(int)
        return Result({"accuracy": mean_interval(hits)}, {"hits": hits.tolist()})


def as_the_papers_say(**changes: Any) -> World:
    """Every claim that is tested holds."""
    fields: dict[str, Any] = {
        "loss": {"ssmax": -0.1},
        "slope": {"ssmax": 0.01, "lssar": 0.01, "lssa": 1.5},
        "sinks": {"softpick": 0.0},
        "kurtosis": {"softpick": 4.0},
        "zeros": {"softpick": 0.99},
        "gain": {"ssmax": 3.0, "lssar": 3.0},
        "rise": {"softpick": 0.1},
    }
    return World(**fields | changes)


def read(folder: Path) -> Evidence:
    """Return a world's evidence."""
    return load(folder / "results", folder / "checkpoints", folder / "sweep")


@pytest.fixture
def verdicts(tmp_path: Path) -> Callable[[World], dict[str, Verdict]]:
    """Return a function that judges a world's claims: `{"LSSA: equal loss at 1x": ...}`."""

    def judged(world: World) -> dict[str, Verdict]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        world.write(folder)
        evidence = read(folder)
        return {
            f"{paper.title.split()[0].strip(',')}: {claim.text}": claim.judge(
                evidence, paper.variant
            ).verdict
            for paper in PAPERS
            for claim in paper.claims
        }

    return judged


Judge = Callable[[World], dict[str, Verdict]]


def test_a_world_as_the_papers_say(verdicts: Judge) -> None:
    found = verdicts(as_the_papers_say())
    assert len(found) > 20 and set(found.values()) == {Verdict.AGREES}


def test_the_opposite_world(verdicts: Judge) -> None:
    found = verdicts(
        World(
            loss={name: 0.3 for name in variant_names() if name != "softmax"},
            slope={"ssmax": 3.0, "lssar": 3.0, "lssa": 3.0},
            sinks={"softpick": 0.5},
            kurtosis={"softpick": 100.0},
            zeros={"softpick": 0.5},
            gain={"ssmax": 0.2, "lssar": 0.2, "softmax": 3.0},
            rise={"softpick": 2.0},
            hits={"softpick": 0.1},
        )
    )
    assert set(found.values()) == {Verdict.DISAGREES}, found


def test_noise_decides_nothing(verdicts: Judge) -> None:
    found = verdicts(as_the_papers_say(noise=3.0))
    assert Verdict.DISAGREES not in found.values()
    assert found["Softpick: equal loss"] is Verdict.UNDECIDED
    assert found["LSSAR: loss stays flat at 16x, where softmax fails"] is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("changes", "undecided"),
    [
        (
            {"sinks": {}, "kurtosis": {"softmax": 3.0, "softpick": 3.0}},
            {"Softpick: kurtosis", "Softpick: 2 bits", "Softpick: 3 bits"},
        ),
        ({"sinks": {"softmax": 0.0, "softpick": 0.0}}, {"Softpick: no attention sinks"}),
        ({"hits": {"softmax": 0.001, "softpick": 0.001}}, {"Softpick: equal LAMBADA"}),
        (
            {"slope": {"softmax": 0.0, "ssmax": 0.0, "lssa": 0.0, "lssar": 0.0}},
            {"Scalable: loss stays low", "LSSA: lower loss", "LSSAR: lower loss", "LSSAR: loss st"},
        ),
        ({"gain": {"ssmax": 0.0, "lssar": 0.0}}, {"Scalable: retrieves", "LSSAR: retrieves"}),
        ({"loss": {"ssmax": -0.01}}, {"Scalable: lower training"}),
    ],
)
def test_without_an_effect_in_the_control_nothing_is_shown(
    changes: dict[str, Any], undecided: set[str], verdicts: Judge
) -> None:
    found = verdicts(as_the_papers_say(**changes))
    chosen = {name: verdict for name, verdict in found.items() if name.startswith(tuple(undecided))}
    assert len(chosen) >= len(undecided)
    assert set(chosen.values()) == {Verdict.UNDECIDED}, chosen
    others = {name for name in found if name not in chosen and not name.startswith("Softpick: no")}
    assert {found[name] for name in others} == {Verdict.AGREES}


def test_a_key_that_harms_less_than_softmaxs_is_not_retrieved(verdicts: Judge) -> None:
    far = {"softmax": -1.0, "ssmax": 0.05, "lssar": 0.05}
    found = verdicts(as_the_papers_say(far_gain=far))
    denied = {name for name, verdict in found.items() if verdict is Verdict.DISAGREES}
    assert denied == {name for name in found if "retrieves" in name and "at 1x" not in name}


def test_memory_at_softmaxs_loss(tmp_path: Path) -> None:
    """The figure is where the allowed rise is on the path, its interval that of the allowance."""
    world = as_the_papers_say(loss={"selective": 0.035})
    world.write(tmp_path)
    finding = less_memory(read(tmp_path), "selective", 512, low=16.0)
    assert finding.ours.endswith("times less memory at softmax's validation loss: 16.0 [1.0, 32.0]")
    assert finding.verdict is Verdict.UNDECIDED
    at_1024 = less_memory(read(tmp_path), "selective", 1024, low=16.0)
    assert at_1024.ours.endswith("validation loss: 32.0 [1.0, 64.0]")
    mixed = Evidence({}, {}, None, {"selective-512": world.pruning()}, None)
    with pytest.raises(Missing):  # it is another checkpoint's, whose file has such a name
        less_memory(mixed, "selective-512", 512, low=16.0)
    with pytest.raises(Missing, match="of selective at 4096 tokens"):
        less_memory(read(tmp_path), "selective", 4096, low=16.0)


def test_swapping(tmp_path: Path) -> None:
    World().write(tmp_path)
    evidence = read(tmp_path)
    text = document(evidence, [], "")
    assert "on 2 windows" in text
    assert "| smollm2-softmax | 10000 | no | 3.020 | 5.020 |" in text
    assert "| smollm2-ssmax | 10000 | steps=40 | 3.020 (+0.000) | 4.770 (-0.250) |" in text
    without = dataclasses.replace(evidence, long_context=None)
    assert "No results of `python -m training.long_context`" in document(without, [], "")


def test_runs_of_other_lengths_are_not_compared(verdicts: Judge) -> None:
    found = verdicts(as_the_papers_say(steps={"ssmax": 150}))
    assert found["Scalable: lower training loss"] is Verdict.MISSING


def test_rule() -> None:
    at_least_two = Range(low=2.0)
    assert at_least_two.judge(Estimate(3, 2, 4)) is Verdict.AGREES
    assert at_least_two.judge(Estimate(1, 0.5, 1.9)) is Verdict.DISAGREES
    assert at_least_two.judge(Estimate(3, 1.9, 4)) is Verdict.UNDECIDED
    assert [str(r) for r in (at_least_two, Range(high=1), Range(0, 1))] == [
        "at least 2",
        "at most 1",
        "0 to 1",
    ]
    assert widened(Estimate(0.1, 0.0, 0.2)) == pytest.approx((0.1, -0.02, 0.22))
    condition = Condition("control", Estimate(1, 1, 1), at_least_two)
    finding = decide("it", Estimate(3, 2, 4), at_least_two, condition, 1)
    assert finding.verdict is Verdict.UNDECIDED
    assert finding.ours == "it: 3.0 [2.0, 4.0]; control: 1.0 [1.0, 1.0]"
    assert finding.rule == "at least 2; control at least 2, else it cannot be shown"


def run(commands: Commands, folder: Path, out: Path) -> dict[str, Any]:
    """Run the command on a world's files; return its JSON."""
    printed: dict[str, Any] = json.loads(
        commands.run(
            report,
            f"--results={folder / 'results'}",
            f"--checkpoints={folder / 'checkpoints'}",
            f"--quantization={folder / 'quantization'}",
            f"--out={out / 'RESULTS.md'}",
            f"--figures={out / 'results'}",
            "--json",
        )
    )
    return printed


def test_the_same_results_give_the_same_files(tmp_path: Path, commands: Commands) -> None:
    as_the_papers_say().write(tmp_path / "world")
    for out in ("first", "second"):
        last = run(commands, tmp_path / "world", tmp_path / out)
    assert last["figures"] == ["training", "length", "attention", "passkey", "pruning"]
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    text = (tmp_path / "first" / "RESULTS.md").read_text()
    for name in last["figures"]:
        assert f"](results/{name}.png)" in text
    assert text.count(f"**{Verdict.AGREES}**") == 1 + sum(
        verdict == Verdict.AGREES
        for paper in last["verdicts"].values()
        for verdict in paper.values()
    )
    assert "| ssmax | 4.400 | 4.600 | 0.001 |" in text
    assert "| softmax | 4.0500 | 16, 16, 16, 16 | 32.0 |" in text
    assert "| selective | selective | softmax | 16.0 | 32.0 | 54.60 [49.40, 60.34] |" in text
    assert "Not there" not in text


def test_budgets_without_a_reference(tmp_path: Path, commands: Commands) -> None:
    """They are shown, and decide nothing that a paper says."""
    world = as_the_papers_say()
    world.write(tmp_path / "world")
    found = world.pruning()
    own = [dataclasses.replace(row, model="selective", over_reference=None) for row in found.rows]
    about = found.about | {"reference": None}
    alone = dataclasses.replace(found, about=about, allowance=None, rows=own)
    alone.write(tmp_path / "world" / "results" / "budgets")
    run(commands, tmp_path / "world", tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "no result of attnserve budgets of selective at 512 tokens" in text
    section = text[text.index("`attnserve budgets` on selective, 512 tokens") :]
    section = section[: section.index("## ")]
    assert "has 4.0000 [3.9000, 4.1000] nats per token. The smallest" in section
    assert "| selective | selective | softmax | 16.0 | 32.0 | 54.60 [49.40, 60.34] |\n" in section
    assert not re.search("None|nats over|StreamingLLM", section)


def test_what_is_missing_is_named(tmp_path: Path, commands: Commands) -> None:
    world = tmp_path / "world"
    as_the_papers_say().write(world)
    for name in ("lssa", "selective"):
        for path in (world / "results" / "analysis" / name, world / "checkpoints" / name):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    for file in (world / "results" / "analysis" / "ssmax").iterdir():
        file.unlink()
    (world / "results" / "budgets" / "selective.json").unlink()
    (world / "results" / "learning_rate.csv").unlink()
    verdicts = run(commands, world, tmp_path)["verdicts"]
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Not there: lssa, selective. Trained but not analyzed: ssmax." in text
    assert "no result length of lssa" in text and "No table of learning rates" in text
    assert "no result of attnserve budgets of selective at 512 tokens" in text
    assert set(verdicts["LSSA (arXiv 2501.13428)"].values()) == {Verdict.MISSING}
    assert Verdict.AGREES in verdicts["LSSAR, p = 15 (arXiv 2501.13428)"].values()


def test_nothing_at_all(tmp_path: Path, commands: Commands) -> None:
    run(commands, tmp_path, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Not measured: `python -m quant.sweep" in text
    assert f"Checkpoints: none. Not there: {', '.join(variant_names())}." in text
    assert not list((tmp_path / "results").iterdir())


def test_results_of_other_texts_are_not_compared(tmp_path: Path) -> None:
    as_the_papers_say().write(tmp_path)
    path = tmp_path / "results" / "analysis" / "softpick" / "lambada.json"
    path.write_text(path.read_text().replace('"texts": {}', '"texts": {"a.txt": "1"}'))
    evidence = read(tmp_path)
    assert isinstance(evidence, Evidence)
    with pytest.raises(Missing, match="lambada of softpick and softmax differ in their texts"):
        evidence.pair("softpick", "softmax", "lambada")


def test_a_broken_result_is_one_line(tmp_path: Path, commands: Commands) -> None:
    path = tmp_path / "results" / "analysis" / "softpick" / "length.json"
    path.parent.mkdir(parents=True)
    path.write_text("[1]")
    options = ("--results", tmp_path / "results", "--out", tmp_path / "r.md")
    line = commands.refused(report, *options, "--figures", tmp_path)
    assert f"{path} is not a result of training.analyze" in line
