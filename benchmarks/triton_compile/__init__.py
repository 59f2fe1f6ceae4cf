"""The GPU kernels compiled ahead of time, for GPUs that are not here: `__main__.py`.

Names of what is compiled; nothing here imports Triton, which must be set up first.
"""

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300."""

HEAD_DIMS = (64, 128, 256)
DTYPES = ("float32", "bfloat16", "float16", "float8")
"""Of queries and of the cache; float8: bfloat16 queries and a float8_e4m3fn cache."""

DECODE, SPLIT, PREFILL, WRITE = "decode", "decode-split", "prefill", "write"
"""One query a request; the same with contexts in 16 parts; many queries; writing the cache."""

PHASES = (DECODE, SPLIT, PREFILL, WRITE)
