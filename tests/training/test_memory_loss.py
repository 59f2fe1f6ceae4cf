"""The loss term for context pruning: its value and gradient, and what training with it does."""

import csv
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attn_kernels import get_variant
from attnserve.evaluation.texts import Tokens, read_tokens
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM
from hf_attn.modeling import VariantLlamaAttention
from tests.conftest import Commands
from tests.training.conftest import TINY
from training.resumable import loss_function, memory_share
from training.run import LOSSES, Run
from training.train import train

SELECTIVE = {"name": "selective"}
MEMORY = dataclasses.replace(TINY, memory_loss=0.1)


@pytest.fixture(scope="module")
def tokens(books: Path, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    return read_tokens([books / "first.txt", books / "second.txt"], tokenizer)


def naive_share(scores: list[Tensor]) -> Tensor:
    """Return the term, computed token by token.

    Args:
        scores: head 0's raw scores of each layer, `[num_tokens, num_tokens]`, of one sequence.
    """
    total = torch.zeros((), dtype=torch.float64)
    n = len(scores[0])
    for x in scores:
        masked = [torch.zeros((), dtype=torch.float64) for _ in range(n)]
        worst = torch.tensor(-math.inf, dtype=torch.float64)
        for i in range(n):
            needed = torch.tensor(float(i + 1), dtype=torch.float64)
            for k in range(i):
                needed = needed - torch.clamp(masked[k], max=1.0)
            worst = torch.maximum(worst, needed)
            for k in range(1, i):
                masked[k] = masked[k] + torch.relu(x[i, k])
        total = total + worst
    return total / (len(scores) * n)


def test_value_and_gradient() -> None:
    """Against the naive calculation in float64, for two sequences and three layers."""
    torch.manual_seed(0)
    layers, batch, n, size = 3, 2, 11, 4
    q = torch.randn(layers, batch, 1, n, size, dtype=torch.float64, requires_grad=True)
    k = torch.randn(layers, batch, 1, n, size, dtype=torch.float64)
    k[1] *= 0.1  # a layer in which few tokens are masked fully
    selectable = torch.ones(n, n, dtype=torch.bool).tril(-1)
    selectable[:, 0] = False
    variant = get_variant("selective")
    start = q.new_zeros(batch, n)
    penalties = [variant.select(q[i], k[i], selectable, 0.5, start)[0] for i in range(layers)]
    share = memory_share(penalties)
    naive = torch.stack(
        [
            naive_share([q[i, b, 0] * 0.5 @ k[i, b, 0].T for i in range(layers)])
            for b in range(batch)
        ]
    ).mean()
    assert 0.3 < naive.item() < 0.9
    torch.testing.assert_close(share, naive, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(share, q)
    (expected,) = torch.autograd.grad(naive, q)
    assert (expected != 0).any((1, 2, 3, 4)).all()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_nothing_masked_is_all_of_the_memory() -> None:
    assert memory_share([torch.zeros(2, 8, 8)] * 3).item() == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_models_penalties(precision: str) -> None:
    """What a model's layers hand over is what their own queries and keys give; and asking for it
    changes no loss."""
    torch.manual_seed(1)
    config = VariantLlamaConfig(
        attention_variant=SELECTIVE,
        vocab_size=19,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = VariantLlamaForCausalLM(config)
    ids = torch.randint(19, (2, 13))
    scores: list[Tensor] = []

    def recorded(attention: VariantLlamaAttention, *args: Any) -> tuple[Tensor, Tensor]:
        q, k = VariantLlamaAttention.rotate(attention, *args)
        scores.append(q[:, 0].double() * attention.scaling @ k[:, 0].double().mT)
        return q, k

    for layer in model.model.layers:
        layer.self_attn.rotate = functools.partial(recorded, layer.self_attn)
    found = loss_function(model, precision, memory=True)(ids[:, :-1], ids[:, 1:])
    assert len(scores) == 2
    naive = torch.stack([naive_share([x[b] for x in scores]) for b in range(2)]).mean()
    assert 0.3 < naive.item() < 0.95
    assert found["memory"].item() == pytest.approx(naive.item(), rel=1e-5)
    plain = loss_function(model, precision)(ids[:, :-1], ids[:, 1:])
    assert list(plain) == ["loss"]
    assert torch.equal(plain["loss"], found["loss"])


def test_training_with_it_masks_more(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Than training without; and the loss file holds the cross entropy and the share apart."""
    recipe = dataclasses.replace(TINY, steps=40)
    shares = {}
    for weight in (0.0, 0.5):
        folder = tmp_path / str(weight)
        own = dataclasses.replace(recipe, memory_loss=weight)
        run = Run(folder, own, SELECTIVE, tokenizer, tokens)
        run.train(save_every=40, quiet=True)
        terms = loss_function(run.model, "fp32", memory=True)(*run.batches(0))
        shares[weight] = terms["memory"].item()
        rows = list(csv.DictReader((folder / LOSSES).open()))
        assert [float(row["loss"]) for row in rows] == pytest.approx(run.losses, abs=1e-5)
        if weight:
            memory = run.terms["memory"]
            assert [float(row["memory"]) for row in rows] == pytest.approx(memory, abs=1e-5)
            assert 0 < min(memory) <= max(memory) <= 1
        else:
            assert list(rows[0]) == ["step", "learning_rate", "loss"]
            assert list(run.terms) == ["loss"]
    assert shares[0.5] < shares[0.0] - 0.1


def test_resumed_equals_uninterrupted(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    class Interrupted(Run):
        def save(self) -> None:
            super().save()
            if self.step == 5:
                raise Killed

    whole = Run(tmp_path / "whole", MEMORY, SELECTIVE, tokenizer, tokens)
    whole.train(save_every=5, quiet=True)
    with pytest.raises(Killed):
        Interrupted(tmp_path / "killed", MEMORY, SELECTIVE, tokenizer, tokens).train(5, quiet=True)
    again = Run(tmp_path / "killed", MEMORY, SELECTIVE, tokenizer, tokens)
    assert (again.step, len(again.terms["memory"])) == (5, 5)
    again.train(save_every=5, quiet=True)
    losses = [(tmp_path / run / LOSSES).read_text() for run in ("killed", "whole")]
    assert losses[0] == losses[1]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_a_run_without_the_setting_does_not_go_on_with_it(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    Run(tmp_path, TINY, SELECTIVE, tokenizer, tokens).save()
    with pytest.raises(ValueError, match=r"memory_loss = 0.0, not 0.1"):
        Run(tmp_path, MEMORY, SELECTIVE, tokenizer, tokens)


def test_a_variant_that_masks_nothing_is_refused(
    books: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, commands: Commands
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    line = commands.refused(
        train,
        *("--variant", "softpick", "--data", books / "first.txt"),
        *("--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run"),
        *("--memory-loss", "0.1", "--context", "16"),
    )
    assert line.endswith("softpick attention masks no tokens: leave out --memory-loss")
