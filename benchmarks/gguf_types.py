"""llama.cpp's types for weights: quantized by its own library, dequantized by `gguf`."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attnserve.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256  # columns of the largest block; rows are filled up with zeros to a multiple of it


class Ggml:
    """llama.cpp's libggml-base.

    Args:
        folder: of the package llama_cpp; None: the one that is installed.

    Raises:
        UserError: it is not there.
    """

    def __init__(self, folder: Path | None) -> None:
        found = importlib.util.find_spec("llama_cpp")
        if folder is None and found is not None and found.origin is not None:
            folder = Path(found.origin).parent
        library = folder and folder / "lib" / "libggml-base.so"
        if library is None or not library.exists():
            raise UserError(
                "llama.cpp's types need its library: pip install llama-cpp-python, here or in "
                "another environment, whose folder llama_cpp --llama-cpp names"
            )
        self.library = ctypes.CDLL(str(library))
        self.chunk = self.library.ggml_quantize_chunk
        self.chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
        self.chunk.restype = c_size_t

    def __call__(
        self, weight: Tensor, name: str, importance: Tensor | None
    ) -> tuple[Tensor, float]:
        """Quantize a matrix.

        Args:
            weight: float32 `[rows, columns]`.
            name: of the type, as in `gguf.GGMLQuantizationType`.
            importance: float32 `[columns]`, the mean square of a column's inputs, which llama.cpp
                calls an importance matrix.

        Returns:
            The dequantized matrix, and bits of a weight; those of a row that ends in a whole block.
        """
        import torch
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[name]
        rows, columns = weight.shape
        padding = -columns % BLOCK
        full = np.ascontiguousarray(np.pad(weight.numpy(), ((0, 0), (0, padding))))
        size, width = GGML_QUANT_SIZES[kind]
        out = np.empty((rows, full.shape[1] // size * width), dtype=np.uint8)
        given = None
        if importance is not None:
            given = np.ascontiguousarray(np.pad(importance.numpy(), (0, padding)), dtype=c_float)
        written = self.chunk(
            kind, full.ctypes.data, out.ctypes.data, 0, rows, full.shape[1],
            None if given is None else given.ctypes.data,
        )  # fmt: skip
        assert written == out.nbytes
        found = dequantize(out, kind)[:, :columns]
        return torch.from_numpy(np.ascontiguousarray(found)), 8 * width / size
