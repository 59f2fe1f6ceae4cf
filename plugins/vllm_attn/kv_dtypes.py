"""What `--kv-cache-dtype` means to the variants' backends, and the page that vLLM sizes by it.

The names are vLLM's own, and what it does with one is public: `KVQuantMode` in a layer's spec, and
`state_content_bytes` for a backend that packs its page (`AttentionBackend.customize_spec`). vLLM
derives from that how many tokens fit. A checkpoint may name its dtype too: `kv_cache_dtype` in
config.json, which `--kv-cache-dtype` overrules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec

from attn_kernels import Variant
from attn_kernels.kv_quant import FIELD, KV_FORMATS
from attn_kernels.paged import content_bytes
from vllm_attn import head_0
from vllm_attn.report import StartupError

logger = init_logger(f"vllm.{__name__}")

PLAIN = ("auto", "float32", "float16", "bfloat16")
"""KV caches without scales."""
FP8 = ("fp8", "fp8_e4m3")
"""KV caches with a scale a layer, which GPU kernels take."""


def supported(device: str) -> tuple[str, ...]:
    """Return the names that a device ("cpu", "cuda") takes."""
    return (*PLAIN, *KV_FORMATS, *(FP8 if device != "cpu" else ()))


def check(vllm_config: Any, variant: Variant) -> None:
    """Fill in the dtype that the checkpoint names, and refuse one that a device does not take.

    Raises:
        StartupError: with one line.
    """
    cache_config = vllm_config.cache_config
    device = vllm_config.device_config.device_type
    named = getattr(vllm_config.model_config.hf_config, FIELD, None)
    if cache_config.cache_dtype == "auto" and named is not None:
        if named not in supported(device):
            raise StartupError(
                f"config.json names the {FIELD} {named!r}, which {variant.name} attention does not "
                f"have on {device.upper()}: pass --kv-cache-dtype, one of "
                f"{', '.join(supported(device)[1:])}"
            )
        cache_config.cache_dtype = named
        logger.info("%s KV cache, as the checkpoint's config.json says", named)
    if cache_config.cache_dtype not in supported(device):
        raise StartupError(
            f"--kv-cache-dtype {cache_config.cache_dtype} is not supported with {variant.name} "
            f"attention on {device.upper()}: use one of {', '.join(supported(device))}"
        )
    parallel = vllm_config.parallel_config.tensor_parallel_size > 1
    if variant.stateful and parallel and cache_config.cache_dtype not in PLAIN:
        raise StartupError(
            f"--kv-cache-dtype {cache_config.cache_dtype} does not go with {variant.name} "
            "attention on several ranks, which all keep head 0's keys as they are: use one of "
            f"{', '.join(PLAIN)}, or --tensor-parallel-size 1"
        )


def packed(spec: AttentionSpec, variant: Variant, group: int = 1) -> AttentionSpec:
    """Return a layer's spec with the page that a variant's kernels need.

    Args:
        group: query heads of a KV head, which a gated variant's page depends on.
    """
    kv_format = KV_FORMATS.get(spec.kv_quant_mode.name.lower())
    if kv_format is None and not variant.stateful and not variant.gated:
        return spec
    content = content_bytes(variant, spec.head_size, spec.dtype, kv_format, group=group)
    if head_0.is_remote(variant):  # one key more behind all heads of a token
        total = spec.num_kv_heads * content + spec.head_size * spec.dtype.itemsize
        return replace(spec, num_head_slots=1, state_content_bytes=total)
    return replace(spec, state_content_bytes=content)
