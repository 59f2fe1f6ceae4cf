"""No tensor of a model stays uninitialised, and none is cut to fit.

vLLM makes parameters of memory as it finds it and fills them from the checkpoint. It knows which
names were loaded, but asks only for those without a method of quantization (norms, say), only of
models that are not quantized, and a fused tensor (`qkv_proj`) counts as loaded after one of its
parts. So every parameter is marked with a bit pattern before it is loaded, at places that whatever
fills it overwrites, and looked at afterwards (`patches.check_every_load`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from quant_kernels.formats.reader import KINDS
from vllm_attn.report import StartupError

StoredShape = Callable[[int, int], tuple[int, ...]]

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


def guard(model: nn.Module) -> None:
    """Let layers refuse a tensor of another shape than theirs. vLLM takes their part of a larger
    one and leaves the rest, and has assertions without a message for others."""
    for name, module, parameter in expected(model):
        if not hasattr(parameter, "weight_loader"):
            continue  # vLLM's default, which models may look for; see `loading`
        if getattr(module, "quant_method", None) is None:
            parameter.weight_loader = fitting(parameter.weight_loader, model, name)
        elif isinstance(module, LinearBase | VocabParallelEmbedding):
            kind = name.rpartition(".")[2]
            stored = getattr(parameter, "stored_shape", STORED_SHAPES.get(kind))
            if stored is not None:
                parameter.weight_loader = fitting(
                    parameter.weight_loader, model, name, module, stored
                )


STORED_SHAPES: dict[str, StoredShape] = {
    "weight": lambda rows, columns: (rows, columns),
    "weight_scale": lambda rows, columns: (rows, 1),
    "bias": lambda rows, columns: (rows,),
}
"""Shapes of a layer's tensors that are not packed."""


def fitting(
    loader: Callable[..., None],
    model: nn.Module,
    name: str,
    layer: Any = None,
    stored: StoredShape | None = None,
) -> Callable[..., None]:
    """Wrap a parameter's loader: one line says that a tensor does not fit.

    Args:
        loader: vLLM's, or the model's own.
        model, name: whose parameter it is, and its name there.
        layer: a layer whose shape is known.
        stored: the shape that such a tensor has, of rows and columns.
    """

    def load(parameter: nn.Parameter, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        shard = args[0] if args else kwargs.get("loaded_shard_id")
        shape = None
        if layer is not None and stored is not None:
            shape = stored(*full_shape(layer, shard))
            ours = is_ours(layer, layer.quant_method)
            if ours and tensor.dtype not in KINDS.get(name.rpartition(".")[2], {tensor.dtype}):
                raise StartupError(
                    f"{part_name(model, name, shard)} of the checkpoint is {tensor.dtype}, which "
                    "is not of its format: copy it, or quantize the original again"
                )
            larger = any(a > b for a, b in zip(tensor.shape, shape, strict=False))
            if larger or (ours and tuple(tensor.shape) != shape):
                raise StartupError(misfit(part_name(model, name, shard), tensor.shape, shape))
        try:
            return loader(parameter, tensor, *args, **kwargs)
        except (AssertionError, RuntimeError) as error:  # vLLM's assertions have no message
            named = part_name(model, name, shard)
            raise StartupError(misfit(named, tensor.shape, shape)) from error

    return load


def misfit(name: str, found: Sequence[int], wanted: Sequence[int] | None) -> str:
    """Return the line for a tensor of another shape than its layer's."""
    asks = f"asks for {list(wanted)}" if wanted is not None else "for another shape"
    return (
        f"{name} of the checkpoint is {list(found)}, and config.json {asks}: it describes another "
        "model"
    )


def part_name(model: nn.Module, name: str, shard: Any) -> str:
    """Return a parameter's name in the checkpoint, or that of the part that vLLM's loaders call
    `shard`."""
    parts = parts_of(model, name)
    place = {"q": 0, "k": 1, "v": 2}.get(shard, shard) if not isinstance(shard, tuple) else None
    return parts[place] if isinstance(place, int) and place < len(parts) else name


@contextmanager
def loading(seen: dict[str, None]) -> Iterator[None]:
    """Make one line of what vLLM says of a tensor that the model does not have, or that does not
    fit a module without a loader of its own (norms).

    Args:
        seen: the tensors of the checkpoint so far.
    """
    try:
        yield
    except ValueError as error:
        unknown = re.match(r"There is no module or parameter named '(.+?)'", str(error))
        if unknown is None:
            raise
        inner = f".{unknown[1]}."
        found = next((name for name in reversed(seen) if inner in f".{name}."), unknown[1])
        raise StartupError(
            f"the checkpoint has a tensor {found}, which the model that its config.json describes "
            "does not have: it is of another model or format"
        ) from error
    except AssertionError as error:
        if not str(error).startswith("Attempted to load weight"):
            raise
        found, wanted = re.findall(r"\(torch\.Size\(\[([\d, ]*)\]\)\)", str(error))
        sizes = [[int(size) for size in text.split(",") if size] for text in (found, wanted)]
        raise StartupError(misfit(next(reversed(seen)), *sizes)) from error


def full_shape(layer: Any, shard: str | int | tuple[int, ...] | None) -> tuple[int, int]:
    """Return `(rows, columns)` of what is one tensor in the checkpoint, on all ranks together.

    Args:
        layer: an embedding or a linear layer of vLLM.
        shard: which part of a fused layer, as vLLM's loaders name it; None: the whole.
    """
    if isinstance(layer, VocabParallelEmbedding):
        return layer.org_vocab_size, layer.embedding_dim
    rows = layer.output_size
    if isinstance(layer, QKVParallelLinear) and isinstance(shard, str):
        heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
        rows = heads * (layer.v_head_size if shard == "v" else layer.head_size)
    elif isinstance(shard, int):
        rows = layer.output_sizes[shard]
    elif isinstance(shard, tuple):
        rows = sum(layer.output_sizes[part] for part in shard)
    elif isinstance(layer, QKVParallelLinear):
        rows = sum(full_shape(layer, part)[0] for part in "qkv")
    return rows, layer.input_size


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


def check(model: nn.Module, loaded: set[str] | None, seen: Collection[str]) -> None:
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


def noted(
    tensors: Iterable[tuple[str, Tensor]], seen: dict[str, None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors on, and add their names to `seen`."""
    for name, tensor in tensors:
        seen[name] = None
        yield name, tensor


def parts_of(model: Any, name: str) -> list[str]:
    """Return the tensors of a checkpoint that are fused in a parameter."""
    layer, _, tensor = name.rpartition(".")
    parent, _, leaf = layer.rpartition(".")
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    return [".".join(word for word in (parent, part, tensor) if word) for part in parts]


def lacking(model: Any, name: str, seen: Collection[str]) -> str:
    """Return what a parameter lacks, by its name in the checkpoint: of a fused one, the first
    missing part. vLLM has names of its own for experts, and for what it computes from a tensor."""
    if all(other.rpartition(".")[2] != name.rpartition(".")[2] for other in seen):
        return f"tensor, or not all of them, for vLLM's {name}"
    missing = [part for part in parts_of(model, name) if part not in seen]
    return f"tensor {missing[0] if missing else name}"
