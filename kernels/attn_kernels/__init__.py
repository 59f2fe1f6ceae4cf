"""Attention functions that are not softmax: their formulas, the reference and their kernels.

`get_variant("softpick")` gives a variant, `variant_from_config` builds one from a checkpoint's
`config.json`, `attend` computes it with torch operations, and `attn_kernels.reference` is the
float64 reference that every kernel is compared with.
"""

from attn_kernels.dense import attend, causal_mask, selectable_mask
from attn_kernels.variant import (
    Rows,
    Variant,
    VariantError,
    get_variant,
    register,
    variant_from_config,
    variant_names,
)

__all__ = [
    "Rows",
    "Variant",
    "VariantError",
    "attend",
    "causal_mask",
    "get_variant",
    "register",
    "selectable_mask",
    "variant_from_config",
    "variant_names",
]
