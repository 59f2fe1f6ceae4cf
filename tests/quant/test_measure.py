"""One config measured, for every variant: what is measured is what training.analyze measures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_kernels import variant_names
from attn_kernels.kv_quant import KV_FORMATS
from attnserve.errors import UserError
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from attnserve.evaluation.perplexity import Perplexity
from attnserve.evaluation.scorers import TransformersScorer, load
from attnserve.evaluation.tasks import Blimp, Lambada
from quant import store
from quant.activations import cache_bytes
from quant.config import FP8, SERVED, QuantConfig, Samples, SearchSpace
from quant.measure import SweepTask, changes, measure
from quant.model import linears, put, quantize, stored_bytes
from quant.outliers import figures
from quant.schemes.registry import get_scheme
from quant.scorer import KLComparison, Recorder, WatchedScorer
from quant.store import SweepResult
from quant.texts import Sources, sweep_texts
from quant_kernels.weight import QuantSpec
from tests.tiny import tiny_checkpoint

SAMPLES = Samples(sequences=2, length=48, pairs=2, passages=3, calibration=2)


MEASURES = [Perplexity(SAMPLES.sequences), Blimp(SAMPLES.pairs), Lambada(SAMPLES.passages)]


def measured(folder: Path, config: QuantConfig, data: Data, out: Path) -> SweepResult:
    reader = Checkpoint(folder, longest=SAMPLES.length)
    texts = sweep_texts(Sources(books=data.books, sets=data.evaluation), reader, SAMPLES)
    task = SweepTask(folder, reader.digest, config, SAMPLES, texts, out)
    result = measure(task)
    store.write(task.path, result)
    return result


@pytest.mark.parametrize("variant", variant_names())
def test_every_variant(variant: str, data: Data, tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path / variant, variant, max_position_embeddings=64, num_hidden_layers=2
    )
    exact = measured(folder, QuantConfig(), data, tmp_path)
    assert exact.variant == variant and exact.size["quantized_bytes"] == 0
    # The same measures through training.analyze's own scorer.
    checkpoint = Checkpoint(folder, longest=SAMPLES.length)
    scorer = TransformersScorer(folder, quiet=True)
    for one in MEASURES:
        for name, estimate in one.run(checkpoint, data, scorer).summary.items():
            found = exact.summary[f"{one.name}: {name}"]
            assert found.value == pytest.approx(estimate.value, rel=1e-4)
    divergences = {}
    for config in (
        QuantConfig(weights=8, scheme="rtn", group_size=32),
        QuantConfig(weights=2, scheme="rtn", group_size=32),
        QuantConfig(weights=8, scheme="gptq", activations=8),
        QuantConfig(activations=4, static=True),
        QuantConfig(kv=8, kv_format="int8_per_token_head"),
        QuantConfig(kv=8, kv_format=FP8),
        QuantConfig(kv=2),
    ):
        result = measured(folder, config, data, tmp_path)
        value = result.summary["test KL"].value
        divergences[config.name] = value
        assert value > 0 and 0 <= result.summary["test top-1"].value <= 1
        spread = result.details["KL over tokens"]["test"]
        assert 0 <= spread["median"] <= spread["99 %"] <= spread["99.9 %"] <= spread["largest"]
        change = result.summary["test loss change"].value
        losses = (result, exact)
        after, before = (r.summary["perplexity: test loss"].value for r in losses)
        assert change == pytest.approx(after - before, abs=1e-4)
    assert divergences["weights-rtn-w8-g32"] < 0.1 * divergences["weights-rtn-w2-g32"]
    assert divergences["kv-kv8"] < 0.1 * divergences["kv-kv2"], divergences
    assert divergences["kv-kvfp8"] < 0.1 * divergences["kv-kv2"], divergences


@torch.inference_mode()
def test_divergence_is_that_of_the_definition(softpick: Path, data: Data, tmp_path: Path) -> None:
    checkpoint, perplexity = Checkpoint(softpick, longest=48), MEASURES[0]
    model = load(softpick)
    record = Recorder(tmp_path / "record")
    perplexity.run(checkpoint, data, WatchedScorer(model, record))
    record.finish()
    itself = KLComparison(tmp_path / "record")
    perplexity.run(checkpoint, data, WatchedScorer(model, itself))
    for text in ("validation", "test", "wikitext2"):
        assert 0 <= itself.finish()[0][f"{text} KL"].value < 1e-5
        assert itself.finish()[0][f"{text} top-1"].value == 1
        assert itself.finish()[0][f"{text} p change, RMS"].value < 1e-4

    other = load(softpick)
    quantize(other, get_scheme("rtn"), QuantSpec(2), torch.empty(0))
    found = KLComparison(tmp_path / "record")
    perplexity.run(checkpoint, data, WatchedScorer(other, found))
    tokens = checkpoint.encode(split(data.books).test.read_text())[:96]
    each, changes = [], []
    for piece in (tokens[:48], tokens[48:]):
        ids = torch.tensor([[checkpoint.bos, *piece[:-1]]])
        p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (model, other))
        each.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        right = torch.tensor(piece)[:, None]
        changes.append((q.gather(1, right).exp() - p.gather(1, right).exp())[:, 0])
        same = (p.argmax(-1) == q.argmax(-1)).double().mean()
        assert found.agreement["test"][len(each) - 1] == pytest.approx(float(same))
    for index, exact in enumerate(each):
        assert found.divergence["test"][index] == pytest.approx(exact.numpy(), rel=0.02, abs=1e-4)
        change = changes[index].numpy()
        assert found.change["test"][index] == pytest.approx(change, rel=0.02, abs=1e-5)
    everything = torch.cat(changes).numpy()
    spread = found.finish()[1]["p change over tokens"]["test"]
    assert spread["median"] == pytest.approx(np.median(everything), abs=1e-5)
    assert spread["1 %"] <= spread["5 %"] <= spread["95 %"] <= spread["99 %"]
    rms = found.finish()[0]["test p change, RMS"].value
    assert rms == pytest.approx(np.sqrt((everything**2).mean()), rel=0.01)


def test_changes_are_in_pairs() -> None:
    def units(losses: list[float], correct: list[int]) -> dict[str, Any]:
        return {
            "perplexity": {
                text: {"sequence_losses": losses} for text in ("validation", "test", "wikitext2")
            },
            "lambada": {"hits": correct, "losses": losses},
            "blimp": {"correct": {"one": correct, "two": correct}},
        }

    before, after = units([1.0, 5.0, 9.0], [1, 0, 0]), units([1.1, 5.1, 9.1], [1, 0, 1])
    found = changes(after, before)
    # All changes are the same, so nothing is uncertain, far as the losses lie apart.
    assert found["test loss change"] == pytest.approx((0.1, 0.1, 0.1))
    assert found["lambada accuracy change"].value == pytest.approx(1 / 3)
    mean, low, high = found["blimp change"]
    error = math.sqrt(2 * np.var([0, 0, 1], ddof=1) / 3) / 2
    assert (mean, high - low) == pytest.approx((1 / 3, 2 * 1.959964 * error))


def test_sizes(softpick: Path) -> None:
    model = load(softpick)
    total = sum(p.numel() for p in model.parameters())
    assert stored_bytes(model, {}, 2) == 2 * total
    found = quantize(model, get_scheme("rtn"), QuantSpec(4, None, True), torch.empty(0))
    numbers = sum(weight.values.numel() for weight in found.values())
    scales = sum(len(weight.values) for weight in found.values())
    assert stored_bytes(model, found, 2) == 2 * (total - numbers) + numbers // 2 + 2 * scales
    assert {weight.packed_bytes for weight in found.values()} >= {128 * 128 // 2 + 2 * 128}


def test_cache_bytes(softpick: Path) -> None:
    config = load(softpick).config  # 2 layers, 2 KV heads of 32
    for quantized, vector in (
        (QuantConfig(), 32 * 2),
        (QuantConfig(kv=4, symmetric=True), 16 + 2),
        (QuantConfig(kv=3), 12 + 2 + 1),
        (QuantConfig(kv=8, kv_format="int8_per_token_head"), 32 + 4),
        (QuantConfig(kv=4, kv_format="int4_per_token_head"), 16 + 4),
        (QuantConfig(kv=8, kv_format=FP8), 32),
    ):
        assert cache_bytes(config, quantized, 2) == 2 * 2 * 2 * vector


def test_results_older_than_a_field_stay_valid() -> None:
    """Committed results name no `kv_format`; those of served formats must not be taken for them."""
    older: dict[str, Any] = {
        "weights": None, "activations": None, "kv": 3, "scheme": None, "group_size": None,
        "symmetric": False, "act_order": False, "lm_head": False, "static": False,
    }  # fmt: skip
    assert QuantConfig(kv=3).key == older and QuantConfig(**older) == QuantConfig(kv=3)
    assert {kind.bits: name for name, kind in KV_FORMATS.items()} == SERVED
    for bits, kv_format in SERVED.items():
        config = QuantConfig(kv=bits, kv_format=kv_format)
        assert config.name == f"kv-kv{bits}" and config.key == older | {
            "kv": bits, "kv_format": kv_format
        }  # fmt: skip
        assert QuantConfig(**config.key) == config


def test_a_tied_head_gets_a_matrix_of_its_own(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tied", "softmax", tie_word_embeddings=True)
    model = load(folder)
    embeddings = model.model.embed_tokens.weight.clone()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    total = sum(p.numel() for p in model.parameters())
    head = get_scheme("rtn")(model.lm_head.weight.data, QuantSpec(4))
    put(linears(model, lm_head=True)["lm_head"], head)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert torch.equal(model.lm_head.weight, head.dequantize())
    assert stored_bytes(model, {"lm_head": head}, 4) == 4 * total + head.packed_bytes


def test_outlier_figures() -> None:
    kurtosis, ratio = figures(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert (kurtosis, ratio) == pytest.approx((1.0, 1.0))
    kurtosis, _ = figures(torch.randn(200_000, generator=torch.manual_seed(0)))
    assert kurtosis == pytest.approx(3, abs=0.1)
    assert figures(torch.tensor([1.0, -2.0, 10.0, 1.0]))[1] == pytest.approx(10)


def test_configs() -> None:
    def made(**changes: Any) -> list[QuantConfig]:
        options: dict[str, Any] = {"targets": ["weights"], "schemes": ["rtn"], "bits": [4]}
        return SearchSpace(**options | {"kv_bits": 6} | changes).configs()

    assert made() == [QuantConfig(weights=4, scheme="rtn", group_size=64)]
    everything = made(
        targets=["weights", "weights+activations", "kv", "activations", "weights+kv", "kv-fp8"],
        schemes=["rtn", "hqq", "gptq"],
        bits=[2, 3, 4, 8],
        group_sizes=[64, None],
        act_order=True,
    )
    assert len(everything) == 3 * 4 * 3 * 2 + 4 + 4 + 1
    names = [config.name for config in everything]
    assert len(set(names)) == len(names)
    for name in (
        "weights-gptq-w3-gchannel-actorder-search",
        "weights+activations-rtn-w2-g64-a8",
        "weights+kv-hqq-w8-g64-kv6",
        "kv-kv3",
        "kv-kvfp8",
        "activations-a2",
    ):
        assert name in names
    for config in everything:
        assert config.bits in (2, 3, 4, 8)
        assert sorted(config.target.split("+")) == sorted(set(config.target.split("+")))
    for change, message in (
        ({"schemes": ["awq"]}, "unknown scheme 'awq'"),
        ({"targets": ["weights+cache"]}, "unknown target 'weights\\+cache'"),
        ({"targets": ["kv+kv"]}, "unknown target"),
    ):
        with pytest.raises(UserError, match=message):
            made(**change)
