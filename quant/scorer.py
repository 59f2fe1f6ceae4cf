"""Scores of a model, and how far its predictions are from the unquantized model's.

The unquantized model's log-probabilities of every token are kept in files, since all configs of a
checkpoint are compared with the same ones.
"""

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.perplexity import Perplexity
from attnserve.evaluation.scorers import Item, Scored, TransformersScorer


class Recorder:
    """Writes a model's log-probabilities in float16, and its likeliest tokens, whole or not at
    all: they are in the folder after `finish`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / ".gitignore").write_text("*\n")
        self.staged = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir()

    def see(self, text: str, index: int, logprobs: Tensor, tokens: Tensor) -> None:
        """Write log-probabilities `[tokens, vocab_size]` of a text's sequence."""
        best = logprobs.argmax(-1).numpy()
        file = self.staged / f"{text}.{index}.npz"
        np.savez(file, logprobs=logprobs.half().numpy(), best=best)

    def finish(self) -> None:
        """Put the folder in its place; if another process was first, its own is as good."""
        try:
            self.staged.rename(self.folder)
        except OSError:
            shutil.rmtree(self.staged)


class KLComparison:
    """Kullback-Leibler divergence from the unquantized model, agreement on the likeliest token, and
    the change of the right token's probability: what llama.cpp's perplexity tool reports.

    Float16 moves a log-probability by a thousandth of its size at most; the distributions are
    normalised again, so that a divergence is never below 0. Of a model from its own record it is
    about 1e-7 nats.

    Args:
        folder: what a `Recorder` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.divergence: dict[str, dict[int, NDArray[np.float64]]] = defaultdict(dict)
        self.agreement: dict[str, dict[int, float]] = defaultdict(dict)
        self.change: dict[str, dict[int, NDArray[np.float64]]] = defaultdict(dict)

    def see(self, text: str, index: int, logprobs: Tensor, tokens: Tensor) -> None:
        """Compare log-probabilities `[tokens, vocab_size]` of a text's sequence, and its tokens."""
        with np.load(self.folder / f"{text}.{index}.npz") as record:
            reference = torch.from_numpy(record["logprobs"]).float().log_softmax(-1)
            best = torch.from_numpy(record["best"])
        each = (reference.exp() * (reference - logprobs)).sum(-1)
        self.divergence[text][index] = each.double().numpy()
        self.agreement[text][index] = float((logprobs.argmax(-1) == best).double().mean())
        after, before = (p.gather(-1, tokens[:, None]).exp()[:, 0] for p in (logprobs, reference))
        self.change[text][index] = (after - before).double().numpy()

    def sequences(self) -> dict[str, list[float]]:
        """Return the mean divergence of each sequence in nats a token, by text."""
        return {
            text: [float(f"{each[index].mean():.6g}") for index in sorted(each)]
            for text, each in self.divergence.items()
        }

    def finish(self) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """Return means over sequences (nats per token, shares, and changes of probability; RMS:
        root of the mean square), and the spread over tokens of each text's divergence and of the
        right token's change of probability."""
        summary = {}
        for text, each in self.divergence.items():
            summary[f"{text} KL"] = mean_interval([values.mean() for values in each.values()])
            shares = mean_interval(list(self.agreement[text].values()))
            summary[f"{text} top-1"] = shares.within(0.0, 1.0)
            changes = list(self.change[text].values())
            summary[f"{text} p change"] = mean_interval([values.mean() for values in changes])
            squares = mean_interval([(values**2).mean() for values in changes])
            root = squares.within(0.0, math.inf)
            summary[f"{text} p change, RMS"] = Estimate(*(x**0.5 for x in root))
        return summary, {
            "KL over tokens": {
                text: quantiles(each, DIVERGENCES) for text, each in self.divergence.items()
            },
            "p change over tokens": {
                text: quantiles(each, CHANGES) for text, each in self.change.items()
            },
        }


DIVERGENCES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999, "largest": 1.0}
CHANGES = {"1 %": 0.01, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99}


def quantiles(
    each: Mapping[int, NDArray[np.float64]], wanted: Mapping[str, float]
) -> dict[str, float]:
    """Return named quantiles over the tokens of all sequences."""
    tokens = np.concatenate(list(each.values()))
    return {name: float(np.quantile(tokens, share)) for name, share in wanted.items()}


class WatchedScorer(TransformersScorer):
    """Scores with a float32 model that is there already; a watcher sees what `Perplexity`
    scores."""

    def __init__(self, model: PreTrainedModel, watcher: Recorder | KLComparison) -> None:
        # Not TransformersScorer's, which loads a model and makes it attend in tiles, without cache.
        self.model, self.watcher, self.quiet, self.device = model, watcher, True, "cpu"
        self._text = ""
        self._index: dict[int, int] = {}

    def score(self, items: Sequence[Item], label: str) -> list[Scored]:
        measure, _, text = label.partition(", ")
        self._text = text if measure == Perplexity.name else ""
        self._index = {id(item): index for index, item in enumerate(items)}
        return super().score(items, label)

    def _scored(self, logprobs: Tensor, item: Item) -> Scored:
        if self._text:
            tokens = torch.tensor(item.continuation)
            self.watcher.see(self._text, self._index[id(item)], logprobs, tokens)
        return super()._scored(logprobs, item)
