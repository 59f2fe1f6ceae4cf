"""What is measured and calibrated on: a user's files, books, or text that a checkpoint writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attnserve.errors import UserError
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from attnserve.sampled_text import Use
from quant.texts import (
    Sources,
    calibration_text,
    explained,
    measured_texts,
    set_files,
    text_for,
)
from tests.tiny import LICENSE, tiny_checkpoint

LENGTH = 40
HELD_OUT: tuple[Use, ...] = ("validation", "evaluation")


@pytest.fixture
def reader(softpick: Path) -> Checkpoint:
    return Checkpoint(softpick, longest=LENGTH)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a user's only text."""
    return Path(shutil.copy(LICENSE, tmp_path / "mine.txt"))


def test_books(reader: Checkpoint, data: Data) -> None:
    """The held-out books from their beginnings, or at even distances; training books otherwise."""
    sources = Sources(books=data.books)
    measured = measured_texts(sources, reader, 3)
    held_out = split(data.books)
    assert set(measured) == {"validation", "test"} and measured["test"].title == "test book"
    tokens = reader.encode(held_out.test.read_text())
    assert measured["test"].tokens == tokens[: 3 * LENGTH]
    chosen, spread = (text_for(use, sources, reader, 3, LENGTH - 1) for use in HELD_OUT)
    assert spread.sequences[0] == tokens[: LENGTH - 1]
    assert chosen.sequences[0] == reader.encode(held_out.validation.read_text())[: LENGTH - 1]
    rows = spread.rows
    assert rows.shape == (3, LENGTH) and (rows[:, 0] == reader.bos).all()

    calibration = calibration_text(sources, reader, 5, seed=0)
    assert calibration.rows.shape == (5, LENGTH)
    assert calibration == calibration_text(sources, reader, 5, seed=0)
    assert calibration != calibration_text(sources, reader, 5, seed=1)
    train = [file.read_text() for file in held_out.train]
    for piece in calibration.sequences:
        text = reader.tokenizer.decode(piece)
        assert any(text in book for book in train)


def test_one_file_is_enough(reader: Checkpoint, mine: Path) -> None:
    (name, text), *more = measured_texts(Sources(text=(mine,)), reader, 4).items()
    assert name == "test" and not more and text.title == "mine.txt"
    tokens = reader.encode(mine.read_text())
    starts = [tokens.index(piece[0]) for piece in text.sequences]
    assert len(text.sequences) == 4 and all(len(piece) == LENGTH for piece in text.sequences)
    assert text.sequences[0] == tokens[:LENGTH] and starts[0] == 0
    # Calibrated on, it is the user's too; what is measured on is sampled then.
    sources = Sources(calibration_text=(mine,))
    calibration = calibration_text(sources, reader, 4, seed=0)
    assert calibration.title == "mine.txt"
    whole = mine.read_text()
    assert all(reader.tokenizer.decode(piece) in whole for piece in calibration.sequences)
    assert measured_texts(sources, reader, 2)["test"].title == "text sampled from softpick"


def test_a_short_text_gives_different_pieces(reader: Checkpoint, tmp_path: Path) -> None:
    """One that is shorter than what a piece is looked for in."""
    file = tmp_path / "short.txt"
    file.write_text(LICENSE.read_text()[:600])
    pieces = calibration_text(Sources(calibration_text=(file,)), reader, 8, seed=0).sequences
    assert len({tuple(piece) for piece in pieces}) > 4


def test_several_files(reader: Checkpoint, mine: Path, tmp_path: Path) -> None:
    files = [mine]
    for name in ("b.txt", "c.txt", "d.txt"):
        files.append(Path(shutil.copy(mine, tmp_path / name)))
    assert measured_texts(Sources(text=tuple(files[:2])), reader, 2)["test"].title == (
        "mine.txt, b.txt"
    )
    text = measured_texts(Sources(text=tuple(files)), reader, 10**6)["test"]
    assert text.title == "mine.txt and 3 more"
    assert len(text.sequences) == 4 * (len(reader.encode(mine.read_text())) // LENGTH)


def test_sampled_texts_differ_by_use(softpick: Path, reader: Checkpoint) -> None:
    sources = Sources()
    measured = measured_texts(sources, reader, 3)["test"]
    calibration = calibration_text(sources, reader, 3, seed=0)
    chosen, again = (text_for(use, sources, reader, 3, LENGTH - 1) for use in HELD_OUT)
    beginnings = {tuple(t.sequences[0][:20]) for t in (measured, calibration, chosen)}
    assert len(beginnings) == 3
    assert [len(piece) for piece in measured.sequences] == [LENGTH] * 3
    assert calibration.rows.shape == (3, LENGTH)
    assert again.title == measured.title == "text sampled from softpick"


def test_two_checkpoints_read_the_same_tokens(softpick: Path, tmp_path: Path) -> None:
    """Of different lengths too: the shorter context is the beginning of the longer one."""
    other = tiny_checkpoint(tmp_path / "other", "softmax", max_position_embeddings=32)
    for writer in (softpick, other):
        sources = Sources(writer=writer)
        readers = [Checkpoint(folder, longest=LENGTH) for folder in (softpick, other)]
        texts = [measured_texts(sources, reader, 3)["test"] for reader in readers]
        assert {text.title for text in texts} == {f"text sampled from {writer.name}"}
        assert [piece[:32] for piece in texts[0].sequences] == [p[:32] for p in texts[1].sequences]


def test_too_short_a_text_is_one_line(reader: Checkpoint, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Reader, I married him.")
    with pytest.raises(
        UserError, match=r"^short\.txt has fewer than two sequences of 40 tokens: .*"
    ):
        measured_texts(Sources(text=(short,)), reader, 2)
    with pytest.raises(UserError, match=r"^short\.txt has fewer than 39 tokens to calibrate on"):
        calibration_text(Sources(calibration_text=(short,)), reader, 2, seed=0)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00z"])
def test_what_is_no_text_is_one_line(
    content: bytes | None, reader: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    for sources in (Sources(text=(file,)), Sources(calibration_text=(file,))):
        with pytest.raises(UserError, match=r"mine\.txt (is not there|is no UTF-8 text): .*name "):
            measured_texts(sources, reader, 2)
            calibration_text(sources, reader, 2, seed=0)


def test_sets(reader: Checkpoint, data: Data, tmp_path: Path) -> None:
    assert data.evaluation is not None
    sources = Sources(sets=data.evaluation)
    assert list(measured_texts(sources, reader, 2)) == ["test", "wikitext2"]
    assert len(set_files(data.evaluation)) == 4
    with pytest.raises(UserError, match="name its folder with --eval, or leave it out"):
        set_files(tmp_path)


def test_contradictions(mine: Path, data: Data) -> None:
    with pytest.raises(UserError, match="--books gives both texts"):
        Sources(text=(mine,), books=data.books)
    with pytest.raises(UserError, match="would be measured on after it was calibrated on"):
        Sources(text=(mine,), calibration_text=(mine.parent / "." / mine.name,))


def test_what_is_said_of_texts() -> None:
    said = explained("mine.txt", "text sampled from softmax")
    assert said == "Measured on: mine.txt. Calibrated on: text sampled from softmax."
    said = explained("text sampled from softmax", "mine.txt")
    assert "Perplexity on it is the entropy of softmax's own sampling" in said
    assert "KL divergence and agreement mean what they always do" in said
