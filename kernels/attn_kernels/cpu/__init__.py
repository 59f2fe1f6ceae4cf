"""Paged attention for CPUs: one C++ template, each variant a small struct in the
`kernel.hpp` of its folder.

`load(variant)` builds (once) and loads a variant's kernels. The torch operations of
`attn_kernels.paged` are the fallback where that is impossible, correct and slow.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

from attn_kernels.cpu.build import (
    BuildError,
    best,
    build_library,
    chosen_isas,
    header_of,
    usable_isas,
)
from attn_kernels.cpu.kernel import CPUKernel, CPULayer, PrunedCPULayer
from attn_kernels.kv_quant import KVFormat
from attn_kernels.paged import Layer, TorchLayer, head_size_of
from attn_kernels.variant import Variant

__all__ = ["BuildError", "CPUKernel", "CPULayer", "PrunedCPULayer", "bind", "load", "usable_isas"]

logger = logging.getLogger(__name__)


def load(variant: Variant, isa: str | None = None, *, quantized: bool = False) -> CPUKernel | None:
    """Return the kernels of `variant`, built if need be (some seconds, once a machine).

    Args:
        variant: the attention function; its C++ struct has the name of its class.
        isa: one of `usable_isas()`; `$ATTNSERVE_CPU_ISA`, else the best, if None.
        quantized: those for quantized caches (`kv_quant`).

    Returns:
        None, after one warning that says why, if it has no C++ kernel or nothing can be built:
        serve it with the torch operations of `attn_kernels.paged`.

    Raises:
        ValueError: this processor lacks the instruction set.
    """
    return _load(variant, chosen_isas(isa), quantized)


@functools.cache
def _load(variant: Variant, isas: tuple[str, ...], quantized: bool) -> CPUKernel | None:
    """Return the kernels for the first of `isas` that the compiler knows."""

    header = header_of(variant)

    def kernel_for(isa: str) -> CPUKernel:
        assert header is not None
        library = build_library(header, type(variant).__name__, isa, quantized)
        return CPUKernel(variant, library, isa, quantized)

    if header is None:
        _warn(variant.name, f"it has no C++ kernel ({variant.folder() / 'kernel.hpp'})")
        return None
    kernel, why = best(f"{variant.name} attention", isas, kernel_for)
    if kernel is None:
        _warn(variant.name, why)
    return kernel


@functools.cache
def _warn(name: str, why: str) -> None:
    """Warn, once for each reason: there are many layers."""
    logger.warning(
        "attnserve: %s attention runs in torch operations, many times slower than CPU kernels: %s",
        name,
        why,
    )


def bind(variant: Variant, kv_cache: Tensor, **options: Any) -> Layer:
    """Bind one layer's cache to the kernels or, where they cannot be used, to torch operations;
    with the options of `Layer`."""
    kv_format: KVFormat | None = options.get("kv_format")
    kernel = load(variant, quantized=kv_format is not None)
    if kernel is not None:
        head_size = head_size_of(variant, kv_cache, options["num_heads"], kv_format)
        block_size = kv_cache.shape[2]
        why = kernel.unsupported(head_size, block_size, kv_cache.dtype, kv_format)
        if why is None:
            return kernel.layer(kv_cache, **options)
        _warn(variant.name, f"they do not support {why}")
    return TorchLayer(variant, kv_cache, **options)
