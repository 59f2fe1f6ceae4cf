"""Paged attention for GPUs: one family of Triton kernels, each variant a few functions in
the `kernel.py` of its folder."""

from attn_kernels.triton.layer import TritonLayer, TritonPrunedLayer
from attn_kernels.triton.variant import functions

__all__ = ["TritonLayer", "TritonPrunedLayer", "functions"]
