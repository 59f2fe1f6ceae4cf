"""`python -m training.analyze` as a user runs it: what is written, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnserve.evaluation.tasks import Blimp
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint
from tests.training.texts import write_texts
from training.analyze import run
from training.analyze.__main__ import analyze
from training.analyze.attention import Attention
from training.analyze.settings import AnalysisSettings, Name
from training.analyze.store import read


@pytest.fixture(scope="module")
def softpick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model of a short context."""
    folder = tmp_path_factory.mktemp("command") / "softpick"
    return tiny_checkpoint(folder, "softpick", max_position_embeddings=224)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options that name small texts."""
    books, evaluation = write_texts(tmp_path_factory.mktemp("texts"))
    return [f"--books={books}", f"--eval={evaluation}"]


def test_every_measure_is_written_once(
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--quick"]
    figures = json.loads(commands.run(analyze, *argv, "--json"))["figures"]["softpick"]
    files = sorted(path.name for path in (tmp_path / "softpick").iterdir())
    assert files == sorted(f"{name}.json" for name in run.MEASURES)
    length = read(tmp_path / "softpick" / "length.json")
    assert (length.variant, length.context, length.engine) == ("softpick", 224, "transformers")
    assert length.key["settings"] == {"windows": 4, "multiple": 2}
    assert list(length.key["texts"]) == ["great_expectations.txt"]
    assert "torch" in length.machine and length.seconds >= 0
    name, estimate = next(iter(length.result.summary.items()))
    assert figures[f"length: {name}"] == pytest.approx(list(estimate), rel=1e-5)

    # What is there is not measured again, unless asked for.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    with monkeypatch.context() as patch:
        patch.setattr(run, "scorer_for", None)  # a call would fail
        again = json.loads(commands.run(analyze, *argv, "--json"))["figures"]["softpick"]
    assert {name: pytest.approx(values, rel=1e-5) for name, values in figures.items()} == again
    (tmp_path / "softpick" / "blimp.json").unlink()
    commands.run(analyze, *argv, "--measures", "blimp", "attention")
    commands.run(analyze, *argv, "--measures", "attention", "--force")
    changed = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"blimp", "attention"}


def test_a_result_of_something_else_is_not_replaced(
    softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--measures", "blimp", "--limit"]
    commands.run(analyze, *argv, "2")
    file = tmp_path / "softpick" / "blimp.json"
    content = file.read_text()
    line = commands.refused(analyze, *argv, "3")
    assert line.endswith(
        f"{file} holds a result with another settings: --force measures again and replaces it, "
        "--out DIR writes elsewhere"
    )
    other = tiny_checkpoint(tmp_path / "other" / "softpick", "ssmax", max_position_embeddings=224)
    assert "another checkpoint:" in commands.refused(analyze, str(other), *argv[1:], "2")
    assert file.read_text() == content
    commands.run(analyze, str(other), *argv[1:], "2", "--force")
    assert read(file).variant == "ssmax"
    file.write_text("{}")
    assert f"{file} is not a result of training.analyze" in commands.refused(analyze, *argv, "2")


def test_theta_goes_to_files_of_its_own(
    softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--quick", "--rope-theta-factor=50"]
    commands.run(analyze, *argv)
    files = sorted(path.name for path in (tmp_path / "softpick").iterdir())
    assert files == ["length.theta50.json", "passkey.theta50.json"]
    assert read(tmp_path / "softpick" / files[0]).rope_theta_factor == 50.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere has no config.json: name a checkpoint's folder"),
        ({"--eval": "nowhere"}, "lambada_test.jsonl is not there: name its folder with --eval"),
        ({"--books": "nowhere"}, "emma.txt is not there: fetch the thirteen novels"),
        ({"--max-length": "100"}, "training length of 224 tokens is above --max-length 100"),
        ({"--context": "90"}, "must be a multiple of 4: give --context"),
        ({"--context": "64"}, "64 tokens have no room for the passkey test"),
        ({"--limit": "0"}, "greater than or equal to 1"),
        ({"--measures": "sinks"}, "'sinks' is not one of 'attention', 'length'"),
    ],
)
def test_what_cannot_be_is_one_line(
    change: dict[str, str],
    message: str,
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    commands: Commands,
) -> None:
    options = dict(option.split("=", 1) for option in texts)
    options |= {"--out": str(tmp_path), "--limit": "1", "--max-length": "224"}
    options |= {"--measures": "passkey"} if "64" in change.values() else {}
    options |= {"--measures": "length"} if "90" in change.values() else {}
    options |= {"--measures": "lambada"} if "--eval" in change else {}
    options |= {name: value for name, value in change.items() if name.startswith("-")}
    argv = [change.get("checkpoint", str(softpick))]
    argv += [part for pair in options.items() for part in pair]
    assert message in commands.refused(analyze, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("measure", run.MEASURES)
def test_what_a_measure_needs(
    measure: str,
    softpick: Path,
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the novels and the evaluation sets: measured, or one line that says how to get
    them."""
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    argv = [str(softpick), f"--out={tmp_path}", "--limit=1", "--max-length=224"]
    argv.append(f"--measures={measure}")
    if measure == "passkey":
        commands.run(analyze, *argv)
    elif measure in ("lambada", "blimp"):
        assert "name the folder of the evaluation sets (lambada_test.jsonl, blimp/*.jsonl," in (
            commands.refused(analyze, *argv)
        )
        line = commands.refused(analyze, *argv, "--eval=nowhere")
        assert "nowhere" in line and line.endswith(("with --eval", "with --eval or --books"))
    else:
        line = commands.refused(analyze, *argv)
        assert "emma.txt is not there: fetch the thirteen novels with `attnserve books" in line


def test_two_checkpoints_of_one_name(softpick: Path, texts: list[str], commands: Commands) -> None:
    line = commands.refused(analyze, str(softpick), str(softpick), *texts)
    assert "two checkpoints are called softpick" in line


def test_vllm_is_not_asked_for_maps() -> None:
    chosen = run.measures(AnalysisSettings(engine="vllm", limit=7), list(Name), 512)
    assert Attention() not in chosen and Blimp(pairs=7) in chosen and len(chosen) == 5
