"""Loss by position in long texts, through vLLM: windows of the texts, kept in a CSV."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from attn_kernels import variant_from_config
from attnserve import machine
from attnserve.errors import UserError
from attnserve.evaluation import texts
from attnserve.evaluation.checkpoint import Checkpoint, read_config
from attnserve.evaluation.scorers import Item
from attnserve.evaluation.vllm_scorer import VLLMScorer
from attnserve.files import write_text
from training.conversion import read_record, trained_length

FIRST_BIN, WIDEST_BIN = 64, 2048
KEYS = ["text", "start"]
"""Columns that tell one window from another."""


def edges(length: int) -> list[int]:
    """Return 0, 64, 128, 256 ... 2048, then every 2048, and `length` at the end."""
    doubling = [FIRST_BIN << k for k in range(20) if FIRST_BIN << k < min(length, WIDEST_BIN)]
    return [0, *doubling, *range(WIDEST_BIN, length, WIDEST_BIN), length]


def fingerprint(checkpoint: Path) -> str:
    """Return a hash of a checkpoint's configuration and weights."""
    digest = hashlib.sha256()
    for file in (checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def describe(checkpoint: Path) -> dict[str, Any]:
    """Return the columns that say which model a row is of."""
    config = read_config(checkpoint)
    variant = variant_from_config(config)
    made = read_record(checkpoint)
    tuned = (made if "finetuning" in made else made.get("source_conversion") or {}).get(
        "finetuning", {}
    )
    names = ("train", "steps", "sequence", "batch", "learning_rate", "precision", "seed", "data")
    return {
        "model": checkpoint.name,
        "fingerprint": fingerprint(checkpoint),
        "variant": variant.name if variant else "softmax",
        "rope_theta": config.rope_parameters["rope_theta"],
        "train_length": trained_length(checkpoint, config),
        "finetuning": " ".join(f"{name}={tuned[name]}" for name in names if name in tuned),
    }


def read(csv: Path) -> pd.DataFrame:
    """Return the table so far; empty if there is none."""
    return pd.read_csv(csv, keep_default_na=False) if csv.exists() else pd.DataFrame()


def measure(
    folder: Path,
    files: Sequence[Path],
    csv: Path,
    *,
    length: int,
    windows: int,
    spacing: int,
    dtype: str,
) -> None:
    """Measure what the table lacks of one checkpoint: windows of `length` predicted tokens, so many
    in all, `spacing` tokens from the beginning of one to the next; the texts take turns."""
    model = describe(folder) | {"dtype": dtype}
    old = read(csv)
    if len(old):
        old = old[(old["model"] == model["model"]) & (old["dtype"] == dtype)]
        if (old["fingerprint"] != model["fingerprint"]).any():
            raise UserError(
                f"{csv} has rows of another checkpoint called {model['model']}: rename one"
            )
    checkpoint = Checkpoint(folder)
    tokens = {file.name: checkpoint.encode(texts.read(file)) for file in files}
    starts = [
        (start, text)
        for text, content in tokens.items()
        for start in range(0, len(content) - length + 1, spacing)
    ]
    if not starts:
        raise UserError(f"no text has {length} tokens: name longer ones or less --length")
    chosen = sorted(starts, key=lambda place: place[0])[:windows]
    have = old.groupby(KEYS)["seen_to"].max().to_dict() if len(old) else {}
    missing = [(t, start) for start, t in chosen if have.get((t, start), 0) < length]
    if not missing:
        return
    with closing(VLLMScorer(folder, length + 1, dtype, quiet=True)) as scorer:
        for text, start in tqdm(missing, desc=folder.name, unit="window"):
            window = tokens[text][start : start + length]
            (scored,) = scorer.score([Item([checkpoint.bos], window)], text)
            losses = -scored.logprobs
            place = {"text": text, "start": start}
            rows = [
                {**model, **place, "seen_from": a + 1, "seen_to": b, "loss": losses[a:b].mean()}
                for a, b in pairwise(edges(length))
                if a >= have.get((text, start), 0)
            ]
            about = machine.described()
            del about["load_average"]
            table = pd.concat([read(csv), pd.DataFrame([row | about for row in rows])])
            write_text(csv, table.to_csv(index=False, lineterminator="\n"))


def octaves(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean loss of every model, window and doubling of the position: `model, octave,
    *KEYS, loss`; `octave` is the greatest number of tokens seen before."""
    rows = table.assign(
        tokens=table["seen_to"] - table["seen_from"] + 1,
        octave=2 ** np.ceil(np.log2(table["seen_to"])).astype(int),
    )
    rows["sum"] = rows["loss"] * rows["tokens"]
    sums = rows.groupby(["model", "octave", *KEYS], sort=False)[["sum", "tokens"]].sum()
    return (sums["sum"] / sums["tokens"]).rename("loss").reset_index()


def against(rows: pd.DataFrame, place: str, baseline: str) -> pd.DataFrame:
    """Return mean loss and its change from the baseline's in the windows that both have read, with
    standard errors over windows.

    Args:
        rows: `model, place, *KEYS, loss`.
        place: the column that says where in a window.
        baseline: the model that all are compared with.

    Returns:
        `model, place, windows, loss, loss_error, change, change_error`.
    """
    base = rows[rows["model"] == baseline].set_index([place, *KEYS])["loss"].rename("base")
    joined = rows.join(base, on=[place, *KEYS])
    joined["change"] = joined["loss"] - joined["base"]
    groups = joined.groupby(["model", place], sort=False)
    return groups.agg(
        windows=("loss", "count"),
        loss=("loss", "mean"),
        loss_error=("loss", "sem"),
        change=("change", "mean"),
        change_error=("change", "sem"),
    ).reset_index()


def text_table(summary: pd.DataFrame, baseline: str) -> str:
    """Return one line for each model and octave."""

    def cell(value: float, error: float) -> str:
        return "-" if np.isnan(value) else f"{value:.3f} +- {error:.3f}"

    lines = [
        {
            "model": row.model,
            "tokens seen": f"{1 if row.octave == FIRST_BIN else row.octave // 2 + 1}-{row.octave}",
            "windows": row.windows,
            "nats per token": cell(row.loss, row.loss_error),
            f"against {baseline}": cell(row.change, row.change_error),
        }
        for row in summary.itertuples()
    ]
    return pd.DataFrame(lines).to_string(index=False)
