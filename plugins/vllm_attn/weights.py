"""No tensor of a model stays uninitialised.

vLLM makes parameters of memory as it finds it and fills them from the checkpoint. It knows which
names were loaded, but asks only for those without a method of quantization (norms, say), only of
models that are not quantized, and a fused tensor (`qkv_proj`) counts as loaded after one of its
parts. So every parameter is marked with a bit pattern before it is loaded, at places that whatever
fills it overwrites, and looked at afterwards (`patches.check_every_load`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_attn.report import StartupError

MARKS = {
    2: (torch.int16, 0x7FA5),
    4: (torch.int32, 0x7FA5C3D2),
    8: (torch.int64, 0x7FA5C3D27FA5C3D2),
}
"""By the bytes of an element: a pattern, and the integers to see it as. It is a NaN that no
calculation makes. There is none for a byte: any of its values is common."""

UNQUANTIZED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
FOREIGN = ("weight", "weight_packed", "qweight")
"""Parameters that every checkpoint has in a format that is not ours; others have defaults."""


def expected(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield the parameters that a checkpoint must fill: `(name, module, parameter)`."""
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
            continue  # these have defaults, or are quantized while they are loaded
        every = method is None or isinstance(method, UNQUANTIZED) or is_ours(module, method)
        for name, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter) or parameter.is_meta or not parameter.numel():
                continue
            if every or (name in FOREIGN and marked_places(parameter)):
                yield f"{prefix}.{name}".lstrip("."), module, parameter


def is_ours(module: Any, method: Any) -> bool:
    """Return whether `quant.quantize` writes a layer's parameters: `vllm_quant` made them, or
    vLLM's int8 scheme (`--activations`)."""
    scheme = getattr(module, "scheme", None)
    return type(scheme).__name__ == "CompressedTensorsW8A8Int8" or any(
        type(owner).__module__.startswith("vllm_quant") for owner in (method, scheme)
    )


def mark(model: nn.Module) -> None:
    """Mark every expected parameter of a layer, which have no other value yet.

    Modules that are no layers (norms) begin with values of their own; their names are checked.
    """
    for _, module, parameter in expected(model):
        if getattr(module, "quant_method", None) is not None:
            for places in marked_places(parameter):
                places.fill_(MARKS[parameter.element_size()][1])


def marked_places(parameter: Tensor) -> list[Tensor]:
    """Return views of a parameter as integers: all of a vector; both ends of every row and of every
    column of a matrix; of more dimensions (experts: `[experts, two fused parts, ...]`, fused along
    either) the first elements of every part. Empty for bytes."""
    if parameter.element_size() not in MARKS:
        return []
    bits = parameter.data.view(MARKS[parameter.element_size()][0])
    if bits.dim() < 2:
        return [bits]
    if bits.dim() == 2:
        return [bits[:, 0], bits[:, -1], bits[0], bits[-1]]
    while bits.dim() > 3:
        bits = bits[..., 0]
    return [bits[:, 0, 0], bits[:, bits.shape[1] // 2, 0], bits[:, 0, bits.shape[2] // 2]]


def untouched(parameter: Tensor) -> bool:
    """Return whether something of a marked parameter was never written."""
    places = marked_places(parameter)
    if not places:
        return False
    left = [place == MARKS[parameter.element_size()][1] for place in places]
    if parameter.dim() == 2:  # words of packed weights may be the pattern, but not at both ends
        left = [left[0] & left[1], left[2] & left[3]]
    return any(bool(found.any()) for found in left)


def check(model: nn.Module, loaded: set[str] | None, seen: set[str]) -> None:
    """Refuse a model with a parameter that was not loaded.

    Args:
        model: just loaded, its weights still as the checkpoint has them.
        loaded: the parameters that vLLM has loaded, by their names; None: unknown.
        seen: the tensors of the checkpoint.

    Raises:
        StartupError: with one line that names the first missing tensor.
    """
    missing = []
    for name, module, parameter in expected(model):
        layer = getattr(module, "quant_method", None) is not None
        found = [part in seen for part in parts_of(model, name)]
        one_part = any(found) and not all(found)
        by_name = loaded is not None and (name not in loaded or one_part)
        if untouched(parameter) if layer and marked_places(parameter) else by_name:
            missing.append(name)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise StartupError(
            f"the checkpoint has no {lacking(model, missing[0], seen)}{more}: it is incomplete, or "
            "not of the model that its config.json describes"
        )


def noted(tensors: Iterable[tuple[str, Tensor]], seen: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors on, and add their names to `seen`."""
    for name, tensor in tensors:
        seen.add(name)
        yield name, tensor


def parts_of(model: Any, name: str) -> list[str]:
    """Return the tensors of a checkpoint that are fused in a parameter."""
    layer, _, tensor = name.rpartition(".")
    parent, _, leaf = layer.rpartition(".")
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    return [".".join(word for word in (parent, part, tensor) if word) for part in parts]


def lacking(model: Any, name: str, seen: set[str]) -> str:
    """Return what a parameter lacks, by its name in the checkpoint: of a fused one, the first
    missing part. vLLM has names of its own for experts, and for what it computes from a tensor."""
    if all(other.rpartition(".")[2] != name.rpartition(".")[2] for other in seen):
        return f"tensor, or not all of them, for vLLM's {name}"
    missing = [part for part in parts_of(model, name) if part not in seen]
    return f"tensor {missing[0] if missing else name}"
