"""Variants as members of vLLM's AttentionBackendEnum, so that `--attention-backend` knows them."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from attn_kernels import get_variant, variant_names
from vllm_attn.report import StartupError


def class_name(variant_name: str) -> str:
    """Name of the variant's backend class in `vllm_attn.backend`."""
    return f"{type(get_variant(variant_name)).__name__}Backend"


def register_all() -> None:
    """Add one enum member for each variant, called by the upper-case name as vLLM's CLI needs."""
    for name in variant_names():
        path = f"vllm_attn.backend.{class_name(name)}"
        try:
            member = AttentionBackendEnum.register(name.upper(), path)
        except ValueError as error:
            raise StartupError(
                f"vLLM already has an attention backend {name.upper()}; rename the variant {name!r}"
            ) from error
        # Enum members pickle by value, and a spawned engine core unpickles its configuration before
        # it loads plugins: restore by name through this package instead.
        member.__reduce_ex__ = lambda protocol, name=name: (backend_for, (name,))


def backend_for(variant_name: str) -> AttentionBackendEnum:
    """The enum member of a variant; registers all of them if this process has not yet."""
    from vllm_attn import register

    register()
    return AttentionBackendEnum[variant_name.upper()]


def variant_of(backend: Any) -> str | None:
    """The variant that an enum member stands for; None for vLLM's own backends and for None."""
    name = backend.name.lower() if backend is not None else None
    return name if name in variant_names() else None
