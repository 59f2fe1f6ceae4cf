"""All tests. Folders here are packages, so that files of the same name in two of them can coexist.

This file must stay: without it pytest would import `tests/attn_kernels` as `attn_kernels`.
"""
