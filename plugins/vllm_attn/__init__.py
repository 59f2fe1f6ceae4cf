"""The vLLM plugin: every registered attention variant as an attention backend.

vLLM finds the two functions below through its entry points and calls them in every process (API
server, engine core, workers). Variants are registered with `AttentionBackendEnum.register`, and on
a CPU build the platform is a subclass that vLLM selects itself; the little that is replaced in vLLM
is in `patches.py`.
"""

from __future__ import annotations

import functools


@functools.cache
def register() -> None:
    """Entry point `vllm.general_plugins`: make vLLM know every variant. Idempotent.

    Raises:
        StartupError: vLLM already has a backend of a variant's name.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    import hf_attn  # noqa: F401  (importing it registers the models' configurations)
    from vllm_attn import names, patches, report

    patches.check_version()
    report.install()
    names.register_all()
    for model in (
        "model:VariantLlamaForCausalLM",
        "fla_model:TransformerForCausalLM",
        "fla_model:ForgettingTransformerForCausalLM",
        "diffllama:DiffLlamaForCausalLM",
    ):
        ModelRegistry.register_model(model.partition(":")[2], f"vllm_attn.{model}")
    patches.ensure_active()


def platform_plugin() -> str | None:
    """Entry point `vllm.platform_plugins`: our CPU platform on a CPU build, else None.

    vLLM's own CPU platform ignores `--attention-backend` and runs CPU_ATTN.
    """
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_attn.cpu_platform.VariantCpuPlatform"
