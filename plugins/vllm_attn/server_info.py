"""What a server runs, said by itself: one line of its own /metrics, for gateways and dashboards.

    attnserve:server_info{model_name="softpick",variant="softpick",weight_bits="16",...} 1.0

vLLM publishes its `vllm:cache_config_info` the same way. A stat logger is vLLM's own place for it:
it is made in each API server's process, once the engine is up, with the configuration that is
served.
"""

from __future__ import annotations

import re
from typing import Any

from prometheus_client import REGISTRY, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from attn_kernels import variant_from_config
from vllm_attn import names

logger = init_logger(f"vllm.{__name__}")

NAME = "attnserve:server_info"

EMBEDDINGS = re.compile(r"embed|lm_head", re.IGNORECASE)
"""Targets of compressed-tensors' groups that are no linear layers of the decoder."""


class ServerInfoLogger(AggregateStatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`: publish `server_info` when the engine is up."""

    gauge: Gauge | None = None
    """Of this process; a second server in it replaces the first one's."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.vllm_config = vllm_config

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: what a server runs does not change from step to step."""

    def log_engine_initialized(self) -> None:
        try:
            info = server_info(self.vllm_config)
        except Exception:  # a server that cannot be described serves all the same
            logger.exception("%s is not published", NAME)
            return
        if ServerInfoLogger.gauge is not None:
            REGISTRY.unregister(ServerInfoLogger.gauge)
        # Several API servers write the same line; vLLM's own info gauges are merged like this.
        ServerInfoLogger.gauge = Gauge(
            NAME, "What the server runs", [*info], multiprocess_mode="mostrecent"
        )
        ServerInfoLogger.gauge.labels(**info).set(1)


def server_info(vllm_config: VllmConfig) -> dict[str, str]:
    """Return the labels: what is served, by a configuration that vLLM has settled.

    `variant` is the attention function that runs: vLLM's own backends compute softmax, and a model
    without attention has "none". Lists are joined with commas. What is not known is empty.
    """
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    variant = names.variant_of(vllm_config.attention_config.backend)
    declared = variant_from_config(model_config.hf_config) if variant else None
    dtype = cache_config.cache_dtype
    dtype = model_config.dtype if dtype == "auto" else dtype
    quantization = vllm_config.quant_config
    weights, embeddings = widths(quantization, str(8 * model_config.dtype.itemsize))
    return {
        "model_name": str(model_config.served_model_name),
        "variant": variant or ("none" if model_config.is_attention_free else "softmax"),
        "kv_budgets": joined(declared.kv_budgets) if declared else "",
        "weight_bits": weights,
        "embedding_bits": embeddings,
        "weight_method": "none" if quantization is None else str(quantization.get_name()),
        "kv_cache_dtype": str(dtype).removeprefix("torch."),
    }


def widths(quantization: Any, unquantized: str) -> tuple[str, str]:
    """Return the bits of the linear layers' weights, and those of embeddings and head.

    Args:
        quantization: vLLM's QuantizationConfig; None: nothing is quantized.
        unquantized: the bits of weights that are left as they are. They do not count where other
            linear layers are quantized.
    """
    if quantization is None:
        return unquantized, unquantized
    schemes = getattr(quantization, "target_scheme_map", None)  # compressed-tensors
    if schemes is not None:
        linear: set[int] = set()
        tables: set[int] = set()
        for target, scheme in schemes.items():
            if scheme.get("weights") is not None:
                into = tables if EMBEDDINGS.search(target) else linear
                into.add(scheme["weights"].num_bits)
        return joined(sorted(linear)) or unquantized, joined(sorted(tables)) or unquantized
    bits = getattr(quantization, "weight_bits", None)  # GPTQ, AWQ
    if bits is None and (found := re.search(r"(?:fp|int)(\d+)", quantization.get_name())):
        bits = found[1]  # fp8, mxfp4, experts_int8
    return "" if bits is None else str(bits), unquantized


def joined(numbers: Any) -> str:
    """Return numbers as a label's value."""
    return ",".join(map(str, numbers))
