"""`python -m training.analyze` as a user runs it: what is written, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnserve.evaluation.tasks import Blimp
from tests.tiny import tiny_checkpoint
from tests.training.texts import write_texts
from training.analyze import __main__ as command
from training.analyze.attention import Attention
from training.analyze.store import read

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def softpick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a short context."""
    folder = tmp_path_factory.mktemp("command") / "softpick"
    return tiny_checkpoint(folder, "softpick", max_position_embeddings=224)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name small texts."""
    books, evaluation = write_texts(tmp_path_factory.mktemp("texts"))
    return [f"--books={books}", f"--eval={evaluation}"]


def last_line(capsys: Capture) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The JSON object that ends the output."""
    found: dict[str, dict[str, dict[str, list[float]]]]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def refusal(capsys: Capture, *argv: str) -> str:
    """The one line of a call that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_every_measure_is_written_once(
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--quick"]
    command.main(argv)
    figures = last_line(capsys)["figures"]["softpick"]
    files = sorted(path.name for path in (tmp_path / "softpick").iterdir())
    assert files == sorted(f"{name}.json" for name in command.MEASURES)
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
        patch.setattr(command, "scorer_for", None)  # a call would fail
        command.main(argv)
    again = last_line(capsys)["figures"]["softpick"]
    assert {name: pytest.approx(values, rel=1e-5) for name, values in figures.items()} == again
    (tmp_path / "softpick" / "blimp.json").unlink()
    command.main([*argv, "--measures", "blimp", "attention"])
    command.main([*argv, "--measures", "attention", "--force"])
    changed = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"blimp", "attention"}


def test_a_result_of_something_else_is_not_replaced(
    softpick: Path, texts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--measures", "blimp", "--limit"]
    command.main([*argv, "2"])
    file = tmp_path / "softpick" / "blimp.json"
    content = file.read_text()
    line = refusal(capsys, *argv, "3")
    assert line.endswith(
        f"{file} holds a result with another settings: --force measures again and replaces it, "
        "--out DIR writes elsewhere"
    )
    other = tiny_checkpoint(tmp_path / "other" / "softpick", "ssmax", max_position_embeddings=224)
    assert "another checkpoint:" in refusal(capsys, str(other), *argv[1:], "2")
    assert file.read_text() == content
    command.main([str(other), *argv[1:], "2", "--force"])
    assert read(file).variant == "ssmax"
    file.write_text("{}")
    assert f"{file} is not a result of training.analyze" in refusal(capsys, *argv, "2")


def test_theta_goes_to_files_of_its_own(
    softpick: Path, texts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--quick", "--rope-theta-factor=50"]
    command.main(argv)
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
        ({"--limit": "0"}, "'0' is not a whole number above 0"),
        ({"--measures": "sinks"}, "invalid choice: 'sinks'"),
    ],
)
def test_what_cannot_be_is_one_line(
    change: dict[str, str],
    message: str,
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    options = dict(option.split("=", 1) for option in texts)
    options |= {"--out": str(tmp_path), "--limit": "1", "--max-length": "224"}
    options |= {"--measures": "passkey"} if "64" in change.values() else {}
    options |= {"--measures": "length"} if "90" in change.values() else {}
    options |= {"--measures": "lambada"} if "--eval" in change else {}
    options |= {name: value for name, value in change.items() if name.startswith("-")}
    argv = [change.get("checkpoint", str(softpick))]
    argv += [part for pair in options.items() for part in pair]
    assert message in refusal(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("measure", command.MEASURES)
def test_what_a_measure_needs(
    measure: str,
    softpick: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the novels and the evaluation sets: measured, or one line that says how to get
    them."""
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    argv = [str(softpick), f"--out={tmp_path}", "--limit=1", "--max-length=224"]
    argv.append(f"--measures={measure}")
    if measure == "passkey":
        command.main(argv)
    elif measure in ("lambada", "blimp"):
        assert "name the folder of the evaluation sets (lambada_test.jsonl, blimp/*.jsonl," in (
            refusal(capsys, *argv)
        )
        line = refusal(capsys, *argv, "--eval=nowhere")
        assert "nowhere" in line and line.endswith(("with --eval", "with --eval or --books"))
    else:
        line = refusal(capsys, *argv)
        assert "emma.txt is not there: fetch the thirteen novels with `attnserve books" in line


def test_two_checkpoints_of_one_name(softpick: Path, texts: list[str], capsys: Capture) -> None:
    line = refusal(capsys, str(softpick), str(softpick), *texts)
    assert "two checkpoints are called softpick" in line


def test_vllm_is_not_asked_for_maps() -> None:
    options = command.parser().parse_args(["x", "--engine=vllm", "--limit=7"])
    chosen = command.measures(options, 512)
    assert Attention() not in chosen and Blimp(pairs=7) in chosen and len(chosen) == 5
