"""Variants as members of vLLM's AttentionBackendEnum, so that `--attention-backend` knows them."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from attn_kernels import variant_names
from vllm_attn.report import StartupError


@functools.cache
def register_all() -> None:
    """Add one enum member for each variant, called by the upper-case name as vLLM's CLI needs.
    Idempotent.

    Raises:
        StartupError: vLLM already has a backend of a variant's name.
    """
    for name in variant_names():
        try:
            member = AttentionBackendEnum.register(name.upper(), f"vllm_attn.backend.{name}")
        except ValueError as error:
            raise StartupError(
                f"vLLM already has an attention backend {name.upper()}; rename the variant {name!r}"
            ) from error
        # Enum members pickle by value, and a spawned engine core unpickles its configuration before
        # it loads plugins: restore by name through this module instead.
        member.__reduce_ex__ = lambda protocol, name=name: (backend_for, (name,))


def backend_for(variant_name: str) -> AttentionBackendEnum:
    """Return the enum member of a variant, also in a process that has loaded no plugin yet."""
    register_all()
    return AttentionBackendEnum[variant_name.upper()]


def variant_of(backend: Any) -> str | None:
    """Return the variant that an enum member stands for; None for vLLM's own backends and None."""
    name = backend.name.lower() if backend is not None else None
    return name if name in variant_names() else None
