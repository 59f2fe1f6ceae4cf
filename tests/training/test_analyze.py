"""The measures of `training.analyze`, against hand-made cases and naive computations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from attn_kernels import variant_names
from attnserve.evaluation import tiled
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import (
    Estimate,
    mean_interval,
    mean_share_interval,
    share_interval,
)
from attnserve.evaluation.measures import Data
from attnserve.evaluation.perplexity import Perplexity, evaluate
from attnserve.evaluation.scorers import Item, TransformersScorer, load
from attnserve.evaluation.tasks import Blimp, Lambada
from attnserve.evaluation.texts import held_out
from tests.fla import fla_checkpoint
from tests.tiny import tiny_checkpoint, write_tiny_llama
from tests.training.texts import Copier, write_lines, write_texts
from training.analyze.attention import Attention, summarise
from training.analyze.length import BINS, Length
from training.analyze.passkey import Passkey, make_pair

CONTEXT = 224


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Small texts."""
    return Data(*write_texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a random softpick model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "softpick"
    return Checkpoint(tiny_checkpoint(folder, "softpick", max_position_embeddings=CONTEXT))


def test_intervals() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
    assert mean_interval([5.0]) == (5.0, -math.inf, math.inf)
    cut = mean_interval([0.0, 0.0, 0.3]).within(0.0, 1.0)
    assert cut == pytest.approx((0.1, 0.0, 0.53), abs=1e-3)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert mean_share_interval([(5, 10), (10, 10)]).value == 0.75
    narrow, wide = (mean_share_interval([(n, n)] * 2) for n in (1000, 10))
    assert narrow.low > wide.low and narrow.high == wide.high == 1.0
    assert Estimate(0.5, 0.25, 1.0).shown(1, 100) == "50.0 [25.0, 100.0]"


def test_intervals_as_json() -> None:
    unknown = mean_interval([5.0]).exp()
    assert unknown == pytest.approx((math.exp(5), 0.0, math.inf))
    assert json.loads(json.dumps(unknown.json(), allow_nan=False))[1:] == [0.0, None]
    assert Estimate.from_json(mean_interval([5.0]).json()) == (5.0, -math.inf, math.inf)


@pytest.mark.parametrize("name", [*variant_names(), "window", "pruned", "llama", "fla"])
def test_scores_are_the_models_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles, batches and padding change nothing."""
    monkeypatch.setattr(tiled, "TILE_SCORES", 997)
    if name == "llama":
        folder = write_tiny_llama(tmp_path)
    elif name == "window":
        folder = tiny_checkpoint(tmp_path, "selective", sliding_window=9)
    elif name == "pruned":
        folder = tiny_checkpoint(tmp_path, {"name": "selective", "kv_budgets": [8, 4, 12]})
    elif name == "fla":
        fields = {"attn_impl": "parallel_scaled_softpick_attn", "qk_norm": True}
        folder = fla_checkpoint(tmp_path, **fields)
    else:
        folder = tiny_checkpoint(tmp_path, name)
    rng = np.random.default_rng(0)
    lengths = [(1, 60), (40, 3), (2, 1), (200, 25), (7, 7)]
    items = [Item(*(rng.integers(2, 400, n).tolist() for n in pair)) for pair in lengths]
    scores = TransformersScorer(folder, quiet=True).score(items, "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for item, scored in zip(items, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([item.tokens]), use_cache=False).logits[0]
        given = logits[len(item.prompt) - 1 : -1].log_softmax(-1)
        own = given[range(len(item.continuation)), item.continuation]
        np.testing.assert_allclose(scored.logprobs, own.numpy(), atol=2e-4)
        assert (
            scored.greedy.tolist()
            == (given.argmax(-1).tolist() == np.array(item.continuation)).tolist()
        )


def test_tiles_refuse_a_cache(checkpoint: Checkpoint) -> None:
    model = TransformersScorer(checkpoint.folder, quiet=True).model
    with pytest.raises(ValueError, match="use_cache=False"):
        model(torch.tensor([[1, 2, 3]]), use_cache=True)


def test_rope_theta_factor_changes_far_tokens_most(checkpoint: Checkpoint) -> None:
    assert load(checkpoint.folder, 50.0).config.rope_parameters["rope_theta"] == 500_000
    item = Item([1], list(range(2, 150)))
    plain, stretched = (
        TransformersScorer(checkpoint.folder, factor, quiet=True).score([item], "")[0].logprobs
        for factor in (1.0, 50.0)
    )
    assert plain[0] == pytest.approx(stretched[0], abs=1e-4)
    assert np.abs(plain - stretched)[1:].max() > 0.01


def test_keys_outside_a_window_are_no_zeros(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "TILE_SCORES", 997)
    fields = {"sliding_window": 16, "num_hidden_layers": 1, "hidden_size": 64}
    windowed = Checkpoint(tiny_checkpoint(tmp_path, "softmax", **fields), 64)
    assert Attention(sequences=2).run(windowed, data, Copier()).summary["zeros"].value == 0


def test_attention_figures_are_those_of_the_maps(checkpoint: Checkpoint, data: Data) -> None:
    measure = Attention(sequences=2)
    result = measure.run(checkpoint, data, Copier())
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    text = checkpoint.encode(split(data.books).test.read_text())
    places = (0, len(text) // CONTEXT - 1)
    seen = np.tri(CONTEXT, dtype=bool)
    first, zero, kurtosis = [], [], []
    for place in places:
        ids = [checkpoint.bos, *text[place * CONTEXT : (place + 1) * CONTEXT - 1]]
        with torch.no_grad():
            out = model(
                torch.tensor([ids]),
                use_cache=False,
                output_attentions=True,
                output_hidden_states=True,
            )
        maps = torch.stack(out.attentions)[:, 0].numpy()  # [layers, heads, n, n]
        first.append(maps[..., 0].mean(-1))
        zero.append((maps == 0)[..., seen].mean())
        # The last of these comes after the final norm.
        states = [x.double().numpy() for x in out.hidden_states[:-1]]
        kurtosis.append([((x - x.mean()) ** 4).mean() / x.var() ** 2 for x in states])
    summary, units = result.summary, result.units
    for eps in (0.2, 0.3):
        assert summary[f"sink rate at {eps}"].value == np.mean(np.array(first) > eps)
    np.testing.assert_allclose(units["head_first_column"], np.mean(first, 0), atol=2e-5)
    assert summary["zeros"].value == pytest.approx(np.mean(zero)) and np.mean(zero) > 0.1
    np.testing.assert_allclose(units["layer_kurtosis"][:-1], np.mean(kurtosis, 0), rtol=1e-3)


def test_summary_of_sinks_and_dead_heads() -> None:
    ones = np.ones((2, 1, 4))
    figures = {
        "first_column": np.array([[[0.25, 0.25, 0.1, 0.9]], [[0.35, 0.35, 0.1, 0.9]]]),
        "zeros": 0.5 * ones,
        "quiet": np.array([[[1.0, 1.0, 0.0, 0.5]], [[0.99, 0.5, 0.0, 1.0]]]),
        "silent": 0 * ones,
        "kurtosis": np.array([[3.0, 5.0], [3.0, 7.0]]),
        "largest": np.array([[1.0, 9.0], [2.0, 9.0]]),
        "median": np.array([[1.0, 1.0], [1.0, 3.0]]),
    }
    result = summarise(figures)
    value = {name: estimate.value for name, estimate in result.summary.items()}
    assert value["sink rate at 0.2"] == 0.75
    assert value["sink rate at 0.3"] == 0.5  # one head of the first sequence, three of the second
    assert (value["kurtosis"], value["kurtosis, largest of the layers"]) == (4.5, 6.0)
    assert (value["largest |x|"], value["largest over median |x|"]) == (9.0, 6.0)
    assert (result.units["dead_heads"], result.units["heads"]) == (1, 4)


def test_length_bins_windows_and_pieces(checkpoint: Checkpoint, data: Data) -> None:
    scorer = TransformersScorer(checkpoint.folder, quiet=True)
    measure = Length(windows=2, multiple=4)
    result = measure.run(checkpoint, data, scorer)
    text = checkpoint.encode(split(data.books).test.read_text())
    length = 4 * CONTEXT
    starts = [0, (len(text) // length - 1) * length]
    items = [Item([checkpoint.bos], text[start : start + length]) for start in starts]
    losses = np.array([-scored.logprobs for scored in scorer.score(items, "")])
    bins = losses.reshape(2, 4 * BINS, CONTEXT // BINS).mean(-1)
    windows, pieces = (np.array(result.units[name]) for name in ("windows", "pieces"))
    np.testing.assert_allclose(windows, bins, atol=1e-4)
    # A window begins as its first piece does, and only so.
    np.testing.assert_allclose(pieces[:, :BINS], windows[:, :BINS], atol=1e-4)
    assert np.abs(pieces - windows)[:, BINS:].max() > 1e-3
    assert result.summary["loss of windows of 2x"].value == pytest.approx(
        losses[:, : 2 * CONTEXT].mean(), abs=1e-4
    )
    assert result.summary["rise of windows of 4x over pieces"].value == pytest.approx(
        (windows - pieces).mean(), abs=1e-4
    )


def test_too_short_a_book_is_one_line(checkpoint: Checkpoint, data: Data) -> None:
    with pytest.raises(ValueError, match="too few for two windows of 3584: lower --max-length"):
        Length(multiple=16).run(checkpoint, data, Copier())


def test_passkey_prompts(checkpoint: Checkpoint) -> None:
    pairs = [make_pair(checkpoint, 400, np.random.default_rng([0, i])) for i in range(8)]
    again = [make_pair(checkpoint, 400, np.random.default_rng([0, i])) for i in range(8)]
    assert pairs == again and len({tuple(right.prompt) for right, _ in pairs}) == 8
    depths = set()
    for pair in pairs:
        right, wrong = (checkpoint.tokenizer.decode(item.prompt) for item in pair)
        key = checkpoint.tokenizer.decode(pair[0].continuation).strip()
        assert len(key) == 5 and key.isdigit()
        assert right.count(key) == 2 and key not in wrong
        digits = "".join(c for c in wrong if c.isdigit())
        assert right.replace(key, digits[:5]) == wrong
        assert right.endswith("What is the pass key? The pass key is")
        assert 300 < len(pair[0].tokens) <= 400
        assert pair[0].continuation == pair[1].continuation
        depths.add(right.index(key))
    assert len(depths) > 1
    with pytest.raises(ValueError, match="64 tokens have no room"):
        make_pair(checkpoint, 64, np.random.default_rng(0))


def test_passkey_tells_who_sees_the_key(checkpoint: Checkpoint, data: Data) -> None:
    measure = Passkey(pairs=8, multiple=8)
    seeing, blind = (measure.run(checkpoint, data, Copier(reach)).summary for reach in (None, 8))
    for m in (1, 2, 4, 8):
        assert seeing[f"gain at {m}x"].low > 0.5
        assert abs(blind[f"gain at {m}x"].value) < 1e-9
    assert blind["accuracy at 8x"] == share_interval(0, 4)


def test_lambada_counts_whole_words(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The copier knows a word that came before, and only such."""
    texts = ["a b a b a b a b", "alpha beta gamma delta epsilon zeta"]
    write_lines(tmp_path / "lambada_test.jsonl", [{"text": text} for text in texts])
    result = Lambada().run(checkpoint, Data(evaluation=tmp_path), Copier())
    assert result.units["hits"] == [1, 0]
    assert result.summary["accuracy"].value == 0.5
    losses = result.units["losses"]
    assert losses[0] < losses[1]
    assert result.summary["perplexity per word"].value == pytest.approx(
        math.exp(np.mean(losses)), rel=1e-4
    )


def test_blimp_compares_sentences(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "blimp").mkdir()
    repeats, differs = "a cat a cat a cat a cat", "a cat on two old red mats by night"
    for name, good, bad in (("up", repeats, differs), ("down", differs, repeats)):
        rows = [{"sentence_good": good, "sentence_bad": bad}] * 3
        write_lines(tmp_path / "blimp" / f"{name}.jsonl", rows)
    result = Blimp(pairs=2).run(checkpoint, Data(evaluation=tmp_path), Copier())
    assert result.units["correct"] == {"down": [0, 0], "up": [1, 1]}
    assert result.summary["mean"].value == 0.5


def test_perplexity_is_that_of_evaluate(checkpoint: Checkpoint, data: Data) -> None:
    scorer = TransformersScorer(checkpoint.folder, quiet=True)
    summary = Perplexity().run(checkpoint, data, scorer).summary
    for score in evaluate(checkpoint, held_out(checkpoint, split(data.books)), quiet=True):
        for unit in ("token", "word", "byte"):
            expected = getattr(score, f"per_{unit}")
            assert summary[f"{score.text} per {unit}"].value == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_knows_itself(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert (checkpoint.name, checkpoint.variant, checkpoint.context) == (
        "softpick",
        "softpick",
        CONTEXT,
    )
    other = Checkpoint(tiny_checkpoint(tmp_path / "other", {"name": "softpick", "eps": 0.5}), 64)
    assert other.context == 64 and other.digest != checkpoint.digest
    config = json.loads((other.folder / "config.json").read_text())
    (other.folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    changed = Checkpoint(other.folder).digest
    assert changed != other.digest
    (other.folder / "pytorch_model.bin").write_bytes(b"other weights")
    assert Checkpoint(other.folder).digest != changed
