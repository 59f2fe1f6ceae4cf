"""Whole sequences on GPUs, in training and outside: which calls the kernels take
(`attn_kernels.triton.training`), and how.

Everything else, decoding with a cache among it, goes through torch operations (`attention.py`).
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from attn_kernels import Variant

logger = logging.get_logger(__name__)


class Known(NamedTuple):
    """What is known of a mask and positions: all layers have the same."""

    given: tuple[int, int, int]
    """How often both were changed in place, and sequences."""
    position_ids: weakref.ref[Tensor] | None
    rows: Tensor | None
    causal: bool


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By masks."""


def usable(
    variant: Variant, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> bool:
    """Return whether the kernels can compute this call: on a GPU, whole sequences of heads that are
    not too large, and neither weights nor a soft cap are asked for."""
    if not on_gpu(query) or kwargs.get("softcap") or variant.kv_budgets:
        return False
    config = getattr(module, "config", None)
    asked = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    alike = query.shape[-2:] == key.shape[-2:] == value.shape[-2:]
    if asked or not alike or operand_dtype(query, key, value) == torch.float64:
        return False
    from attn_kernels.triton.tuning import LARGEST_HEAD_SIZE
    from attn_kernels.triton.variant import missing_derivative, missing_kernel

    if query.shape[-1] > LARGEST_HEAD_SIZE:
        return False
    trains = torch.is_grad_enabled()
    if missing := missing_derivative(variant) if trains else missing_kernel(variant):
        logger.warning_once(
            f"{variant.name} {'trains' if trains else 'runs'} with torch operations, whose scores "
            f"take memory for heads x tokens x tokens: it has no {missing} (docs/VARIANT.md)"
        )
    return not missing


def on_gpu(x: Tensor) -> bool:
    """Return whether kernels can be launched on a tensor."""
    return x.is_cuda


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of queries, keys and values: autocast's, as in torch's own attention."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def attend(
    variant: Variant,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    scaling: float | None,
    gates: Tensor | None = None,
) -> Tensor:
    """Return the output `[batch, num_heads, num_tokens, head_size]` of a `usable` call."""
    from attn_kernels.triton.training import attention

    dtype = operand_dtype(query, key, value)
    return attention(
        variant,
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        scale=scaling,
        learned={name: getattr(module, name) for name in variant.learned},
        rows=rows,
        gates=gates,
    )


def rows_of(
    mask: Tensor, position_ids: Tensor | None, batch: int, causal: bool = False
) -> Tensor | None:
    """Return the `rows` of a mask (`attn_kernels.triton.dense`), `[3, batch, num_tokens]` int32.

    None if a query sees keys with others between them, which kernels do not know. Waits for the
    device once for each mask. In a compiled model it cannot: there such a mask is an error.

    Args:
        mask: bool `[batch or 1, 1, num_tokens, num_tokens]`.
        position_ids: `[batch or 1, num_tokens]`; of another shape they are not looked at.
        batch: sequences.
        causal: None if a query sees a later key, too: a stateful variant does not know these.
    """
    if mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    if position_ids is not None and (
        position_ids.dim() != 2
        or position_ids.shape[1] != mask.shape[2]
        or position_ids.shape[0] not in (1, batch)
    ):
        position_ids = None
    if torch.compiler.is_compiling():
        rows, whole, forward = _intervals(mask, position_ids, batch)
        torch._assert_async(whole, "a query sees keys with others between them: do not compile")
        if causal:
            torch._assert_async(forward, "a query sees a later key: the variant is causal")
        return rows
    known = _known_rows(mask, position_ids, batch)
    return None if causal and not known.causal else known.rows


def _known_rows(mask: Tensor, position_ids: Tensor | None, batch: int) -> Known:
    """Return what is known, or find it out."""
    both = (mask,) if position_ids is None else (mask, position_ids)
    countable = not any(x.is_inference() for x in both)  # those have no versions
    stamp = (-1, -1, batch)
    if countable:
        stamp = mask._version, -1 if position_ids is None else position_ids._version, batch
        known: Known | None = _known.get(mask)
        if known is not None and known.given == stamp:
            same = known.position_ids
            if position_ids is None if same is None else same() is position_ids:
                return known
    rows, whole, causal = _intervals(mask, position_ids, batch)
    is_whole, is_causal = torch.stack((whole, causal)).tolist()
    place = None if position_ids is None else weakref.ref(position_ids)
    found = Known(stamp, place, rows if is_whole else None, is_causal)
    if countable:
        _known[mask] = found
    return found


def _intervals(
    mask: Tensor, position_ids: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `rows` of a mask, whether they say all of it, and whether it is causal."""
    seen = mask[:, 0].to(torch.uint8)
    count = seen.sum(-1, dtype=torch.int32)
    begin = seen.argmax(-1).to(torch.int32)
    end = torch.where(count > 0, seen.shape[-1] - seen.flip(-1).argmax(-1), 0).to(torch.int32)
    position = end - 1
    if position_ids is not None:
        position = position_ids.to(torch.int32)
    rows = torch.stack([x.expand(batch, -1) for x in (begin, end, position)])
    index = torch.arange(seen.shape[-1], device=seen.device)
    return rows, (end - begin == count).all(), (end <= index + 1).all()
