"""The page: one HTML file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.look.maps import SINK, Maps
from attnserve.reports import templates

TEMPLATES = Path(__file__).parent / "templates"
UNITS = {
    "first token": "mean weight of the first token; a head above 0.3 has a sink",
    "zeros": "share of the tokens up to the query's own whose weight is exactly 0",
    "entropy": "mean entropy of a query's weights, nats",
    "sum": "mean sum of a query's weights; softmax's is 1",
}


def page(looked: Sequence[Maps], words: Sequence[str], budgets: Sequence[int], text: str) -> str:
    """Return the page of one or two checkpoints' maps on the same tokens.

    Args:
        looked: the maps.
        words: the tokens as people read them, `[n]`.
        budgets: tokens a layer keeps, for checkpoints with accumulators.
        text: where the tokens come from.
    """
    return (
        templates(TEMPLATES)
        .get_template("look.html")
        .render(
            looked=looked,
            words=words,
            text=text,
            units=UNITS,
            sink=SINK,
            data={
                "words": list(words),
                "units": UNITS,
                "models": [_data(each, budgets) for each in looked],
            },
        )
    )


def words_of(checkpoint: Checkpoint, tokens: Sequence[int]) -> list[str]:
    """Return each token as text; one that is no whole character as the tokenizer names it."""
    tokenizer = checkpoint.tokenizer
    names = tokenizer.convert_ids_to_tokens(list(tokens))
    texts = [tokenizer.decode([token]) for token in tokens]
    return [
        name if not text or "\ufffd" in text else text
        for name, text in zip(names, texts, strict=True)
    ]


def _data(looked: Maps, budgets: Sequence[int]) -> dict[str, Any]:
    """Return what the page's script reads of a checkpoint."""
    layers, heads = looked.weights.shape[:2]
    n = looked.weights.shape[-1]
    rows, columns = torch.tril_indices(n, n)
    found: dict[str, Any] = {
        "name": looked.name,
        "layers": layers,
        "heads": heads,
        "figures": {name: values.round(4).tolist() for name, values in looked.figures.items()},
        "weights": _packed(looked.weights[..., rows, columns]),
        "penalties": None,
        "dropped": {},
    }
    if looked.penalties is not None:
        found["penalties"] = _packed(looked.penalties[..., rows, columns])
        if not looked.kv_budgets:  # else the weights show what is left
            found["dropped"] = {
                f"{budget} tokens a layer": looked.dropped(budget).tolist() for budget in budgets
            }
    return found


def _packed(values: Tensor) -> str:
    """Return float32 numbers, at least 0, as base64 of bfloat16, little-endian, in the order of the
    tensor: exact zeros stay zeros and nothing else becomes one; others keep 8 significant bits."""
    least = torch.finfo(torch.float32).tiny
    narrow = (
        values.clamp(min=least)
        .where(values != 0, 0.0)
        .bfloat16()
        .contiguous()
        .view(torch.int16)
        .numpy()
        .astype("<i2")
    )
    return base64.b64encode(np.ascontiguousarray(narrow).tobytes()).decode()
