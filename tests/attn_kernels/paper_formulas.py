"""The papers' formulas, one row at a time, as slow and as literal as they are printed.

Written apart from `attn_kernels` on purpose: nothing here is imported from it, nothing is shifted
by a maximum, and no formula is rearranged. Numbers are `decimal.Decimal` with 40 digits: its
exponent is unbounded, so `exp(700 * ln n)` needs no trick, and rounding is far below float64's.

A new variant needs one entry in `FORMULAS`; `test_formulas.py` fails until it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any

Vector = list[Decimal]
ZERO, ONE = Decimal(0), Decimal(1)


@dataclass
class Sequence:
    """One whole sequence: everything is a nested list `[head][token][element]` of Decimals."""

    q: list[list[Vector]]
    k: list[list[Vector]]
    v: list[list[Vector]]
    scale: Decimal
    window: int | None
    learned: Mapping[str, Vector]
    parameters: Mapping[str, Any]
    scores: dict[tuple[int, int, int], Decimal] = field(default_factory=dict)

    def kv_head(self, head: int) -> int:
        """Return the KV head: consecutive query heads share a key-value head."""
        return head // (len(self.q) // len(self.k))

    def visible(self, i: int) -> range:
        """Key positions that the query at position i sees."""
        first = 0 if self.window is None else max(0, i - self.window + 1)
        return range(first, i + 1)

    def n(self, i: int) -> int:
        """Return the papers' N_i."""
        return len(self.visible(i))

    def x(self, head: int, i: int, j: int) -> Decimal:
        """Return the raw score scale * q_i . k_j."""
        at = head, i, j
        if at not in self.scores:
            self.scores[at] = self.scale * dot(self.q[head][i], self.k[self.kv_head(head)][j])
        return self.scores[at]


def dot(a: Vector, b: Vector) -> Decimal:
    """Return a . b."""
    return sum((x * y for x, y in zip(a, b, strict=True)), ZERO)


def unit(a: Vector) -> Vector:
    """Return a / |a|, and 0 for the zero vector."""
    norm = dot(a, a).sqrt()
    return [x / norm for x in a] if norm else a


def shares(a: Vector) -> Vector:
    """Return a divided by its sum."""
    total = sum(a, ZERO)
    return [x / total for x in a]


def softmax(s: Sequence, head: int, i: int) -> Vector:
    """exp(x_ij) / sum_j exp(x_ij)"""
    return shares([s.x(head, i, j).exp() for j in s.visible(i)])


def softpick(s: Sequence, head: int, i: int) -> Vector:
    """relu(exp(x) - 1) / (sum |exp(x) - 1| + eps exp(m)), m the largest score (2504.20966)."""
    e = [s.x(head, i, j).exp() for j in s.visible(i)]
    total = sum((abs(y - 1) for y in e), ZERO) + Decimal(s.parameters["eps"]) * max(e)
    return [max(y - 1, ZERO) / total for y in e]


def ssmax(s: Sequence, head: int, i: int) -> Vector:
    """n^(s x_j) / sum_j n^(s x_j), as the paper prints it; the bias b adds exp(b x_j)."""
    n = Decimal(s.n(i))
    fixed = s.parameters["scale"]
    scale = s.learned["ssmax_scale"][head] if fixed is None else Decimal(fixed)
    bias = s.learned["ssmax_bias"][head] if s.parameters["bias"] else ZERO
    x = [s.x(head, i, j) for j in s.visible(i)]
    return shares([n ** (scale * y) * (bias * y).exp() for y in x])


def lssa(s: Sequence, head: int, i: int) -> Vector:
    """softplus(ln d ln N_i q^_i . k^_j), divided by its sum (2501.13428)."""
    q = s.q[head][i]
    factor = Decimal(len(q)).ln() * Decimal(s.n(i)).ln()
    keys = s.k[s.kv_head(head)]
    return shares([(1 + (factor * dot(unit(q), unit(keys[j]))).exp()).ln() for j in s.visible(i)])


def lssar(s: Sequence, head: int, i: int) -> Vector:
    """relu(w_ij N_i - O)^p, divided by its sum; O is 1, and 0 for the first three rows.

    Where every w_ij N_i is 1 the paper has 0/0; we say uniform.
    """
    w, n = lssa(s, head, i), s.n(i)
    offset = ZERO if n <= 3 else ONE
    above = [y * n - offset for y in w]
    if max(above) < Decimal("1e-30"):
        return [ONE / n for _ in w]
    return shares([max(y, ZERO) ** Decimal(s.parameters["power"]) for y in above])


