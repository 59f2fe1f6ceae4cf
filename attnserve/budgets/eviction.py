"""Who is thrown out of a layer's cache: five rules, each for a batch of whole sequences at once.

Every rule is applied token by token, as a server would: before token i is inserted, a cache that
holds `budget` tokens throws one out. Here that is a mask: `[batch, 1 or num_heads, n, n]`, True
where query i still has token j.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_kernels import Variant
from attn_kernels.pruning import LARGEST, fixed_point

SINKS = 4  # first tokens that StreamingLLM keeps


@dataclass(frozen=True)
class Cache:
    """One layer's tokens in a batch of sequences, as a rule of eviction sees them."""

    q: Tensor  # `[batch, num_heads, n, head_size]`, after RoPE
    k: Tensor  # `[batch, num_kv_heads, n, head_size]`, after RoPE
    scale: float  # factor of the raw scores
    # `[batch, n, n]` int64 of `accumulate`, or None if the attention has none.
    accumulated: Tensor | None
    seeds: list[list[int]]  # `[batch]`, a seed for each sequence in this layer
    budget: int  # tokens that the layer keeps


def accumulate(variant: Variant, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the accumulators of a prunable variant as each query finds them, in the fixed point of
    `attn_kernels.pruning`: `[batch, n, n]` int64."""
    n = q.shape[-2]
    selectable = torch.ones(n, n, dtype=torch.bool).tril(-1)
    selectable[:, 0] = False
    added = fixed_point(variant.selection(q[:, 0] * scale @ k[:, 0].mT)).masked_fill_(
        ~selectable, 0
    )
    after = added.cumsum(1).clamp_(max=LARGEST)
    return torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)


def scan(rank: Tensor, first: int, budget: int) -> Tensor:
    """Throw out the stored token of the highest rank, again and again.

    Args:
        rank: `[batch, n, n]`, of token j when token i comes; no two of a row are equal, or the
            oldest of equal ones goes.
        first: tokens at the beginning that always stay; fewer than `budget`.
        budget: tokens that are kept.

    Returns:
        `[batch, n]`: which query first misses the token; n if none does.
    """
    batch, n = rank.shape[:2]
    lowest = (torch.finfo if rank.is_floating_point() else torch.iinfo)(rank.dtype).min
    stays = torch.zeros(batch, n, dtype=torch.bool)
    stays[:, :first] = True
    deaths = torch.full((batch, n), n)
    rows = torch.arange(batch)
    for i in range(budget, n):
        victim = rank[:, i, :i].masked_fill(stays[:, :i], lowest).argmax(-1)
        deaths[rows, victim] = i
        stays[rows, victim] = True  # nobody goes twice
    return deaths


def survivors(deaths: Tensor) -> Tensor:
    """Return the mask that `deaths [batch, n]` makes, `[batch, 1, n, n]`."""
    query = torch.arange(deaths.shape[-1])[:, None]
    return ((query >= query.T) & (query < deaths[:, None]))[:, None]


def most_masked(cache: Cache) -> Tensor:
    """Evict as a prunable variant does: the largest accumulator goes, the oldest of equal ones, and
    never the first."""
    assert cache.accumulated is not None
    n = cache.q.shape[-2]
    return survivors(scan((cache.accumulated << 31) - torch.arange(n), 1, cache.budget))


def random(cache: Cache) -> Tensor:
    """Evict any but the first, each as likely."""
    n = cache.q.shape[-2]
    draws = [np.random.default_rng(seed).random((n, n), np.float32) for seed in cache.seeds]
    return survivors(scan(torch.from_numpy(np.stack(draws)), 1, cache.budget))


def oldest(sinks: int, cache: Cache) -> Tensor:
    """Evict the oldest but for the first `sinks`, as many as the budget has room for."""
    n = cache.q.shape[-2]
    age = -torch.arange(n).expand(1, n, n)
    return survivors(scan(age, min(sinks, cache.budget - 1), cache.budget))


def recent(cache: Cache) -> Tensor:
    """Keep the first token and the most recent ones."""
    return oldest(1, cache)


def streaming(cache: Cache) -> Tensor:
    """Keep `SINKS` first tokens and the most recent ones, as StreamingLLM (arXiv 2309.17453).

    Tokens keep the positions of the text; within the training length there is no need to move them.
    """
    return oldest(SINKS, cache)


def heavy_hitters(cache: Cache) -> Tensor:
    """Evict as H2O does (arXiv 2306.14048).

    Half of the budget is for the most recent tokens, half for those that had the most attention so
    far, summed over queries and over the heads of a KV head, which each keep tokens of their own.
    Attention is that over what was kept.
    """
    batch, num_heads, n, _ = cache.q.shape
    num_kv_heads = cache.k.shape[1]
    q = cache.q.unflatten(1, (num_kv_heads, -1))
    scores = q * cache.scale @ cache.k.unsqueeze(2).mT
    newest = cache.budget // 2
    kept = torch.zeros(batch, num_kv_heads, n, dtype=torch.bool)
    attention = scores.new_zeros(batch, num_kv_heads, n)
    mask = torch.zeros(batch, num_kv_heads, n, n, dtype=torch.bool)
    for i in range(n):
        if i >= cache.budget:
            old = attention.masked_fill(~kept, torch.inf)[..., : i + 1 - newest]
            kept.scatter_(-1, old.argmin(-1, keepdim=True), False)
        kept[..., i] = True
        mask[:, :, i] = kept
        seen = scores[..., i, : i + 1].masked_fill(~kept[:, :, None, : i + 1], -torch.inf)
        attention[..., : i + 1] += seen.softmax(-1).sum(2)
    return mask.repeat_interleave(num_heads // num_kv_heads, 1)


RULES: dict[str, Callable[[Cache], Tensor]] = {
    "selective": most_masked,
    "random": random,
    "recent": recent,
    "streaming": streaming,
    "heavy hitters": heavy_hitters,
}
