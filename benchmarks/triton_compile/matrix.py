"""What is compiled: our layer called as a server calls it, for each variant, phase and type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from attn_kernels import get_variant
from attn_kernels.batch import Batch
from attn_kernels.paged import STATE_BYTES
from attn_kernels.triton import TritonLayer
from benchmarks.triton_compile import DECODE, PHASES, PREFILL, SPLIT, WRITE
from benchmarks.triton_compile.dry import Compiled, DryCompiler

TENSORS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float8": (torch.bfloat16, torch.float8_e4m3fn),
}
"""Types of queries and of the cache."""

FLOAT8_ARCHS = ("sm_90", "sm_100")
"""Which convert it; Triton refuses it for sm_80, and CDNA3's format is another."""

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, CONTEXT, REQUESTS = 32, 8, 16, 4096, 3
PROCESSORS = {DECODE: 1, SPLIT: 132, PREFILL: 1}
"""1 takes no parts; 132 with 3 requests of 8 KV heads takes 16."""

CACHE_BYTES = 2**31 + 2**24
"""A served cache has more than 2 GiB, and AMD's code for smaller ones is another. Never touched."""


@dataclass(frozen=True, order=True)
class Case:
    """One call of a layer, which launches one kernel or several."""

    arch: str
    head_dim: int
    dtype: str
    variant: str
    phase: str

    def __str__(self) -> str:
        return f"{self.arch} D{self.head_dim} {self.dtype} {self.variant} {self.phase}"


def cases(
    archs: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str], variants: Sequence[str]
) -> Iterator[Case]:
    """The matrix. Writing differs between variants only by whether they have accumulators."""
    for arch in archs:
        for head_dim in head_dims:
            for dtype in dtypes:
                if dtype == "float8" and arch not in FLOAT8_ARCHS:
                    continue
                written = set()
                for variant in variants:
                    for phase in PHASES:
                        stateful = get_variant(variant).stateful
                        if phase == WRITE and stateful in written:
                            continue
                        if phase == WRITE:
                            written.add(stateful)
                        yield Case(arch, head_dim, dtype, variant, phase)


def batch(phase: str) -> Batch:
    """REQUESTS requests of CONTEXT tokens, the last of each, or the last 100, being new."""
    queries = 100 if phase == PREFILL else 1
    return Batch(
        torch.zeros(REQUESTS, CONTEXT // BLOCK_SIZE, dtype=torch.int32),
        torch.arange(REQUESTS + 1) * queries,
        torch.full((REQUESTS,), CONTEXT),
        max_query_len=queries,
        max_seq_len=CONTEXT,
    )


def cache(head_dim: int, dtype: torch.dtype, extra_bytes: int = 0) -> torch.Tensor:
    """`[num_blocks, num_kv_heads, block_size, content]`, as vLLM's and ours."""
    shape = (NUM_KV_HEADS, BLOCK_SIZE, 2 * head_dim + extra_bytes // dtype.itemsize)
    block = torch.Size(shape).numel() * dtype.itemsize
    return torch.empty(CACHE_BYTES // block, *shape, dtype=dtype)


def compile_case(compiler: DryCompiler, case: Case) -> list[Compiled]:
    """Compile what the case launches.

    Raises:
        Exception: what Triton raises for a kernel that it cannot compile.
    """
    variant = get_variant(case.variant)
    query_dtype, cache_dtype = TENSORS[case.dtype]
    scale = torch.ones(1)
    layer = TritonLayer(
        variant,
        cache(case.head_dim, cache_dtype, STATE_BYTES if variant.stateful else 0),
        num_heads=NUM_HEADS,
        scale=case.head_dim**-0.5,
        learned={name: torch.ones(NUM_HEADS) for name in variant.learned},
        key_scale=scale,
        value_scale=scale,
        arch=case.arch,
    )
    with compiler.target(case.arch) as found:
        if case.phase == WRITE:
            new = torch.empty(REQUESTS, NUM_KV_HEADS, case.head_dim, dtype=query_dtype)
            layer.write_cache(new, new, torch.arange(REQUESTS))
        else:
            layer.num_processors = PROCESSORS[case.phase]
            step = batch(case.phase)
            tokens = int(step.query_start_loc[-1])
            query = torch.empty(tokens, NUM_HEADS, case.head_dim, dtype=query_dtype)
            layer.attend(query, step, torch.empty_like(query))
    return found
