"""Load models with vLLM's own loader in the test's process, without an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform


@contextlib.contextmanager
def one_worker(folder: Path) -> Iterator[None]:
    """Return what a CPU worker sets up before it loads a model; `folder` gets a file."""
    config = EngineArgs(str(folder), dtype="float32").create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    try:
        with mock.patch.object(torch.accelerator, "empty_cache", lambda: None):
            yield
    finally:
        cleanup_dist_env_and_memory()


def load(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    """Return the model, loaded and checked as a worker does it before it allocates a KV cache."""
    config = EngineArgs(
        str(folder),
        dtype=dtype,
        max_model_len=256,
        enforce_eager=True,
        **options,
    ).create_engine_config()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        current_platform.update_block_size_for_backend(config)
    return model
