"""Measurements of attnserve beside its peers; what they gave is in benchmarks/results."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
