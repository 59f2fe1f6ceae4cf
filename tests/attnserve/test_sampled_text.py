"""Text that a checkpoint writes: its own distribution, the same each time, kept whole or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from attn_kernels import variant_names
from attnserve.sampled_text import sampled_text, writers
from tests.tiny import tiny_checkpoint, tiny_tokenizer, write_tiny_llama


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which texts are kept, empty for each test."""
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sampled-text"


def made(folder: Path, variant: str) -> Path:
    return tiny_checkpoint(folder, variant, num_hidden_layers=2)


@pytest.mark.parametrize("variant", variant_names())
@torch.inference_mode()
def test_sampled_from_the_models_own_distribution(variant: str, tmp_path: Path) -> None:
    """The mean loss on the text is the mean entropy of the predictions, up to chance: it is not
    where likely tokens are preferred, or where a cached token is seen at another place."""
    folder = made(tmp_path / variant, variant)
    text = sampled_text(folder, "evaluation", 40, 33)
    assert text.shape == (40, 33) and text.dtype == torch.int64
    assert (text[:, 0] == 0).all() and (text[:, 1:] >= 0).all()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs = model(input_ids=text[:, :-1]).logits.log_softmax(-1)
    losses = -logprobs.gather(-1, text[:, 1:, None])[..., 0]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    surprise = (losses - entropies).flatten()
    assert abs(surprise.mean()) < 4 * surprise.std() / len(surprise) ** 0.5
    assert entropies.mean() < 0.97 * np.log(model.config.vocab_size)  # else anything would do


def test_the_same_each_time_and_another_for_each_use_and_seed(tmp_path: Path, cache: Path) -> None:
    folder = made(tmp_path / "one", "softpick")
    text = sampled_text(folder, "evaluation", 3, 20)
    shutil.rmtree(cache)
    assert torch.equal(sampled_text(folder, "evaluation", 3, 20), text)
    assert torch.equal(
        sampled_text(shutil.copytree(folder, tmp_path / "two"), "evaluation", 3, 20), text
    )
    others = [
        sampled_text(folder, "calibration", 3, 20),
        sampled_text(folder, "validation", 3, 20),
        sampled_text(folder, "evaluation", 3, 20, seed=1),
    ]
    for place, other in enumerate(others):
        assert all(not torch.equal(other, known) for known in (text, *others[:place]))
    assert len(list(cache.iterdir())) == 4


def test_kept_texts_are_read_and_broken_ones_made_anew(tmp_path: Path, cache: Path) -> None:
    folder = made(tmp_path / "checkpoint", "softmax")
    text = sampled_text(folder, "evaluation", 3, 20)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    np.savez(file, tokens=text.numpy() + 1)  # shows that the file is read
    assert torch.equal(sampled_text(folder, "evaluation", 3, 20), text + 1)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (b"", whole[:-40], whole[:100], bytes(flipped), b"{}"):
        file.write_bytes(broken)
        assert torch.equal(sampled_text(folder, "evaluation", 3, 20), text)
        assert file.read_bytes() == whole
    np.savez(file, tokens=text.numpy()[:, :5])
    assert torch.equal(sampled_text(folder, "evaluation", 3, 20), text)
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_another_checkpoint_is_another_text(tmp_path: Path) -> None:
    softmax, softpick = (made(tmp_path / name, name) for name in ("softmax", "softpick"))
    texts = [sampled_text(folder, "evaluation", 3, 20) for folder in (softmax, softpick)]
    assert not torch.equal(*texts)


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "checkpoint", "softmax")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "file"))
    assert sampled_text(folder, "evaluation", 2, 5).shape == (2, 5)
    assert "the cache cannot be written" in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json: name a checkpoint's folder"):
        sampled_text(tmp_path, "evaluation", 2, 5)


def test_one_checkpoint_of_a_tokenizer_writes_for_all(tmp_path: Path) -> None:
    lssa, softmax, ssmax = (made(tmp_path / name, name) for name in ("lssa", "softmax", "ssmax"))
    other = write_tiny_llama(tmp_path / "other")  # softmax, a larger tokenizer
    assert writers([lssa, ssmax]) == {lssa: lssa, ssmax: lssa}
    assert writers([lssa, softmax, ssmax]) == dict.fromkeys((lssa, softmax, ssmax), softmax)
    assert writers([lssa, other, ssmax]) == {lssa: lssa, other: other, ssmax: lssa}
    assert writers([lssa, softmax], chosen=ssmax) == dict.fromkeys((lssa, softmax), ssmax)
    with pytest.raises(ValueError, match="which has another tokenizer"):
        writers([lssa, other], chosen=ssmax)


def test_a_tokenizer_without_a_first_token(tmp_path: Path) -> None:
    folder = made(tmp_path / "checkpoint", "softmax")
    tokenizer = tiny_tokenizer(512)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has no begin-of-text token: set its bos_token"):
        sampled_text(folder, "evaluation", 2, 5)
