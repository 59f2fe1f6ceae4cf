"""A short fine-tuning of a whole checkpoint or of its variant's learned per-head tensors only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attn_kernels.variants.softmax import Softmax
from attn_kernels.variants.ssmax import SSMax
from attnserve.errors import UserError
from attnserve.evaluation.texts import Tokens
from attnserve.evaluation.tiled import project
from hf_attn import VariantLlamaForCausalLM
from hf_attn.modeling import VariantLlamaAttention
from training.data import Batches, fingerprint
from training.recipe import FineTuning
from training.resumable import Resumable, loss_function


def fused_forward(
    attention: VariantLlamaAttention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute what the attention module does for whole sequences without padding, by torch's fused
    softmax attention: memory in proportion to the length, and on a CPU three times as fast at 1,024
    tokens. For variants that are softmax of changed queries and keys.

    Args:
        attention: the module.
        hidden_states: `[batch, num_tokens, hidden_size]`.
        position_embeddings: cosines and sines `[batch, num_tokens, head_size]`.
    """
    q, k, v = project(attention, hidden_states)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    n = torch.arange(1, q.shape[-2] + 1, device=q.device, dtype=torch.float32)[:, None]
    learned = {name: getattr(attention, name) for name in attention.variant.learned}
    q, k = attention.variant.transform(q, k, n, learned)
    k, v = (x.repeat_interleave(attention.num_key_value_groups, 1) for x in (k, v))
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
    return attention.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


@contextmanager
def fused_attention(model: VariantLlamaForCausalLM) -> Iterator[bool]:
    """Let the model's attention run `fused_forward` meanwhile; yield whether its variant allows
    that."""
    fits = isinstance(model.config.variant, Softmax | SSMax) and not model.config.sliding_window
    modules = [layer.self_attn for layer in model.model.layers] if fits else []
    for attention in modules:
        attention.forward = fused_forward.__get__(attention)
    try:
        yield fits
    finally:
        for attention in modules:
            del attention.forward


class FineTune(Resumable):
    """One fine-tuning, in place, of a model in float32.

    `folder` holds `state.pt`, which is written after `save_seconds` at the earliest. `origin` is
    what else a continued run must have in common with the first.
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
    ) -> None:
        self.model, self.settings, self.save_seconds = model, settings, save_seconds
        learned = model.config.variant.learned
        if settings.train == "scale" and not learned:
            raise UserError(
                f"{model.config.variant.name} learns no per-head tensors: use --train all"
            )
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if settings.train == "all" or name.rpartition(".")[2] in learned
        }
        batches = Batches(tokens, settings.sequence, settings.batch, bos, settings.seed)
        identity = {**(origin or {}), **asdict(settings), "text": fingerprint(tokens)}
        optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
        self._saved = time.monotonic()
        super().__init__(folder, identity, settings, batches, trained, optimizer)

    def save(self) -> None:
        """Write the state."""
        super().save()
        self._saved = time.monotonic()

    def run(self, compiled: bool = False, quiet: bool = False) -> None:
        """Take the remaining steps."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        loss_of = loss_function(self.model.train(), self.settings.precision, compiled)
        with fused_attention(self.model) as fused:
            if not fused and not compiled:
                self.model.gradient_checkpointing_enable()  # dense scores of one layer at a time
            self.take_steps(
                loss_of, lambda: time.monotonic() - self._saved > self.save_seconds, quiet
            )
        self.model.eval()
