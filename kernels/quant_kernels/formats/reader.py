"""What is common to the formats: which tensors a quantized layer has, and how they become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels.weight import QuantizedWeight, QuantSpec

WEIGHT = "weight"

WORDS, BYTES = {torch.int32}, {torch.uint8}
INTEGERS = {torch.int32, torch.int64}
FLOATS = {torch.float32, torch.float16, torch.bfloat16}
KINDS = {
    "qweight": WORDS,
    "qzeros": WORDS,
    "scales": FLOATS,
    "g_idx": INTEGERS,
    "weight_packed": WORDS,
    "weight_scale": FLOATS,
    "weight_zero_point": WORDS | FLOATS,
    "weight_levels": BYTES,
    "weight_g_idx": INTEGERS,
    "weight_shape": INTEGERS,
    WEIGHT: BYTES | {torch.int8},
    "SCB": FLOATS,
    "weight.absmax": BYTES | FLOATS,
    "weight.quant_map": FLOATS,
    "weight.nested_absmax": FLOATS,
    "weight.nested_quant_map": FLOATS,
}
"""Dtypes of a layer's tensors, by what follows its name."""


@dataclass(frozen=True)
class Reader:
    """How a checkpoint stores its quantized layers.

    Args:
        spec: bits and groups of all of them; None: their values are no integers times a scale.
        parts: the tensors of a layer that `read` needs, by what follows the layer's name.
        read: from those tensors to the weight.
        ignore: modules that are not quantized: names, or patterns after `re:`.
        unused: tensors of a layer that say nothing more.
        act_order: whether columns are in groups that `g_idx` names.
    """

    spec: QuantSpec | None
    parts: frozenset[str]
    read: Callable[[Mapping[str, Tensor]], QuantizedWeight]
    ignore: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    act_order: bool = False

    def place(self, name: str, tensor: Tensor) -> tuple[str, str] | None:
        """Return the layer and the part of it that a tensor is; None: it belongs to none."""
        for part in self.parts | self.unused:
            if name.endswith(f".{part}") and not (part == WEIGHT and tensor.is_floating_point()):
                return name.removesuffix(f".{part}"), part
        return None

    def weights(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Yield a checkpoint's quantized layers by name, each when all of its tensors are there,
        and the other tensors as they come.

        Raises:
            ValueError: with one line: tensors are missing or do not belong together.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            place = self.place(name, tensor)
            if place is None:
                yield name, tensor
                continue
            layer, part = place
            if part in self.unused:
                continue
            parts = found.setdefault(layer, {})
            parts[part] = tensor
            if len(parts) == len(self.parts):
                yield layer, self.weight(layer, found.pop(layer))
        for layer, parts in found.items():
            raise ValueError(
                f"the checkpoint has no tensor {layer}.{min(self.parts - parts.keys())}: it is "
                "incomplete, or not of the format that its config.json names"
            )

    def weight(self, layer: str, parts: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return one layer's weight.

        Raises:
            ValueError: with one line.
        """
        with reading(layer, parts):
            return self.read(parts)


@contextmanager
def reading(layer: str, parts: Mapping[str, Tensor]) -> Iterator[None]:
    """Make one line of what is wrong with a layer's tensors, whatever others have stored.

    Raises:
        ValueError: with that line.
    """
    try:
        for part, tensor in parts.items():
            if tensor.dtype not in KINDS.get(part, {tensor.dtype}):
                raise ValueError(f"{part} cannot be {tensor.dtype}")
        yield
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(f"{layer} cannot be read ({shapes}): {why}") from error


def excluded(ignore: Iterable[str] | None) -> tuple[str, ...]:
    """Return other formats' lists of unquantized modules as patterns: a module is meant by its
    name, by the end or by any part of it."""
    return tuple(rf"re:(.*\.)?{name}(\..*)?" for name in ignore or ())


def check_shapes(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    spec: QuantSpec,
    g_idx: Tensor | None = None,
) -> None:
    """Refuse scales, zero points and groups of columns that are not those of a matrix.

    Raises:
        ValueError: with one line.
    """
    if not values.numel():
        raise ValueError("its weights are empty")
    wanted = (values.shape[0], spec.groups(values.shape[1]))
    if tuple(scales.shape) != wanted or (zeros is not None and tuple(zeros.shape) != wanted):
        raise ValueError(
            f"a matrix {list(values.shape)} in groups of {spec.size(values.shape[1])} columns has "
            f"scales {list(wanted)}, not {list(scales.shape)}"
        )
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("its scales are not all numbers")
    if zeros is not None and not bool(torch.isfinite(zeros).all()):
        raise ValueError("its zero points are not all numbers")
    if g_idx is None:
        return
    named = g_idx if g_idx.shape == values.shape[1:] else torch.tensor([-1])
    if not 0 <= int(named.min()) <= int(named.max()) < wanted[1]:
        raise ValueError(f"g_idx does not name one of {wanted[1]} groups for each column")
