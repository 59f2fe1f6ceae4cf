"""The counting baselines: numbers worked out by hand, and probabilities that sum to 1."""

import math

import numpy as np
import pytest

from attnserve.evaluation.ngram import Trigram, Unigram, log_likelihood

TEXT = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 0])


def test_unigram_adds_one() -> None:
    probabilities = Unigram(TEXT, 5)(np.zeros((2, 5), dtype=int), np.arange(5))
    assert probabilities == pytest.approx(np.array([5, 4, 4, 2, 1]) / 16)


def test_trigram_by_hand() -> None:
    # Trigrams: 012 twice, and 120, 201, 013, 130, 301, 122, 220 once: D3 = 7 / (7 + 2 * 1).
    # Their distinct bigrams, with the number of distinct tokens before each:
    # 12: {0}, 20: {1, 2}, 01: {2, 3}, 13: {0}, 30: {1}, 22: {1}: D2 = 4 / (4 + 2 * 2).
    # Their distinct unigrams: 2: {1, 2}, 0: {2, 3}, 1: {0}, 3: {1}; add one over 6 + 5.
    model = Trigram(TEXT, 5)
    assert model.trigrams.discount == pytest.approx(7 / 9)
    assert model.bigrams.discount == pytest.approx(1 / 2)
    unigram_2 = (2 + 1) / (6 + 5)
    bigram_12 = (1 - 1 / 2 + 1 / 2 * 2 * unigram_2) / 2
    trigram_012 = (2 - 7 / 9 + 7 / 9 * 2 * bigram_12) / 3
    history = np.array([[0], [1]])
    assert model(history, np.array([2])) == pytest.approx(trigram_012)


@pytest.mark.parametrize("history", [(0, 1), (1, 2), (3, 3), (4, 0), (4, 4)])
def test_probabilities_sum_to_one(history: tuple[int, int]) -> None:
    columns = np.array(history)[:, None].repeat(5, axis=1)
    for model in (Unigram(TEXT, 5), Trigram(TEXT, 5)):
        probabilities = model(columns, np.arange(5))
        assert probabilities.sum() == pytest.approx(1)
        assert (probabilities > 0).all()


def test_log_likelihood_starts_with_the_token_before() -> None:
    model = Trigram(TEXT, 5)
    history = np.array([[2, 2], [2, 0]])
    expected = np.log(model(history, np.array([0, 1]))).sum()
    assert log_likelihood(model, np.array([0, 1]), before=2) == pytest.approx(expected)


def test_a_trigram_learns_what_a_unigram_cannot() -> None:
    text = np.tile([0, 1, 2, 3], 100)
    per_token = {
        model.__name__: math.exp(-log_likelihood(model(text, 4), text, 3) / len(text))
        for model in (Unigram, Trigram)
    }
    assert per_token["Unigram"] == pytest.approx(4)
    assert per_token["Trigram"] < 1.1
