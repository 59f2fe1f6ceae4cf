"""A program for test_compiled_at_startup: how many kernels a server of a packed checkpoint compiles
when its weights are loaded on a GPU, and which ones products of any number of rows compile then.

vLLM runs on the CPU; what its layers compile is for a GPU, by a driver that launches nothing.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch


def main(checkpoint: str) -> None:
    from vllm import LLM
    from vllm.config import set_current_vllm_config

    llm: Any = LLM(
        checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        max_num_batched_tokens=1024,
        max_num_seqs=64,
    )
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    model = executor.driver_worker.worker.model_runner.model
    layers = [layer for layer in model.modules() if hasattr(layer, "panels_shape")]

    import triton

    from benchmarks.triton_compile.dry import TARGETS, DryCompiler
    from quant_kernels import triton as kernels
    from vllm_quant.layer import weight_of
    from vllm_quant.methods import compile_launches

    compiler = DryCompiler(Path(os.environ["TRITON_CACHE_DIR"]))
    compiler.device = list(TARGETS).index("sm_90")
    names: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: names.append(fn.name)
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        for layer in layers:
            compile_launches(layer)
    at_startup = len(names)
    draw = random.Random(0)
    for rows in (*range(1, 70), 255, 256, 1024, *(draw.randrange(70, 1025) for _ in range(20))):
        for weight in map(weight_of, layers):
            kernels.multiply(torch.empty(rows, weight.inputs, dtype=torch.bfloat16), weight)
            kernels.gather(torch.zeros(rows, dtype=torch.int64), weight, torch.bfloat16)
    print(json.dumps({"layers": len(layers), "startup": at_startup, "load": names[at_startup:]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
