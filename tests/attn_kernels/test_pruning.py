"""Context pruning against the rule carried out one token at a time, in Python's own numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attn_kernels import get_variant, pruning, reference
from tests.attn_kernels.cases import seeded

SELECTIVE = get_variant("selective")


class Kept(NamedTuple):
    """A stored token: its position, its accumulator in units of 2^-16, its key and value."""

    position: int
    accumulator: int
    key: Tensor
    value: Tensor


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, budget: int, scale: float
) -> tuple[Tensor, dict[int, int]]:
    """Apply the written rule to one KV head: `(outputs, {position: last accumulator})`."""
    stored: list[Kept] = []
    outputs = torch.empty_like(q)
    for i in range(q.shape[1]):
        if len(stored) == budget:
            candidates = [token for token in stored if token.position != 0]
            victim = max(candidates, key=lambda token: (token.accumulator, -token.position))
            stored = [token for token in stored if token.position != victim.position]
        stored.append(Kept(i, 0, k[i], v[i]))
        for head in range(q.shape[0]):
            scores = [
                float(q[head, i] @ token.key) * scale - token.accumulator / 2**16
                for token in stored
            ]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            outputs[head, i] = sum(
                w / sum(weights) * token.value for w, token in zip(weights, stored, strict=True)
            )
        stored = [
            token._replace(
                accumulator=min(
                    2**31 - 1,
                    token.accumulator + round(max(0.0, float(q[0, i] * scale @ token.key)) * 2**16),
                )
            )
            if token.position not in (0, i)
            else token
            for token in stored
        ]
    return outputs, {token.position: token.accumulator for token in stored}


def inputs(n: int, heads: int = 3, size: int = 8, spread: float = 1.0) -> tuple[Tensor, ...]:
    g = seeded(n)
    q = torch.randn(heads, n, size, generator=g, dtype=torch.float64) * spread
    k, v = torch.randn(2, 1, n, size, generator=g, dtype=torch.float64)
    return q, k, v


def poisoned_page(
    budget: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> pruning.Page:
    """Return a page as another request left it: its numbers are wild, its keys and values NaN."""
    shape = pruning.PageShape(budget, num_kv_heads, head_size, dtype)
    memory = torch.full((shape.num_bytes,), 0x7F, dtype=torch.uint8)
    page = pruning.Page.view(memory, shape)
    page.keys.fill_(float("nan"))
    page.values.fill_(float("nan"))
    return page


def in_chunks(
    q: Tensor, k: Tensor, v: Tensor, budget: int, chunk: int, scale: float
) -> tuple[Tensor, pruning.Page]:
    page = poisoned_page(budget, k.shape[0], k.shape[-1], torch.float64)
    n = q.shape[1]
    outputs = []
    for start in range(0, n, chunk):
        end = start + chunk
        part = q[:, start:end], k[:, start:end], v[:, start:end]
        outputs.append(pruning.attend_pruned(SELECTIVE, *part, page, start, scale))
    return torch.cat(outputs, 1), page


@pytest.mark.parametrize("chunk", [1, 2, 7, 40, 61])
@pytest.mark.parametrize("budget", [2, 3, 8, 30])
def test_any_chunking_is_token_by_token(budget: int, chunk: int) -> None:
    q, k, v = inputs(61)
    expected, accumulators = one_by_one(q, k[0], v[0], budget, 0.5)
    outputs, page = in_chunks(q, k, v, budget, chunk, 0.5)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    assert (
        dict(zip(page.positions.tolist(), page.accumulators.tolist(), strict=True)) == accumulators
    )


@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_ample_budget_is_selective_attention(chunk: int) -> None:
    """But for the accumulators' rounding to 2^-16."""
    q, k, v = inputs(40)
    outputs, _ = in_chunks(q, k, v, 40, chunk, 0.5)
    expected, _ = reference.attention(SELECTIVE, q, k, v, scale=0.5)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-3)


def test_ties_evict_the_oldest() -> None:
    """Queries that select nothing: all accumulators are 0."""
    q, k, v = inputs(12)
    q[0] = 0.0
    _, page = in_chunks(q, k, v, 4, 5, 0.5)
    assert sorted(page.positions.tolist()) == [0, 9, 10, 11]


def test_accumulators_saturate() -> None:
    q, k, v = inputs(30, spread=1e6)
    expected, accumulators = one_by_one(q, k[0], v[0], 6, 1.0)
    assert pruning.LARGEST in accumulators.values()
    for chunk in (1, 9):
        outputs, page = in_chunks(q, k, v, 6, chunk, 1.0)
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
        assert sorted(page.accumulators.tolist()) == sorted(accumulators.values())


def test_the_first_token_stays() -> None:
    """However much later queries look at it."""
    q, k, v = inputs(50)
    q[0] = k[0, 0] * 100
    _, page = in_chunks(q, k, v, 5, 50, 1.0)
    assert 0 in page.positions.tolist()


def test_refuses_a_budget_without_room() -> None:
    with pytest.raises(ValueError, match="a budget must be at least 2 tokens, not 1"):
        poisoned_page(1, 1, 8, torch.float32)
