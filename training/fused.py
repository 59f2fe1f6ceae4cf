"""What computes the attention of a fine-tuning, whole sequences without padding: torch's fused
softmax attention, a GPU's kernels, or the modules' own forward."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attn_kernels import Rows, Variant, causal_mask
from attn_kernels.variants.softmax import Softmax, is_softmax
from attnserve.evaluation.tiled import project
from hf_attn import VariantLlamaForCausalLM
from hf_attn.modeling import VariantLlamaAttention

Forward = Callable[..., tuple[Tensor, None]]
"""An attention module's forward; it gets the module first."""

Attend = Callable[..., Tensor]
"""A function of an attention module, queries and keys after RoPE, values `[batch, heads,
num_tokens, head_size]` and hidden states that gives the heads' output, of the queries' shape."""


@contextmanager
def attention_forward(model: VariantLlamaForCausalLM, forward: Forward | None) -> Iterator[None]:
    """Let the model's attention modules run another forward meanwhile; None: their own."""
    if forward is None:
        yield
        return
    modules = [layer.self_attn for layer in model.model.layers]
    for attention in modules:
        # Methods, by which torch.compile sees that all layers are alike.
        attention.forward = types.MethodType(forward, attention)
    try:
        yield
    finally:
        for attention in modules:
            del attention.forward


def attends(model: VariantLlamaForCausalLM, penalties: bool = False) -> Attend | None:
    """Return what computes the model's attention faster than its modules do; None: nothing, as
    where its penalties are asked for."""
    variant = model.config.variant
    if penalties:
        return None
    if is_softmax(variant) and not variant.stateful and not model.config.sliding_window:
        return by_sdpa
    return by_kernels if on_gpu(model) and _kernels_train(model) else None


def on_gpu(model: VariantLlamaForCausalLM) -> bool:
    """Return whether kernels can be launched on a model's tensors."""
    return model.device.type == "cuda"


def _kernels_train(model: VariantLlamaForCausalLM) -> bool:
    from attn_kernels.triton.tuning import LARGEST_HEAD_SIZE
    from attn_kernels.triton.variant import missing_derivative

    variant, size = model.config.variant, model.config.head_dim
    small = size <= LARGEST_HEAD_SIZE
    return small and not variant.kv_budgets and not missing_derivative(variant)


def fused(model: VariantLlamaForCausalLM, penalties: bool = False) -> Forward | None:
    """Return the forward of the model's attention modules by `attends`, if there is one."""
    attend = attends(model, penalties)
    return None if attend is None else _forward_of(attend)


def blended(model: VariantLlamaForCausalLM, share: Tensor, penalties: bool = False) -> Forward:
    """Return attention between softmax's and the variant's: its output is `share` of the variant's
    and the rest of softmax's.

    Args:
        model: what it is for.
        share: 0 to 1, read at each call.
        penalties: whether a list asks for a stateful variant's.
    """
    own = attends(model, penalties)
    if own is not None:

        def between(*given: Any) -> Tensor:
            softmax = by_softmax(*given)
            return torch.lerp(softmax, own(*given), share.to(softmax.dtype))

        return _forward_of(between)
    softmax = _forward_of(by_softmax)

    def forward(attention: VariantLlamaAttention, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # What follows attention is linear: both outputs may come after it.
        output, _ = type(attention).forward(attention, *args, **kwargs)
        other, _ = softmax(attention, *args, **kwargs)
        return torch.lerp(other, output, share.to(output.dtype)), None

    return forward


def _forward_of(attend: Attend) -> Forward:
    """Return a forward for whole sequences without padding: the mask, which would take memory, is
    of no use."""

    def forward(
        attention: VariantLlamaAttention,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = project(attention, hidden_states)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        output = attend(attention, q, k, v, hidden_states)
        return attention.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    return forward


def by_kernels(
    attention: VariantLlamaAttention, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor
) -> Tensor:
    """Attend by the kernels of training, which keep no scores."""
    from attn_kernels.triton.training import attention as attend

    variant, gates = attention.variant, None
    if variant.gated:
        gates = variant.gate(attention.f_proj(hidden_states).transpose(1, 2))
    return attend(
        variant,
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        scale=attention.scaling,
        learned={name: getattr(attention, name) for name in variant.learned},
        window=attention.config.sliding_window,
        gates=gates,
    )


def by_sdpa(
    attention: VariantLlamaAttention, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor
) -> Tensor:
    """Attend by torch's fused softmax attention, of a variant that is softmax of changed queries
    and keys: memory in proportion to the length, and on a CPU three times as fast at 1,024
    tokens."""
    return _sdpa(attention, attention.variant, q, k, v)


def by_softmax(
    attention: VariantLlamaAttention, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor
) -> Tensor:
    """Attend by softmax, whatever the module's variant."""
    return _sdpa(attention, Softmax(), q, k, v)


def _sdpa(
    attention: VariantLlamaAttention, variant: Variant, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    positions = torch.arange(q.shape[-2], device=q.device)
    window = attention.config.sliding_window or len(positions)
    n = (positions + 1).clamp(max=window).to(torch.float32)[:, None]
    learned = {name: getattr(attention, name)[:, None, None] for name in variant.learned}
    q, k = variant.transform(q, k, Rows(torch.ones(1, 1, dtype=torch.bool), n, learned))
    q, k = q.to(v.dtype), k.to(v.dtype)
    k, v = (x.repeat_interleave(attention.num_key_value_groups, 1) for x in (k, v))
    scale = attention.scaling if variant.uses_scale else 1.0
    mask = causal_mask(positions, positions, window) if window < len(positions) else None
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
