"""A layer's packed weight: its parameters as they are loaded, and as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from quant_kernels import Panels, panels
from quant_kernels.pack import pack, unpack, words
from quant_kernels.weight import QuantSpec, group_order
from vllm_attn.report import StartupError
from vllm_attn.weights import full_shape


@dataclass(frozen=True)
class Format(QuantSpec):
    """How a weight is stored.

    Args:
        zero_dtype: of zero points: floating point as it is, else integers, packed like the
            weight's.
        act_order: whether `weight_g_idx` says which columns are a group (GPTQ's `desc_act`).
        two_level: scales are two-level ones (`quant_kernels.levels`): those of rows, and a byte a
            group.
    """

    zero_dtype: torch.dtype = torch.int8
    act_order: bool = False
    two_level: bool = False

    def create(
        self,
        layer: Any,
        rows: int,
        columns: int,
        stored_rows: int,
        loader: Callable[..., None],
        parts: int = 1,
    ) -> None:
        """Register the parameters of this rank's part of a weight, named as in checkpoints.

        Args:
            layer: gets them.
            rows, columns: of this rank's part.
            stored_rows: most that a tensor of the checkpoint has.
            loader: the layer's own, which finds this rank's part of a tensor.
            parts: tensors of the checkpoint that are fused in it.

        Their `stored_shape` is what a checkpoint has for a matrix (`vllm_attn.weights.guard`).
        Packed zero points and bytes of groups have 16 bits until `arrange`: a byte has no value
        that says that nothing was loaded (`vllm_attn.weights`).
        """
        of_rows: dict[str, Any] = {"output_dim": 0}
        of_groups = of_rows | {"input_dim": 1}
        scale: Any = ChannelQuantScaleParameter
        place = of_rows
        if self.group_size is not None and not self.two_level:
            scale, place = GroupQuantScaleParameter, of_groups
        scale_columns = (lambda columns: 1) if self.two_level else self.groups
        packed = torch.empty(rows, words(columns, self.bits), dtype=torch.int32)
        scales = torch.empty(rows, scale_columns(columns), dtype=torch.float32)
        layer.weight_packed = ModelWeightParameter(
            data=packed, input_dim=1, output_dim=0, weight_loader=loader
        )
        layer.weight_packed.stored_shape = lambda rows, columns: (rows, words(columns, self.bits))
        layer.weight_scale = scale(data=scales, weight_loader=loader, **place)
        layer.weight_scale.stored_shape = lambda rows, columns: (rows, scale_columns(columns))
        layer.weight_shape = BasevLLMParameter(
            data=torch.empty(parts, 2, dtype=torch.int64), weight_loader=comparing(layer)
        )
        layer.weight_zero_point = None
        if self.two_level:
            layer.weight_levels = GroupQuantScaleParameter(
                data=torch.empty(rows, self.groups(columns), dtype=torch.int16),
                weight_loader=loader,
                **of_groups,
            )
            layer.weight_levels.stored_shape = lambda rows, columns: (rows, self.groups(columns))
        elif not self.symmetric:
            as_it_is = self.zero_dtype.is_floating_point
            layer.weight_zero_point = scale(
                data=torch.empty_like(scales, dtype=self.zero_dtype if as_it_is else torch.int16),
                weight_loader=loader if as_it_is else self.unpacking(loader, stored_rows),
                **place,
            )
            layer.weight_zero_point.stored_shape = lambda rows, columns: (
                rows if as_it_is else words(rows, self.bits),
                self.groups(columns),
            )

        if self.act_order:
            layer.weight_g_idx = BasevLLMParameter(
                data=torch.empty(columns, dtype=torch.int32), weight_loader=agreeing(layer)
            )

    def unpacking(self, loader: Callable[..., None], rows: int) -> Callable[..., None]:
        """Return a loader of zero points, packed along a column, as uint8 `[rows, groups]`."""

        def load(parameter: nn.Parameter, packed: Tensor, *args: Any, **kwargs: Any) -> None:
            stored = min(rows, packed.shape[0] * 32 // self.bits)
            values = unpack(packed.T.contiguous(), self.bits, stored)
            loader(parameter, values.T, *args, **kwargs)

        return load

    def arrange(self, layer: Any, columns: int) -> None:
        """Replace the loaded parameters by those that the kernels read."""
        if self.two_level:
            zeros = layer.weight_levels.data.to(torch.uint8).view(torch.int8)
            del layer.weight_levels
        else:
            zeros = None if self.symmetric else layer.weight_zero_point.data
            if zeros is not None and zeros.dtype == torch.int16:
                zeros = zeros.to(torch.uint8)
        packed, layer.weight_order = layer.weight_packed.data, None
        if not bool(torch.isfinite(layer.weight_scale.data).all()):
            raise StartupError(
                f"{layer.prefix}.weight_scale of the checkpoint has scales that are no numbers: "
                "copy it, or quantize the original again"
            )
        if self.act_order:
            packed = self.reorder(layer, packed, columns)
        found = panels(
            packed,
            layer.weight_scale.data,
            zeros,
            bits=self.bits,
            group_size=self.group_size,
            inputs=columns,
        )
        del layer.weight_shape
        for name, tensor in (
            ("weight_packed", found.words),
            ("weight_scale", found.scales),
            ("weight_zero_point", found.zeros),
        ):
            delattr(layer, name)
            setattr(layer, name, None if tensor is None else nn.Parameter(tensor, False))
        layer.panels_shape = found[3:]

    def reorder(self, layer: Any, packed: Tensor, columns: int) -> Tensor:
        """Return packed rows whose groups are consecutive columns, and leave their order, in which
        a layer's inputs must be taken, in `weight_order`.

        Raises:
            StartupError: the groups are not of the group size.
        """
        try:
            order = group_order(layer.weight_g_idx.data, self)
        except ValueError as error:
            raise StartupError(
                f"{layer.prefix}.weight_g_idx of the checkpoint cannot be served: {error}"
            ) from None
        del layer.weight_g_idx
        layer.weight_order = nn.Parameter(order, False)
        return pack(unpack(packed, self.bits, columns)[:, order], self.bits)


def agreeing(layer: Any) -> Callable[..., None]:
    """Return a loader of `weight_g_idx [columns]`, of which parts that are fused have one."""
    known: list[Tensor] = []

    def load(parameter: nn.Parameter, stored: Tensor, *args: Any, **kwargs: Any) -> None:
        if stored.shape != parameter.shape or (known and not torch.equal(known[0], stored)):
            raise StartupError(
                f"{layer.prefix}: its parts have their columns in different groups (g_idx), which "
                "one product cannot compute: quantize them together, or without act order"
            )
        known[:] = [stored]
        parameter.data.copy_(stored)

    return load


def comparing(layer: Any) -> Callable[..., None]:
    """Return a loader of `weight_shape [parts, 2]`, which must be that of the layer, or of the part
    of it that is one tensor in the checkpoint."""

    def load(parameter: nn.Parameter, stored: Tensor, shard: Any = None, **kwargs: Any) -> None:
        shard = kwargs.get("loaded_shard_id", shard)
        shape = full_shape(layer, shard)
        if tuple(stored.tolist()) != shape:
            raise StartupError(
                f"{layer.prefix}.weight_shape of the checkpoint is {stored.tolist()}, and the "
                f"layer is {list(shape)}: config.json describes another model"
            )
        if shard is None:
            parameter.data[:] = stored
        else:
            parts = {"q": 0, "k": 1, "v": 2}
            rows = shard if isinstance(shard, tuple) else (parts.get(shard, shard),)
            parameter.data[list(rows)] = stored

    return load


def weight_of(layer: Any) -> Panels:
    """Return the weight that `Format.arrange` left."""
    tensors = layer.weight_packed, layer.weight_scale, layer.weight_zero_point
    return Panels(*tensors, *layer.panels_shape)
