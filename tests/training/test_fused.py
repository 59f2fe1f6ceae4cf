"""What computes attention and loss in a fine-tuning: fused, by kernels, in pieces and compiled, it
is the same as the model's own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attn_kernels import Rows
from attn_kernels.variants.softmax import Softmax
from tests.attn_kernels.test_triton import interpreter
from tests.tiny import tiny_checkpoint
from tests.training.test_convert import ids, load, logits, plain
from training import finetune, fused, resumable
from training.conversion import convert, teacher_of
from training.recipe import Conversion
from training.resumable import loss_function

__all__ = ["ids", "interpreter", "plain"]


@pytest.mark.parametrize("variant", ["softmax", "ssmax", "softpick"])
def test_fused_attention_is_the_same_attention(variant: str, plain: Path, ids: Tensor) -> None:
    """Loss and gradients of training's own attention, where there is one."""
    model = convert(plain, {"name": variant}, Conversion())
    results: list[list[Tensor]] = []
    for faster in (None, fused.fused(model)):
        model.zero_grad()
        if results:
            assert (faster is None) == (variant == "softpick")
            with fused.attention_forward(model, faster):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=2e-4)


def test_fused_attention_of_scores_without_the_models_scale(plain: Path, ids: Tensor) -> None:
    """Whatever subclass of softmax it is."""

    class Unscaled(Softmax):
        uses_scale: ClassVar[bool] = False

        def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
            return q * rows.n.sqrt() * 0.1, k

    model = convert(plain, {"name": "softmax"}, Conversion())
    plain_logits, found = logits(model, ids), []
    for layer in model.model.layers:
        layer.self_attn.variant = Unscaled()
    for forward in (None, fused.fused(model)):
        with fused.attention_forward(model, forward):
            found.append(logits(model, ids))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=2e-4)
    assert (found[0] - plain_logits).abs().max() > 0.01


def test_blended_attention_with_a_window(tmp_path: Path, ids: Tensor) -> None:
    """Its softmax part sees no further than the model's own."""
    folder = tiny_checkpoint(tmp_path, "softmax", sliding_window=5)
    model = convert(folder, {"name": "softmax"}, Conversion())
    with fused.attention_forward(model, fused.blended(model, torch.zeros(()))):
        found = logits(model, ids)
    torch.testing.assert_close(found, logits(model, ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("variant", ["softpick", "selective"])
def test_blended_attention(variant: str, plain: Path, ids: Tensor) -> None:
    """All softmax, all the variant, and in the first layer exactly between them."""
    model = convert(plain, {"name": variant}, Conversion())
    share, found = torch.zeros(()), []
    outputs: list[Tensor] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    for value in (0.0, 1.0, 0.25):
        share.fill_(value)
        with fused.attention_forward(model, fused.blended(model, share)):
            found.append(logits(model, ids))
    torch.testing.assert_close(found[0], logits(load(plain), ids), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found[1], logits(model, ids), atol=2e-4, rtol=2e-4)
    between = 0.75 * outputs[0] + 0.25 * outputs[1]
    torch.testing.assert_close(outputs[2], between, atol=1e-5, rtol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["softpick", "selective", "forgetting"])
def test_attention_by_kernels(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    """As the modules have it, and between softmax and the variant; in Triton's interpreter, with a
    window."""
    window = None if variant == "selective" else 9
    folder = tiny_checkpoint(tmp_path, "softmax", sliding_window=window, num_hidden_layers=1)
    model = convert(folder, {"name": variant}, Conversion())
    ids = ids[:, :20]
    share = torch.tensor(0.3)
    results = []
    for by_kernels in (False, True):
        monkeypatch.setattr(fused, "on_gpu", lambda _: by_kernels)  # noqa: B023 (called here)
        assert (fused.fused(model) is not None) == by_kernels
        for forward in (fused.fused(model), fused.blended(model, share)):
            model.zero_grad()
            with fused.attention_forward(model, forward):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[:2], results[2:], atol=2e-5, rtol=2e-4)


def test_a_loss_in_pieces(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is the same, and so are its gradients; the last piece is shorter."""
    model = convert(plain, {"name": "ssmax"}, Conversion())
    teacher = teacher_of(plain, "fp32", "cpu")
    inputs, targets = torch.arange(74).view(2, 37) % 50, torch.arange(5, 79).view(2, 37) % 50
    found = []
    for limit in (resumable.LOGITS, 10 * model.config.vocab_size):
        monkeypatch.setattr(resumable, "LOGITS", limit)
        model.zero_grad()
        terms = loss_function(model, "fp32", teacher=teacher)(inputs, targets)
        loss, divergence = terms["loss"], terms["divergence"]
        (loss + 2 * divergence).backward()
        found.append([loss, divergence, *(p.grad for p in model.parameters())])
    logprobs = logits(model, inputs).log_softmax(-1)
    wished = logits(teacher, inputs).log_softmax(-1)
    wanted = -logprobs.gather(-1, targets[..., None]).mean()
    assert found[0][0].item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted = (wished.exp() * (wished - logprobs)).sum(-1).mean()
    assert found[0][1].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", ["softpick", "selective"])
def test_all_layers_are_compiled_once(
    variant: str, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an attention between softmax and the variant, and once more without; a teacher's, too;
    and with a list of penalties, which grows from layer to layer. Else a limit would be reached,
    behind which layers run as they are."""
    folder, ids = tiny_checkpoint(tmp_path, "softmax"), ids[:, :24]
    model = convert(folder, {"name": variant}, Conversion())
    memory = variant == "selective"
    teacher = teacher_of(folder, "fp32", "cpu")
    monkeypatch.setattr(fused, "on_gpu", lambda _: True)
    loss_of = loss_function(model, "fp32", memory, teacher)
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    between = fused.blended(model, torch.tensor(0.5), memory)
    for forward in (between, fused.fused(model, memory)):
        with fused.attention_forward(model, forward):
            wanted = loss_of(ids[:, :-1], ids[:, 1:])
            with finetune.compiled_layers(model, teacher):
                found = loss_of(ids[:, :-1], ids[:, 1:])
                torch.stack(list(found.values())).sum().backward()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 3
    assert "forward" not in vars(model.model.layers[0])
