"""Compile what a layer can launch before its first request, which would wait for it."""

from __future__ import annotations

import math

import torch

from attn_kernels.batch import Batch
from attn_kernels.triton import tuning
from attn_kernels.triton.layer import MOST_SCORES, TritonLayer, TritonPrunedLayer


def compile_launches(
    layer: TritonLayer | TritonPrunedLayer,
    dtype: torch.dtype,
    *,
    max_num_reqs: int,
    max_num_tokens: int,
    max_seq_len: int,
) -> None:
    """Compile what any batch launches, inside `launch.compile_only`.

    What is compiled depends on how full the device is: every number of programs up to the most is
    tried in powers of two, and every length that decides into how many parts contexts are cut. Of
    two passes, the scores are kept between them, or not, by what the most would take.

    Args:
        layer: bound to a cache of the shape of a server's, of any number of blocks.
        dtype: of queries.
        max_num_reqs: requests of a step.
        max_num_tokens: tokens of a step.
        max_seq_len: tokens of a request.
    """
    lengths = {min(parts * tuning.KEYS_OF_PART, max_seq_len) for parts in (1, 4, 16)}
    two_passes = isinstance(layer, TritonLayer) and layer.two_passes
    for kept in (True, False) if two_passes else (True,):
        if isinstance(layer, TritonLayer):
            layer.most_scores = math.inf if kept else 0
        # Up to the next power of two some batch may be too large.
        least = 1 if kept else MOST_SCORES // (2 * layer.num_heads * max_seq_len)
        for count in powers(max_num_reqs):  # a decode, whose parts do not depend on the lengths
            if count >= least:
                _launch(layer, dtype, count, max_query_len=1, max_seq_len=max_seq_len)
        for count in powers(max_num_tokens):
            for length in sorted(lengths) if count >= least else ():
                _launch(layer, dtype, count, max_query_len=max(2, count), max_seq_len=length)


def powers(most: int) -> list[int]:
    """Return the powers of two up to `most`, and `most`."""
    return sorted({1 << n for n in range(most.bit_length())} | {most})


def _launch(
    layer: TritonLayer | TritonPrunedLayer,
    dtype: torch.dtype,
    count: int,
    *,
    max_query_len: int,
    max_seq_len: int,
) -> None:
    """Compile a step of `count` tokens of one request, of which none has any."""
    device = layer.device
    batch = Batch(
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.full((count,), -1, dtype=torch.int64, device=device),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )
    with torch.device("meta"):  # nothing is read
        query = torch.empty(count, layer.num_heads, layer.head_size, dtype=dtype)
        key = torch.empty(count, layer.num_kv_heads, layer.head_size, dtype=dtype)
        gates = torch.empty(count, layer.num_heads)
        selecting = torch.empty(count, 2, layer.head_size, dtype=dtype)
        # 16 may divide the strides of keys and values that are a part of one product with queries
        # where it does not divide their own.
        part = torch.cat([query, key, key], 1)[:, layer.num_heads : -layer.num_kv_heads]
    if isinstance(layer, TritonLayer) and layer.variant.gated:
        layer.write_gates(gates, batch)
    for given in ((key, key), (key, part), (part, part)):
        out = torch.empty_like(query)
        layer.step(query, *given, batch, out, selecting if layer.selector else None)
