"""Checkpoints whose weights cannot be quantized, refused before any work."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

from attnserve.errors import UserError
from hf_attn.files import tensor_shapes, weight_files

LARGEST = 1e38
"""Weight: the distance of two of them, which is what a scale is made of, is below 2^128."""


def check_no_experts(folder: Path, model: nn.Module) -> None:
    """Check that all large weights are in linear layers: transformers keeps those of experts in
    tensors of three dimensions.

    Raises:
        UserError: with one line.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            raise UserError(
                f"{folder} has experts ({name}), which are not quantized yet: use a model without"
            )


def check_values(folder: Path) -> None:
    """Check that every weight is a number, and that differences of two of them are, in float32.

    Raises:
        UserError, ValueError: with one line that names the first tensor of which that is not so, or
            a broken file.
    """
    tensor_shapes(folder)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                tensor = opened.get_tensor(name)
                if not tensor.is_floating_point() or not tensor.numel():
                    continue
                largest = float((tensor.float() if tensor.itemsize == 1 else tensor).abs().max())
                if not largest <= LARGEST:  # NaN is not, either
                    raise UserError(
                        f"{name} in {file} has a weight of {largest:g}: only numbers up to "
                        f"{LARGEST:g} can be quantized; copy or train the checkpoint again"
                    )
