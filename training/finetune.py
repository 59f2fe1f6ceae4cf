"""A short fine-tuning of a whole checkpoint or of its variant's learned per-head tensors only."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attn_kernels import Rows, Variant, causal_mask
from attn_kernels.variants.softmax import Softmax, is_softmax
from attnserve.errors import UserError
from attnserve.evaluation.texts import Tokens
from attnserve.evaluation.tiled import project
from hf_attn import VariantLlamaForCausalLM
from hf_attn.modeling import VariantLlamaAttention
from training.data import Batches, fingerprint
from training.recipe import FineTuning
from training.resumable import Resumable, loss_function

Forward = Callable[..., tuple[Tensor, None]]


def fused_forward(
    attention: VariantLlamaAttention,
    variant: Variant,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute what the attention module does for whole sequences without padding, by torch's fused
    softmax attention: memory in proportion to the length, and on a CPU three times as fast at 1,024
    tokens.

    Args:
        attention: the module.
        variant: softmax of changed queries and keys; the module's own, or softmax in its place.
        hidden_states: `[batch, num_tokens, hidden_size]`.
        position_embeddings: cosines and sines `[batch, num_tokens, head_size]`.
    """
    q, k, v = project(attention, hidden_states)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    positions = torch.arange(q.shape[-2], device=q.device)
    window = attention.config.sliding_window or len(positions)
    n = (positions + 1).clamp(max=window).to(torch.float32)[:, None]
    learned = {name: getattr(attention, name)[:, None, None] for name in variant.learned}
    # The mask, which would take memory, is of no use here.
    q, k = variant.transform(q, k, Rows(torch.ones(1, 1, dtype=torch.bool), n, learned))
    q, k = q.to(v.dtype), k.to(v.dtype)
    k, v = (x.repeat_interleave(attention.num_key_value_groups, 1) for x in (k, v))
    scale = attention.scaling if variant.uses_scale else 1.0
    mask = causal_mask(positions, positions, window) if window < len(positions) else None
    output = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return attention.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


@contextmanager
def attention_forward(model: VariantLlamaForCausalLM, forward: Forward | None) -> Iterator[None]:
    """Let the model's attention modules run another forward meanwhile, which gets the module first;
    None: their own."""
    if forward is None:
        yield
        return
    modules = [layer.self_attn for layer in model.model.layers]
    for attention in modules:
        attention.forward = functools.partial(forward, attention)
    try:
        yield
    finally:
        for attention in modules:
            del attention.forward


def fused(model: VariantLlamaForCausalLM) -> Forward | None:
    """Return what computes the model's attention faster, if its variant allows that."""
    variant = model.config.variant
    if not is_softmax(variant) or variant.stateful or model.config.sliding_window:
        return None
    return lambda attention, *args, **kwargs: fused_forward(
        attention, attention.variant, *args, **kwargs
    )


def blended(share: Tensor) -> Forward:
    """Return attention between softmax's and the variant's: its output is `share` of the variant's
    and the rest of softmax's.

    Args:
        share: 0 to 1, read at each call.
    """

    def forward(attention: VariantLlamaAttention, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # What follows attention is linear: both outputs may come after it.
        own, _ = type(attention).forward(attention, *args, **kwargs)
        softmax, _ = fused_forward(attention, Softmax(), *args, **kwargs)
        return torch.lerp(softmax, own, share.to(own.dtype)), None

    return forward


class FineTune(Resumable):
    """One fine-tuning, in place and on its device, of a model in float32.

    `folder` holds `state.pt`, which is written after `save_seconds` at the earliest. `origin` is
    what else a continued run must have in common with the first. `teacher`, on the same device, is
    the model whose predictions are followed, if the settings have a weight for that.
    """

    def __init__(
        self,
        model: VariantLlamaForCausalLM,
        settings: FineTuning,
        tokens: Tokens,
        bos: int,
        folder: Path,
        origin: Mapping[str, Any] | None = None,
        save_seconds: float = 60.0,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.settings, self.save_seconds = model, settings, save_seconds
        if bool(settings.distill) != (teacher is not None):
            raise ValueError("a teacher and a weight for what it teaches go together")
        self.teacher = teacher
        learned = model.config.variant.tensors
        if settings.train == "scale" and not learned:
            raise UserError(
                f"{model.config.variant.name} learns no per-head tensors: use --train all"
            )
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if settings.train == "all" or name.partition(".self_attn.")[2] in learned
        }
        batches = Batches(tokens, settings.sequence, settings.batch, bos, settings.seed)
        identity = {**(origin or {}), **asdict(settings), "text": fingerprint(tokens)}
        optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0, fused=True)
        self._saved = time.monotonic()
        super().__init__(folder, identity, settings, batches, trained, optimizer)

    def save(self) -> None:
        """Write the state."""
        super().save()
        self._saved = time.monotonic()

    def objective(self, loss: Tensor, other: Tensor) -> Tensor:
        """Return the loss and the divergence from the teacher, with their weights."""
        return torch.lerp(loss, other, self.settings.distill)

    @property
    def progress(self) -> float:
        """Which share is done, of the steps or of the time."""
        return self.settings.progress(self.step, self.seconds)

    @property
    def learning_rate(self) -> float:
        """The next step's."""
        return self.settings.learning_rate_at(self.step, self.seconds)

    def run(self, compiled: bool = False, quiet: bool = False) -> None:
        """Take the remaining steps."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.model.train()
        share = torch.zeros((), device=self.model.device)
        self._take(blended(share), compiled, quiet, self.settings.blend, share)
        self._take(fused(self.model), compiled, quiet)
        self.model.eval()

    def _take(
        self,
        forward: Forward | None,
        compiled: bool,
        quiet: bool,
        until: float = 1.0,
        share: Tensor | None = None,
    ) -> None:
        """Take the steps before the progress `until` with an attention, of which `share` grows
        to 1."""
        if self.progress >= until:
            return
        dense = (forward is None or share is not None) and not self.kernels
        if dense and not compiled:
            self.model.gradient_checkpointing_enable()  # scores of one layer at a time
        step = 1 / self.settings.steps if self.settings.steps else 1e-3
        inner = loss_function(self.model, self.settings.precision, compiled, teacher=self.teacher)

        def loss_of(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
            if share is not None:
                share.fill_((self.progress + step) / (until + step))
            return inner(inputs, targets)

        with attention_forward(self.model, forward):
            self.take_steps(
                loss_of, lambda: time.monotonic() - self._saved > self.save_seconds, quiet, until
            )

    @property
    def kernels(self) -> bool:
        """Whether attention is computed by GPU kernels, which keep no scores."""
        if self.model.device.type != "cuda":
            return False
        from attn_kernels.triton.variant import missing_derivative

        return not missing_derivative(self.model.config.variant)
