"""The quality table: its budgets, and other libraries on this project's Hessians and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.scorers import load
from attnserve.evaluation.texts import Text
from benchmarks import calibrated_peers as peers
from benchmarks.quantization import (
    BUDGETS,
    OURS,
    Measurement,
    methods,
)
from quant.model import linears
from quant_kernels.weight import QuantSpec
from tests.tiny import tiny_checkpoint

WIDTH = 48  # of the feed-forward layers: no multiple of 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "softpick"
    return tiny_checkpoint(folder, "softpick", num_hidden_layers=2, intermediate_size=WIDTH)


@pytest.fixture(scope="module")
def of_one(folder: Path) -> Measurement:
    generator = torch.manual_seed(0)
    one, two, three = (
        Text("numbers", 1, torch.randint(2, 256, (2, 40), generator=generator).tolist())
        for _ in range(3)
    )
    return Measurement(Checkpoint(folder, longest=40), one, two, three, iterations=2)


def test_a_row_of_each_kind(of_one: Measurement) -> None:
    """Budgets are kept, more of one costs less, and all are spent on one measurement of layers."""
    found = methods(of_one, None)
    assert len(found) >= len(OURS) + len(BUDGETS)
    rows = {}
    for budget in (2.5, 4):
        rows[budget] = of_one.row(*found[f"two-level, --bits-per-weight {budget}"]())
        assert 0.9 * budget < float(rows[budget]["bits_per_weight"]) <= budget
    assert 0 < float(rows[4]["kl"]) < 0.5 * float(rows[2.5]["kl"])
    plain = of_one.row(*found["rtn, 4 bits, groups of 64"]())
    assert plain["bits_per_weight"] == round(of_one.bits_of_groups(QuantSpec(4, 64)), 3)
    assert float(plain["kl_low"]) <= float(plain["kl"]) <= float(plain["kl_high"])


@torch.inference_mode()
def test_zeros_at_the_end_change_nothing(folder: Path) -> None:
    model, ids = load(folder), torch.arange(2, 40)[None]
    before, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    peers.widen(model, 64)
    assert all(layer.mlp.down_proj.weight.shape[1] == 64 for layer in model.model.layers)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    peers.widen(model, WIDTH)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_auto_round_where_it_is_installed(of_one: Measurement, folder: Path) -> None:
    """It leaves whole layers, with no more values in a group than there can be. (GPTQModel cannot
    be imported in Triton's interpreter, which the tests run in.)"""
    pytest.importorskip("auto_round")
    _, model = methods(of_one, None)["auto-round, 2 bits, groups of 64, 2 iterations"]()
    before = linears(load(folder))
    for place, layer in linears(model).items():
        assert layer.weight.shape == before[place].weight.shape
        assert not torch.equal(layer.weight, before[place].weight)
        assert all(len(row[:64].unique()) <= 4 for row in layer.weight.data), place
