"""Latencies of requests, and the levels of service that they must meet.

The levels are MLPerf Inference's for Llama 3.1 8B, in its interactive and its server scenario: a
load meets a level if the 99th percentiles of the time to first token and of the time per output
token are within the limits. Goodput is the rate of requests that are within both (DistServe, arXiv
2401.09670).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.launch.process import LaunchError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """Limits in ms."""

    name: str
    ttft_ms: float
    """Time to first token."""
    tpot_ms: float
    """Time per output token after the first."""

    def __str__(self) -> str:
        return f"{self.name}={self.ttft_ms:g}:{self.tpot_ms:g}"


LEVELS = [Level("interactive", 500, 30), Level("server", 2000, 100)]


def level(text: str) -> Level:
    """`NAME=ttft_ms:tpot_ms`, for argparse."""
    name, _, limits = text.partition("=")
    ttft, _, tpot = limits.partition(":")
    try:
        found = Level(name, float(ttft), float(tpot))
    except ValueError:
        found = Level("", 0, 0)
    if not name.isidentifier() or not (found.ttft_ms > 0 and found.tpot_ms > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not like interactive=500:30 (ms)")
    return found


@dataclass(frozen=True)
class Requests:
    """What one load gave."""

    seconds: float
    """From the first request to the last answer's end."""
    tokens: int
    """Of all answers."""
    ttft: Floats
    """`[requests]`, ms."""
    tpot: Floats
    """`[requests]`, ms; 0 where the answer is one token."""
    itl: Floats
    """`[events]`, ms between two events of a stream."""

    def good(self, level: Level) -> int:
        """How many requests are within a level's limits."""
        within = (self.ttft <= level.ttft_ms) & (self.tpot <= level.tpot_ms)
        return int(within.sum())


def read(path: Path) -> Requests:
    """What `vllm bench serve --save-result --save-detailed` has written.

    Raises:
        LaunchError: it has written nothing, or a request failed.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise LaunchError(f"vllm bench serve left no result: {error}") from None
    if found["failed"]:
        why = next(error for error in found["errors"] if error)
        reason = why.strip().splitlines()[-1]
        raise LaunchError(f"{found['failed']} of {found['num_prompts']} requests failed: {reason}")
    ttft, latency = np.array(found["ttfts"]), np.array(found["latencies"])
    later = np.array(found["output_lens"]) - 1
    tpot = np.where(later > 0, (latency - ttft) / np.maximum(later, 1), 0.0)
    itl = np.concatenate([np.array(gaps, dtype=float) for gaps in found["itls"]])
    tokens = found["total_output_tokens"]
    return Requests(found["duration"], tokens, ttft * 1000, tpot * 1000, itl * 1000)


def together(rounds: Sequence[Requests]) -> Requests:
    """All rounds as one, one after another."""
    return Requests(
        sum(each.seconds for each in rounds),
        sum(each.tokens for each in rounds),
        *(np.concatenate([getattr(r, name) for r in rounds]) for name in ("ttft", "tpot", "itl")),
    )


def meets(requests: Requests, level: Level) -> bool:
    """Whether the 99th percentiles are within the limits."""
    ttft, tpot = np.percentile(requests.ttft, 99), np.percentile(requests.tpot, 99)
    return bool(ttft <= level.ttft_ms and tpot <= level.tpot_ms)
