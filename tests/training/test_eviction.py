"""The rules of eviction, for whole batches, against one token at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_kernels import get_variant
from attn_kernels.pruning import FRACTION_BITS, Page, PageShape, attend_pruned
from attnserve.budgets.eviction import RULES, SINKS, Cache, accumulate

N = 40
SELECTIVE = get_variant("selective")


def page(budget: int, k: Tensor) -> Page:
    """Return an empty page for keys like `k [num_kv_heads, n, head_size]`."""
    shape = PageShape(budget, k.shape[0], k.shape[-1], k.dtype)
    return Page.view(torch.zeros(shape.num_bytes, dtype=torch.uint8), shape)


def cache(budget: int, batch: int = 3, first: int = 0) -> Cache:
    """Two query heads for each of two KV heads; sequences of number `first` and on."""
    numbers = range(first, first + batch)
    drawn = []
    for number in numbers:
        torch.manual_seed(number)
        drawn.append(torch.randn(6, N, 8, dtype=torch.float64))
    q, k = torch.stack(drawn).split([4, 2], 1)
    seeds = [[7, 0, number] for number in numbers]
    return Cache(q, k, 0.5, accumulate(SELECTIVE, q, k, 0.5), seeds, budget)


@pytest.mark.parametrize("budget", [2, 3, 9, 25, N])
@pytest.mark.parametrize("ties", [False, True])
def test_selective_is_the_reference(budget: int, ties: bool) -> None:
    """`attn_kernels.pruning.attend_pruned`, a sequence at a time."""
    made = cache(budget)
    q, k, v = made.q.clone(), made.k, torch.randn_like(made.k)
    if ties:
        q[:, 0, 5:] = 0.0  # from here on nobody is masked any more
    accumulated = accumulate(SELECTIVE, q, k, made.scale)
    mask = RULES["selective"](Cache(q, k, made.scale, accumulated, made.seeds, budget))
    bias = (-accumulated.double() / 2**FRACTION_BITS)[:, None].masked_fill(~mask, -torch.inf)
    found = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=made.scale, enable_gqa=True)
    for i in range(len(q)):
        expected = attend_pruned(SELECTIVE, q[i], k[i], v[i], page(budget, k[i]), 0, made.scale)
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("budget", [2, 5, 12, N, N + 9])
@pytest.mark.parametrize("rule", RULES)
def test_what_every_rule_keeps(rule: str, budget: int) -> None:
    """As many tokens as there is room for, none of them from the future or from the dead, the
    query's own among them and (but for H2O) the first."""
    mask = RULES[rule](cache(budget))
    assert mask.shape[-2:] == (N, N)
    room = torch.arange(1, N + 1).clamp(max=budget)
    assert torch.equal(mask.sum(-1), room.expand(mask.shape[:-1]))
    assert not mask.triu(1).any()
    assert not (mask[..., 1:, :-1] & ~mask[..., :-1, :-1]).tril().any()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    if rule != "heavy hitters":
        assert mask[..., 0].all()


@pytest.mark.parametrize(("rule", "sinks"), [("recent", 1), ("streaming", SINKS)])
def test_first_and_most_recent(rule: str, sinks: int) -> None:
    mask = RULES[rule](cache(10))
    for i in range(N):
        kept = {*range(min(sinks, i + 1)), *range(max(0, i + 1 - (10 - sinks)), i + 1)}
        assert set(mask[0, 0, i].nonzero().flatten().tolist()) == kept


def test_random_is_the_sequences_own() -> None:
    """In whatever batch a sequence is; and each token is as likely to go."""
    together, alone = RULES["random"](cache(5)), RULES["random"](cache(5, batch=1, first=2))
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[0], together[1])
    many = RULES["random"](cache(5, batch=800))
    # Of tokens 1 to 4 one goes when token 5 comes.
    share = (~many[:, 0, 5, 1:5]).double().mean(0)
    torch.testing.assert_close(share, torch.full((4,), 0.25).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("budget", [2, 5, 12])
def test_heavy_hitters_one_by_one(budget: int) -> None:
    made = cache(budget)
    mask = RULES["heavy hitters"](made)
    newest = budget // 2
    for b, kv_head in itertools.product(range(3), range(2)):
        heads = [2 * kv_head, 2 * kv_head + 1]
        totals: dict[int, float] = {}
        for i in range(N):
            if len(totals) == budget:
                old = [j for j in totals if j <= i - newest]
                del totals[min(old, key=lambda j: totals[j])]
            totals[i] = 0.0
            stored = sorted(totals)
            for head in heads:
                scores = made.q[b, head, i] @ made.k[b, kv_head, stored].T * made.scale
                for j, weight in zip(stored, scores.softmax(-1).tolist(), strict=True):
                    totals[j] += weight
                assert mask[b, head, i].nonzero().flatten().tolist() == stored
