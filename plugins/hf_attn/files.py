"""Which files of a folder hold a checkpoint's weights, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: those that the index names; without an index
    `model.safetensors`, or else all that there are.

    Others may lie beside them: the same weights in another layout (`consolidated.safetensors`), or
    what an earlier save has left.

    Raises:
        ValueError: with one line: the index is broken, or names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is no index of safetensors: copy it again") from None
        if absent := next((file for file in files if not file.is_file()), None):
            raise ValueError(f"{index} names {absent.name}, which is not there: copy that file too")
        return files
    whole = folder / WHOLE
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name.

    Raises:
        ValueError: with one line: see `weight_files`; or a file is broken.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no mapping
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no whole safetensors file ({error}): copy or download it again"
            ) from None
    return shapes
