"""Inside vLLM's worker process: bytes that the weights and the KV cache take there.

`--worker-extension-cls=benchmarks.memory.worker.Memory` imports this module in the worker, which
registers the loader for `--load-format=measured`; `Memory`'s method is called over
`/collective_rpc`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import get_model_architecture


def anonymous() -> int:
    """Return the resident bytes of this process that are no file's, after it gave back what is
    free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def resident(storage: torch.UntypedStorage) -> int:
    """Return the bytes of a tensor's memory that are resident: not pages that nobody wrote to."""
    page = mmap.PAGESIZE
    begin = storage.data_ptr() // page * page
    pages = -(-(storage.data_ptr() + storage.nbytes() - begin) // page)
    found = np.zeros(pages, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_size_t(begin), ctypes.c_size_t(pages * page))
    if libc.mincore(*arguments, ctypes.c_void_p(found.ctypes.data)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return min(storage.nbytes(), int((found & 1).sum()) * page)


@register_model_loader("measured")
class MeasuringLoader(DefaultModelLoader):
    """vLLM's own loader, and what the process grows by from before the empty model is made until
    the weights are as the kernels read them: oneDNN's packed weights are in no torch tensor. What
    else that leaves in the process, 1 to 4 MB of Python's and of libraries, is counted too.
    """

    taken: ClassVar[int] = 0

    def __init__(self, load_config: LoadConfig) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "auto"
        super().__init__(load_config)
        self.before = 0

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        get_model_architecture(model_config)  # what it imports is no weight
        self.before = anonymous()
        return super().create_model(vllm_config, model_config, prefix)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        model = super().load_model(vllm_config, model_config, prefix)
        MeasuringLoader.taken = anonymous() - self.before
        return model


class Memory:
    """What becomes part of the worker's class."""

    model_runner: Any

    def memory_taken(self) -> dict[str, int]:
        """Return the bytes of the weights, and of the KV cache: allocated, and resident."""
        tensors = torch.utils._pytree.tree_leaves(self.model_runner.kv_caches)
        caches = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
        return {
            "weights": MeasuringLoader.taken,
            "allocated": sum(cache.nbytes() for cache in caches),
            "resident": sum(map(resident, caches)),
        }
