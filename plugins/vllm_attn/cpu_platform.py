"""vLLM's CPU platform, honouring `--attention-backend`."""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_attn import patches

# CpuPlatform, or ZenCpuPlatform where vLLM would choose that.
_Base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


@patches.honour_variants
class VariantCpuPlatform(_Base):
    """The CPU platform that vLLM would have chosen, with the variants' backends."""
