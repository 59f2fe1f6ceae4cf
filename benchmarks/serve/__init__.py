"""Throughput and latency of real servers under load."""
