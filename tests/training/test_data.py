"""The tokenizer, and the order in which training sees its tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnserve.errors import UserError
from attnserve.evaluation.books import split
from attnserve.evaluation.texts import read_tokens
from tests.conftest import Commands
from training.data import Batches, fingerprint, sequence
from training.tokenizer import PARAGRAPHS, train_tokenizer
from training.tokenizer import tokenizer as command

TOKENS = np.arange(1, 1001)


def test_tokenizer_keeps_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    @settings(max_examples=50, deadline=None)
    @given(st.text())
    def round_trip(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text

    round_trip()


def test_tokenizer_learns_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 299
    assert tokenizer.tokenize(" the cat sat") == ["Ġthe", "Ġcat", "Ġsat"]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id}) == 2


def test_tokenizer_command_line_writes_what_auto_tokenizer_reads(
    books: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, commands: Commands
) -> None:
    data = (books / "first.txt", books / "second.txt")
    sizes = ("--vocab-size", "299", "--max-length", "16")
    commands.run(command, "--data", *data, "--out", tmp_path, *sizes)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.encode("the dog") == tokenizer.encode("the dog")
    assert loaded.model_max_length == 16
    assert loaded.chat_template == PARAGRAPHS
    short = loaded.encode("the")
    first, second = loaded(["the dog", "the"], padding=True)["input_ids"]
    assert second == [loaded.eos_token_id] * (len(first) - len(short)) + short


def test_tokenizer_needs_room_for_all_bytes(books: Path) -> None:
    with pytest.raises(ValueError, match="at least 258, not 200"):
        train_tokenizer([books / "first.txt"], 200)


def test_read_tokens_ends_each_file(books: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = [books / "first.txt", books / "second.txt"]
    tokens = read_tokens(files, tokenizer)
    assert np.count_nonzero(tokens == tokenizer.eos_token_id) == 2
    assert tokens[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text == "".join(file.read_text() for file in files)
    assert fingerprint(tokens) != fingerprint(tokens[:-1])


def test_sequence_predicts_every_token_from_those_before_it() -> None:
    inputs, targets = sequence(TOKENS, 10, 4, bos=0)
    assert inputs.tolist() == [0, 11, 12, 13]
    assert targets.tolist() == [11, 12, 13, 14]
    inputs, targets = sequence(TOKENS, 998, 4, bos=0)
    assert (inputs.tolist(), targets.tolist()) == ([0, 999], [999, 1000])


def test_an_epoch_sees_every_sequence_once_and_the_next_one_others() -> None:
    batches = Batches(TOKENS, context=10, batch=9, bos=0, seed=3)
    assert batches.sequences_per_epoch == 99
    epochs = []
    for epoch in range(2):
        steps = range(epoch * 11, (epoch + 1) * 11)
        targets = np.concatenate([batches(step)[1].numpy() for step in steps])
        assert (np.diff(targets, axis=1) == 1).all()
        starts = targets[:, 0]
        assert len(set(starts)) == 99
        assert len({start % 10 for start in starts}) == 1
        epochs.append(starts.tolist())
    assert epochs[0] != epochs[1]


def test_batches_depend_on_seed_and_step_only() -> None:
    def targets(seed: int, step: int) -> list[list[int]]:
        rows: list[list[int]] = Batches(TOKENS, 10, 4, 0, seed)(step)[1].tolist()
        return rows

    assert targets(1, 7) == targets(1, 7)
    assert targets(1, 7) != targets(2, 7)
    assert targets(1, 7) != targets(1, 8)


def test_text_must_hold_two_sequences() -> None:
    with pytest.raises(ValueError, match="19 tokens of text are too few for sequences of 10"):
        Batches(TOKENS[:19], 10, 1, 0, 0)


def test_split_names_what_is_missing(books: Path, tmp_path: Path) -> None:
    files = split(books)
    assert [file.name for file in files.train] == ["first.txt", "second.txt"]
    assert (files.validation.name, files.test.name) == ("emma.txt", "great_expectations.txt")
    with pytest.raises(UserError, match=r"emma\.txt is not there: fetch .*, or name .* --books"):
        split(tmp_path)
    for name in ("emma", "great_expectations"):
        (tmp_path / f"{name}.txt").touch()
    with pytest.raises(UserError, match="no book to train on"):
        split(tmp_path)
