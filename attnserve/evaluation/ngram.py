"""Token models that count, to compare trained models with: what any model should beat."""

import numpy as np
from numpy.typing import NDArray

from attnserve.evaluation.texts import Tokens

Probabilities = NDArray[np.float64]


class Unigram:
    """`p(w) = (count(w) + 1) / (num_tokens + vocab_size)`."""

    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        counts = np.bincount(tokens, minlength=vocab_size) + 1.0
        self.probabilities = counts / counts.sum()

    def __call__(self, history: Tokens, tokens: Tokens) -> Probabilities:
        """Probability of each of `tokens`; `history [2, num_tokens]` is not used."""
        return self.probabilities[tokens]


class Trigram:
    """Interpolated Kneser-Ney: absolute discounting, and continuation counts below the trigrams.

    Every token of the vocabulary gets some probability after any history.
    """

    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        trigrams, counts = np.unique(
            self._join(tokens[:-2], tokens[1:-1], tokens[2:]), return_counts=True
        )
        # A bigram counts once for each distinct token before it, a unigram likewise.
        bigrams, continuations = np.unique(trigrams % vocab_size**2, return_counts=True)
        unigrams = np.bincount(bigrams % vocab_size, minlength=vocab_size)
        self.trigrams = _Discounted(trigrams, counts, vocab_size)
        self.bigrams = _Discounted(bigrams, continuations, vocab_size)
        self.unigrams = (unigrams + 1.0) / (unigrams.sum() + vocab_size)

    def _join(self, *columns: Tokens) -> Tokens:
        code = columns[0]
        for column in columns[1:]:
            code = code * self.vocab_size + column
        return code

    def __call__(self, history: Tokens, tokens: Tokens) -> Probabilities:
        """Probability of each of `tokens` after the two tokens before it.

        Args:
            history: `[2, num_tokens]`, the second-last and the last token before each.
            tokens: `[num_tokens]`.
        """
        lower = self.bigrams(self._join(history[1], tokens), self.unigrams[tokens])
        return self.trigrams(self._join(history[0], history[1], tokens), lower)


class _Discounted:
    """`max(c(h, w) - D, 0) / c(h) + D * distinct(h) / c(h) * lower(w)` for sorted n-gram codes."""

    def __init__(self, codes: Tokens, counts: Tokens, vocab_size: int) -> None:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.codes, self.counts, self.vocab_size = codes, counts, vocab_size
        self.histories, first = np.unique(codes // vocab_size, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.distinct = np.diff(np.append(first, len(codes)))

    def __call__(self, codes: Tokens, lower: Probabilities) -> Probabilities:
        count = _look_up(self.codes, self.counts, codes)
        total = _look_up(self.histories, self.totals, codes // self.vocab_size)
        distinct = _look_up(self.histories, self.distinct, codes // self.vocab_size)
        seen = total > 0
        probability = np.maximum(count - self.discount, 0) + self.discount * distinct * lower
        return np.where(seen, probability / np.where(seen, total, 1), lower)


def _look_up(keys: Tokens, values: Tokens, wanted: Tokens) -> Tokens:
    """`values` at `wanted` in the sorted `keys`, 0 where it is not among them."""
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


def log_likelihood(model: Unigram | Trigram, tokens: Tokens, before: int) -> float:
    """Sum of natural logarithms over `tokens`; the token `before` stands twice in front of them."""
    padded = np.concatenate(([before, before], tokens))
    return float(np.log(model(np.stack((padded[:-2], padded[1:-1])), tokens)).sum())
