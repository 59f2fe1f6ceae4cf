"""Tests of `attn_kernels`."""
