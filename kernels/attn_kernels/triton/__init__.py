"""Paged attention for GPUs: one family of Triton kernels, each variant a few functions in
`variants/<name>.py`."""

from attn_kernels.triton.layer import TritonLayer, TritonPrunedLayer, functions, takes_soft_cap

__all__ = ["TritonLayer", "TritonPrunedLayer", "functions", "takes_soft_cap"]
