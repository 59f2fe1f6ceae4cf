"""Checkpoints whose weights cannot be quantized, refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from attnserve.errors import UserError
from hf_attn.files import tensor_shapes, weight_files

COMPUTED = ".rotary_emb.inv_freq"
"""A tensor that older versions of transformers have stored; it follows from config.json."""
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


def check_tensors(source: Path, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a checkpoint has the tensors of its model and no others.

    Args:
        source: the folder or file.
        model: as its configuration describes it.
        shapes: of the checkpoint's tensors by name.

    Raises:
        UserError: with one line that names the first tensor that is missing, has another shape or
            is too many.
    """
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise UserError(
                f"{source} has no tensor {name}: it is incomplete, or its names are not those of "
                "transformers' Llama, which are all that can be quantized yet"
            )
        if tuple(shapes[name]) != tuple(parameter.shape):
            raise UserError(
                f"{name} of {source} is {list(shapes[name])}, and config.json asks for "
                f"{list(parameter.shape)}: it describes another model"
            )
    known = model.state_dict()  # with the names of tied weights
    for name in shapes:
        if name not in known and not name.endswith(COMPUTED):
            raise UserError(
                f"{source} has a tensor {name}, which the model that its config.json describes "
                "does not have: it is of another model or format"
            )


def check_numbers(file: Path, name: str, tensor: Tensor) -> None:
    """Check that a weight has floating-point numbers, and that differences of two of them are
    numbers, in float32.

    Raises:
        UserError: with one line that names the tensor.
    """
    if not tensor.is_floating_point():
        raise UserError(
            f"{name} in {file} is {tensor.dtype}, no floating-point type: it is of another format"
        )
    if not tensor.numel():
        return
    largest = float((tensor.float() if tensor.itemsize == 1 else tensor).abs().max())
    if not largest <= LARGEST:  # NaN is not, either
        raise UserError(
            f"{name} in {file} has a weight of {largest:g}: only numbers up to {LARGEST:g} can be "
            "quantized; copy or train the checkpoint again"
        )


def check_values(folder: Path, model: nn.Module) -> None:
    """Check the numbers of all files; what is no tensor of the model may be of any kind.

    Raises:
        UserError, ValueError: with one line: see `check_numbers`; or a file is broken.
    """
    tensor_shapes(folder)
    known = model.state_dict()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                tensor = opened.get_tensor(name)
                if name in known or tensor.is_floating_point():
                    check_numbers(file, name, tensor)
