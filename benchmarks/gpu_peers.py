"""Softmax kernels of others, on the data of a case of `benchmarks.gpu`.

They are made on torch's default device (`with torch.device("cuda")`), each with its own copy of
keys and values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnserve import machine

if TYPE_CHECKING:
    from torch import Tensor

    from attn_kernels import Variant
    from attn_kernels.batch import Batch
    from benchmarks.kernels.case import Inputs, Paging

SEGMENTS, SMALLEST_GRID = 16, 128
"""How vLLM 0.32 cuts contexts for its Triton kernel (v1/attention/backends/triton_attn.py)."""


class MissingError(Exception):
    """Why a kernel of others cannot be timed here, in one line."""


@dataclass
class Peer:
    """A softmax kernel of others: a `benchmarks.kernels.candidates.Candidate`."""

    variant: Variant
    run: Callable[[], Tensor]
    learned: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self) -> None:
        """Do nothing: there is one copy."""


def of_vllm(inputs: Inputs, module: str, name: str) -> Callable[..., Any]:
    """Return a function of vLLM's CUDA build."""
    found = machine.package("vllm")
    if inputs.query.device.type != "cuda" or not found or found.endswith("+cpu"):
        raise MissingError(f"vLLM for CUDA is not installed (found {found or 'none'})")
    return imported(module, name)


def imported(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a package that may be missing."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MissingError(f"{module} is not installed ({error})") from None
    return function


def softmax(run: Callable[[], Tensor]) -> Peer:
    """Return a softmax kernel of others."""
    from attn_kernels import get_variant

    return Peer(get_variant("softmax"), run)


def paged(inputs: Inputs, paging: Paging) -> tuple[Tensor, Tensor]:
    """Return keys and values `[num_blocks, block_size, num_kv_heads, head_dim]`."""
    import torch

    case = inputs.case
    shape = (paging.num_blocks * case.block_size, case.num_kv_heads, case.head_dim)
    found = []
    for x in (inputs.key, inputs.value):
        cache = torch.zeros(shape, dtype=x.dtype)
        cache[paging.slots(0, 0)] = x.flatten(0, 1)
        found.append(cache.view(paging.num_blocks, case.block_size, *shape[1:]))
    return found[0], found[1]


def flash_attention(inputs: Inputs, paging: Paging) -> Peer:
    """Return `flash_attn_with_kvcache`, on keys and values that are side by side."""
    call = imported("flash_attn", "flash_attn_with_kvcache")
    query = inputs.query.unflatten(0, (inputs.case.batch, -1))
    options = {"cache_seqlens": inputs.seq_lens, "softmax_scale": inputs.scale, "causal": True}
    return softmax(lambda: call(query, inputs.key, inputs.value, **options).flatten(0, 1))


def vllm_flash_attention(inputs: Inputs, paging: Paging) -> Peer:
    """Return the FlashAttention that vLLM's CUDA build brings with it, paged."""
    call = of_vllm(inputs, "vllm.vllm_flash_attn", "flash_attn_varlen_func")
    version = flash_attention_version(inputs.case.head_dim)
    keys, values = paged(inputs, paging)
    out = inputs.query.new_zeros(inputs.query.shape)

    def run() -> Tensor:
        call(
            inputs.query,
            keys,
            values,
            max_seqlen_q=inputs.case.new_tokens,
            cu_seqlens_q=inputs.query_start_loc,
            max_seqlen_k=inputs.case.seq_len,
            seqused_k=inputs.seq_lens,
            softmax_scale=inputs.scale,
            causal=True,
            block_table=paging.tables[0],
            out=out,
            fa_version=version,
        )
        return out

    return softmax(run)


def flash_attention_version(head_dim: int) -> int:
    """Return the version of FlashAttention with which vLLM serves on this GPU: 3 on Hopper. The
    function's own default is 2, whatever the GPU."""
    choose = imported("vllm.v1.attention.backends.fa_utils", "get_flash_attn_version")
    version: int | None = choose(head_size=head_dim)
    if version is None:
        raise MissingError("vLLM has no FlashAttention for this device")
    return version


def call_unified(
    call: Callable[..., Any],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    batch: Batch,
    descale: Tensor | None = None,
    **parts: Any,
) -> None:
    """Call vLLM's `unified_attention` for causal softmax.

    Args:
        call: the function.
        query, out: `[tokens, num_heads, head_dim]`.
        keys, values: `[num_blocks, block_size, num_kv_heads, head_dim]`.
        batch: the step's requests.
        descale: factor of keys and values, `[num_reqs, num_kv_heads]`.
        parts: what `scratch` gives, for contexts that are cut.
    """
    call(
        q=query,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.seq_lens,
        max_seqlen_k=batch.max_seq_len,
        softmax_scale=query.shape[-1] ** -0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=batch.block_table,
        softcap=0.0,
        q_descale=None,
        k_descale=descale,
        v_descale=descale,
        **parts,
    )


def scratch(rows: int, num_heads: int, head_dim: int, threshold: int) -> dict[str, Any]:
    """Return what makes vLLM's kernel cut contexts of at most `threshold` requests."""
    import torch

    shape = (rows, num_heads, SEGMENTS)
    return {
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*shape, 1 << (head_dim - 1).bit_length()),
        "softmax_segm_max": torch.empty(shape),
        "softmax_segm_expsum": torch.empty(shape),
    }


def unified_attention(inputs: Inputs, paging: Paging) -> Peer:
    """Return vLLM's Triton kernel, with the scratch memory that makes it cut long contexts."""
    call = of_vllm(inputs, "vllm.v1.attention.ops.triton_unified_attention", "unified_attention")
    keys, values = paged(inputs, paging)
    out = inputs.query.new_zeros(inputs.query.shape)
    case = inputs.case
    threshold = SMALLEST_GRID // case.num_kv_heads
    parts = scratch(max(threshold, case.batch), case.num_heads, case.head_dim, threshold)
    batch = inputs.batch(paging.tables[0])

    def run() -> Tensor:
        call_unified(call, inputs.query, keys, values, out, batch, **parts)
        return out

    return softmax(run)


def flex_attention(inputs: Inputs, paging: Paging) -> Peer:
    """Return torch's compiled `flex_attention` with a causal block mask."""
    import torch

    if inputs.query.device.type != "cuda":
        raise MissingError("FlexAttention is timed on a GPU only")
    from torch.nn.attention import flex_attention as flex

    case = inputs.case
    before = case.seq_len - case.new_tokens

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + before >= key

    mask = flex.create_block_mask(
        causal, None, None, case.new_tokens, case.seq_len, device=inputs.query.device
    )
    call: Callable[..., Any] = torch.compile(flex.flex_attention, dynamic=False)
    query = inputs.query.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous()
    key, value = (x.transpose(1, 2).contiguous() for x in (inputs.key, inputs.value))
    options = {"block_mask": mask, "scale": inputs.scale, "enable_gqa": True}
    return softmax(lambda: call(query, key, value, **options).transpose(1, 2).flatten(0, 1))


PEERS: dict[str, Callable[[Inputs, Paging], Peer]] = {
    "FlashAttention": flash_attention,
    "vLLM FlashAttention": vllm_flash_attention,
    "vLLM Triton": unified_attention,
    "FlexAttention": flex_attention,
}
