"""Budgets of the layers (`kv_budgets`): where they stand, and what they do not go with."""

from __future__ import annotations

from typing import Any

from attn_kernels import Variant
from attn_kernels.pruning import LARGEST_GPU_BUDGET
from vllm_attn.report import StartupError

KV_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16")
"""Without scales."""

MODEL_CLASS = "VariantLlamaForCausalLM"
"""The only one whose layers can have budgets."""


def check_budgets(vllm_config: Any, variant: Variant) -> None:
    """Refuse what budgets do not go with.

    Raises:
        StartupError: with one line that says what and what to do.
    """
    budgets = variant.kv_budgets
    if not budgets:
        return
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers = model_config.hf_text_config.num_hidden_layers
    if len(budgets) != num_layers:
        raise StartupError(
            f"kv_budgets has {len(budgets)} entries and the model {num_layers} layers: give one "
            "budget a layer"
        )
    reasons = {
        f"a model of {', '.join(model_config.architectures)}, whose layers cannot have budgets: "
        f"convert it to {MODEL_CLASS}": MODEL_CLASS not in model_config.architectures,
        "a float8 KV cache: drop --kv-cache-dtype": (
            vllm_config.cache_config.cache_dtype not in KV_CACHE_DTYPES
        ),
        "a sliding window: drop one of the two": bool(
            getattr(model_config.hf_text_config, "sliding_window", None)
        ),
        "context parallelism: use --decode-context-parallel-size 1 and "
        "--prefill-context-parallel-size 1": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "pipeline parallelism yet: use --pipeline-parallel-size 1": (
            parallel.pipeline_parallel_size > 1
        ),
        f"a GPU where one is above {LARGEST_GPU_BUDGET}: lower it, or serve on a CPU": (
            vllm_config.device_config.device_type != "cpu"
            and min(max(budgets), model_config.max_model_len) > LARGEST_GPU_BUDGET
        ),
    }
    for what, present in reasons.items():
        if present:
            raise StartupError(f"kv_budgets do not go with {what}")
