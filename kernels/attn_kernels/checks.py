"""What is checked of the kernels' arguments before C++ gets pointers to them.

Shapes always are, which costs little beside a call. Numbers inside of tensors (slots, blocks,
lengths) are looked at only where `$ATTNSERVE_CHECKS` is 1, as in the tests.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from attn_kernels.batch import Batch

VALUES = os.environ.get("ATTNSERVE_CHECKS") == "1"


def check_rows(what: str, x: Tensor, rows: int, heads: int, size: int) -> None:
    """Refuse a tensor that is not `[>= rows, heads, size]`.

    Raises:
        ValueError: with one line that begins with `what`.
    """
    if x.dim() != 3 or x.shape[0] < rows or x.shape[1] != heads or x.shape[2] != size:
        raise ValueError(f"{what} is {list(x.shape)}, not [at least {rows}, {heads}, {size}]")


def check_gate_rows(gates: Tensor, rows: int, heads: int) -> None:
    """Refuse gates that are not `[>= rows, heads]`.

    Raises:
        ValueError: with one line.
    """
    if gates.dim() != 2 or gates.shape[0] < rows or gates.shape[1] != heads:
        raise ValueError(f"gates is {list(gates.shape)}, not [at least {rows}, {heads}]")


def check_out(out: Tensor, rows: int, heads: int, size: int) -> None:
    """Refuse an output that is not `[>= rows, heads, size]`, or whose heads are apart.

    Raises:
        ValueError: with one line.
    """
    check_rows("out", out, rows, heads, size)
    if out.stride()[1:] != (size, 1):
        raise ValueError("the heads of out must lie side by side in memory")


def check_slots(slots: Tensor, count: int) -> None:
    """Refuse slots that a cache of `count` slots does not have; -1 is padding.

    Raises:
        ValueError: with one line.
    """
    if slots.numel() and not -1 <= int(slots.min()) <= int(slots.max()) < count:
        raise ValueError(f"slots {int(slots.min())} to {int(slots.max())} of a cache of {count}")


def check_batch(batch: Batch, num_blocks: int, block_size: int | None, window: int = 0) -> None:
    """Refuse a batch that reads blocks which are not there.

    Args:
        batch: the batch.
        num_blocks: of the cache.
        block_size: tokens of a block; None: all that a request has is in its first.
        window: sliding window; 0: none.

    Raises:
        ValueError: with one line.
    """
    counts = batch.query_start_loc.diff()
    if int(batch.query_start_loc[0]) < 0 or (counts < 0).any():
        raise ValueError("query_start_loc falls")
    if (batch.seq_lens < counts).any():
        raise ValueError("a request has more queries than tokens")
    for request in counts.nonzero().flatten().tolist():
        length = int(batch.seq_lens[request])
        first, end = 0, 1
        if block_size is not None:
            oldest = length - int(counts[request]) - window + 1 if window else 0
            first, end = max(0, oldest) // block_size, -(-length // block_size)
        blocks = batch.block_table[request, first:end]
        if len(blocks) < end - first:
            raise ValueError(f"a request of {length} tokens has only {len(blocks)} blocks")
        if not 0 <= int(blocks.min()) <= int(blocks.max()) < num_blocks:
            raise ValueError(f"a request has blocks beyond the {num_blocks} of the cache")


def check_layer(num_heads: int, num_kv_heads: int, window: int | None) -> None:
    """Refuse heads that cannot share keys, and windows without a token.

    Raises:
        ValueError: with one line.
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} heads of keys and values")
    if window is not None and window < 0:
        raise ValueError(f"a window of {window} tokens")


def check_learned(name: str, tensor: Tensor, num_heads: int) -> None:
    """Refuse a learned tensor that has not one number a head.

    Raises:
        ValueError: with one line.
    """
    if tensor.shape != torch.Size((num_heads,)):
        raise ValueError(f"{name} is {list(tensor.shape)}, not [{num_heads}]")
