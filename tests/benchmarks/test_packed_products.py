"""`python -m benchmarks.packed_products`: what it counts, and the bytes of packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import packed_products
from benchmarks.checkpoints import packed_name, weight_bytes


def test_bytes_of_weights(folder: Path) -> None:
    source, packed = folder / "softmax", folder / "w4"
    layer = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256
    norms = (2 * 3 + 1) * 128
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    embeddings = vocabulary * 128
    assert weight_bytes(source, "bfloat16") == 2 * (3 * layer + embeddings + norms)
    assert weight_bytes(source, "float32") == 4 * (3 * layer + embeddings + norms)
    # A scale of two bytes and a zero point of one in each group of 64.
    expected = 3 * layer * (4 / 8 + 3 / 64) + embeddings * (1 + 3 / 64) + 2 * norms
    assert weight_bytes(packed, "bfloat16") == expected
    assert packed_name(packed) == "w4-g64-e8"


def test_products() -> None:
    """Rows of one step of products: ratios are to torch in the same round."""
    times = {"float32": [4.0, 2.0, 2.0], "bfloat16": [2.0, 2.0, 2.0], "w4": [1.0, 1.0, 2.0]}
    row = packed_products.rows_of(times)[2]
    assert (row["weights"], row["ms_median"]) == ("w4", 1000.0)
    assert (row["x_float32_median"], row["x_bfloat16_median"]) == (2.0, 2.0)
    assert packed_products.packed((40, 64), 4)(torch.ones(2, 64)).shape == (2, 40)
