"""Selective attention (arXiv 2410.02703): softmax of scores less what earlier queries masked. The
penalties are in ../select.py."""

from attn_kernels.triton.variants.softmax import (
    UNIT_KEYS,
    finish,
    merge,
    query_factor,
    start,
    weigh,
)

__all__ = ["UNIT_KEYS", "finish", "merge", "query_factor", "start", "weigh"]