def selective_penalty(s: Sequence, i: int, j: int) -> Decimal:
    """F_ij: what head 0's queries between j and i have taken from key j (2410.02703)."""
    total = ZERO
    if j > 0:
        for k in range(j + 1, i):
            if j in s.visible(k):
                total += max(s.x(0, k, j), ZERO)
    return total


def selective(s: Sequence, head: int, i: int) -> Vector:
    """exp(x_ij - F_ij) / sum_j exp(x_ij - F_ij)"""
    return shares([(s.x(head, i, j) - selective_penalty(s, i, j)).exp() for j in s.visible(i)])


def softmax1(s: Sequence, head: int, i: int) -> Vector:
    """exp(x_ij) / (1 + sum_j exp(x_ij)) (Miller, Attention Is Off By One)"""
    e = [s.x(head, i, j).exp() for j in s.visible(i)]
    return [y / (ONE + sum(e, ZERO)) for y in e]


def sinks(s: Sequence, head: int, i: int) -> Vector:
    """Softmax of the scores and the head's sink, whose own weight is dropped (gpt-oss)."""
    scores = [s.x(head, i, j) for j in s.visible(i)]
    return shares([y.exp() for y in [*scores, s.learned["sinks"][head]]])[:-1]


def sigmoid(s: Sequence, head: int, i: int) -> Vector:
    """1 / (1 + exp(-(x_ij + b))), b = -ln N_i unless given (2409.04431)"""
    given = s.parameters["bias"]
    bias = -Decimal(s.n(i)).ln() if given is None else Decimal(given)
    return [ONE / (ONE + (-(s.x(head, i, j) + bias)).exp()) for j in s.visible(i)]


@dataclass(frozen=True)
class Entry:
    """A variant's row formula and what its rows add up to (None: anything)."""

    weights: Callable[[Sequence, int, int], Vector]
    row_sum: str | None = "one"


FORMULAS: dict[str, Entry] = {
    "softmax": Entry(softmax),
    "softpick": Entry(softpick, row_sum="at most one"),
    "ssmax": Entry(ssmax),
    "lssa": Entry(lssa),
    "lssar": Entry(lssar),
    "selective": Entry(selective),
    "softmax1": Entry(softmax1, row_sum="at most one"),
    "sinks": Entry(sinks, row_sum="at most one"),
    "sigmoid": Entry(sigmoid, row_sum=None),
}


def entry(name: str) -> Entry:
    """Return the variant's entry.

    Raises:
        AssertionError: a registered variant has none; the message says where to add it.
    """
    assert name in FORMULAS, (
        f"variant {name!r} has no paper formula: write its paper's row formula in "
        "tests/attn_kernels/paper_formulas.py and name it in FORMULAS"
    )
    return FORMULAS[name]


def decimals(nested: Any) -> Any:
    """Return the exact Decimals of a nested list of floats."""
    return [decimals(x) for x in nested] if isinstance(nested, list) else Decimal(nested)


def attention(
    name: str,
    parameters: Mapping[str, Any],
    q: list[Any],
    k: list[Any],
    v: list[Any],
    *,
    rows: range,
    scale: float,
    window: int | None = None,
    learned: Mapping[str, list[float]] | None = None,
) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
    """Weights `[head][row][key]` over all keys and outputs `[head][row][element]`.

    q, k and v hold the whole sequence from position 0, because earlier queries may matter.
    """
    weights_of = entry(name).weights
    with localcontext() as context:
        context.prec = 40
        s = Sequence(
            q=decimals(q),
            k=decimals(k),
            v=decimals(v),
            scale=Decimal(scale),
            window=window,
            learned={key: decimals(value) for key, value in (learned or {}).items()},
            parameters=parameters,
        )
        weights, outputs = [], []
        for head in range(len(q)):
            values = s.v[s.kv_head(head)]
            head_weights, head_outputs = [], []
            for i in rows:
                row = [ZERO] * len(values)
                for j, weight in zip(s.visible(i), weights_of(s, head, i), strict=True):
                    row[j] = weight
                head_weights.append([float(w) for w in row])
                columns = zip(*values, strict=True)
                head_outputs.append([float(dot(row, list(column))) for column in columns])
            weights.append(head_weights)
            outputs.append(head_outputs)
    return weights, outputs


def penalties(q: list[Any], k: list[Any], *, scale: float, window: int | None) -> list[list[float]]:
    """Return selective attention's F `[query][key]` for a whole sequence, 0 above the diagonal."""
    with localcontext() as context:
        context.prec = 40
        s = Sequence(decimals(q), decimals(k), [], Decimal(scale), window, {}, {})
        length = len(q[0])
        return [
            [float(selective_penalty(s, i, j)) if j <= i else 0.0 for j in range(length)]
            for i in range(length)
        ]
