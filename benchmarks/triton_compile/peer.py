"""vLLM's own Triton kernel, launched by vLLM's own code, with its tile or with ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends import backends

from benchmarks.triton_compile import SPLIT
from benchmarks.triton_compile.dry import Compiled, DryCompiler
from benchmarks.triton_compile.matrix import (
    NUM_HEADS,
    TENSORS,
    Case,
    batch,
    cache,
)

SEGMENTS = 16
"""Parts of a context, vLLM's number and ours here."""


class Vllm:
    """vLLM's module, imported although vLLM sees no GPU."""

    def __init__(self) -> None:
        # vLLM's CPU build hides Triton unless it has a backend of this name; only that is asked.
        hidden = "cpu" not in backends
        if hidden:
            backends["cpu"] = SimpleNamespace(driver=None)
        try:
            from vllm.v1.attention.ops import triton_unified_attention as module
        finally:
            if hidden:
                del backends["cpu"]
        self.module: Any = module
        self.kernel: Any = module.kernel_unified_attention

    def compile(
        self, compiler: DryCompiler, case: Case, ours: Compiled | None = None
    ) -> list[Compiled]:
        """Compile what vLLM launches for the case's batch, softmax whatever the variant.

        Args:
            ours: compile vLLM's kernel with this one's tile, warps and stages; None: vLLM's choice.

        Raises:
            Exception: what Triton raises for a kernel that it cannot compile.
        """
        dtype, _ = TENSORS[case.dtype]
        step, dim = batch(case.phase), case.head_dim
        tokens = int(step.query_start_loc[-1])
        query = torch.empty(tokens, NUM_HEADS, dim, dtype=dtype)
        # As vLLM's backend TRITON_ATTN takes its cache apart.
        keys, values = cache(dim, dtype).transpose(1, 2).split(dim, dim=-1)
        descale = torch.ones(1).expand(step.seq_lens.shape[0], keys.shape[2])
        parts: dict[str, Any] = {}
        if case.phase == SPLIT:
            rows = (tokens, NUM_HEADS, SEGMENTS)
            parts = {
                "seq_threshold_3D": tokens,
                "num_par_softmax_segments": SEGMENTS,
                "softmax_segm_output": torch.empty(*rows, dim),
                "softmax_segm_max": torch.empty(rows),
                "softmax_segm_expsum": torch.empty(rows),
            }
        module, platform = self.module, self.module.current_platform
        module.kernel_unified_attention = (
            self.kernel if ours is None else Retiled(self.kernel, ours)
        )
        family = case.arch.removeprefix("sm_")
        # What vLLM asks of the GPU when it chooses its tile.
        module.current_platform = SimpleNamespace(
            fp8_dtype=platform.fp8_dtype,
            is_device_capability_family=lambda wanted: family == str(wanted),
        )
        try:
            with compiler.target(case.arch) as found:
                module.unified_attention(
                    q=query,
                    k=keys,
                    v=values,
                    out=torch.empty_like(query),
                    cu_seqlens_q=step.query_start_loc,
                    max_seqlen_q=step.max_query_len,
                    seqused_k=step.seq_lens,
                    max_seqlen_k=step.max_seq_len,
                    softmax_scale=dim**-0.5,
                    causal=True,
                    window_size=(-1, -1),
                    block_table=step.block_table,
                    softcap=0.0,
                    q_descale=None,
                    k_descale=descale,
                    v_descale=descale,
                    **parts,
                )
        finally:
            module.current_platform = platform
            module.kernel_unified_attention = self.kernel
        return [kernel for kernel in found if kernel.kernel == self.kernel.__name__]


class Retiled:
    """vLLM's kernel launched with another tile.

    Args:
        kernel: it.
        ours: whose tile.
    """

    def __init__(self, kernel: Any, ours: Compiled) -> None:
        self.kernel, self.ours = kernel, ours

    def __getitem__(self, grid: Any) -> Any:
        constants = self.ours.constants
        tile = {
            "BLOCK_M": constants["ROWS"],
            "BLOCK_Q": constants["ROWS"] // constants["GROUP"],
            "TILE_SIZE": constants["KEYS"],
            "num_warps": self.ours.num_warps,
            "num_stages": self.ours.num_stages,
        }
        return lambda **arguments: self.kernel[grid](**{**arguments, **tile})
