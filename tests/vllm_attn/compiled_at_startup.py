"""A program for test_compiled_at_startup: how many kernels a server of a checkpoint compiles when
it starts on a GPU, and which ones a mixed load compiles then.

vLLM runs on the CPU; its builder's `compile_launches` and the layers that it binds are those of a
GPU, by a driver that compiles for one and launches nothing.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch


def main(checkpoint: str, variant: str, overrides: str) -> None:
    from vllm import LLM

    llm: Any = LLM(
        checkpoint,
        attention_backend=variant,
        hf_overrides=json.loads(overrides),
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        max_num_batched_tokens=4096,
        max_num_seqs=64,
    )
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    builder = runner.attn_groups[0][0].get_metadata_builder()

    import triton

    from benchmarks.triton_compile.dry import TARGETS, DryCompiler

    compiler = DryCompiler(Path(os.environ["TRITON_CACHE_DIR"]))
    compiler.device = list(TARGETS).index("sm_90")
    names: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: names.append(fn.name)
    refused = with_a_broken_table(builder)
    builder.compile_launches()
    at_startup = len(names)
    load(builder, next(module for module in runner.model.modules() if hasattr(module, "impl")))
    print(json.dumps({"startup": at_startup, "load": names[at_startup:], "refused": refused}))


def with_a_broken_table(builder: Any) -> str:
    """Return how a server is refused whose user has a table of tiles that is none; empty: not at
    all, since layers within budgets have no tables."""
    from vllm_attn.report import StartupError

    table = Path(os.environ["ATTNSERVE_TRITON_CONFIGS"]) / "sm_90.json"
    table.write_text("{")
    try:
        builder.compile_launches()
    except StartupError as error:
        return str(error)
    finally:
        table.unlink()
    return ""


def load(builder: Any, layer: Any) -> None:
    """Attend with batches of prefills and decodes as vLLM makes them."""
    from attn_kernels.batch import Batch

    spec = builder.kv_cache_spec
    states = spec.get_num_kernel_states(spec.block_size)
    size = 64, spec.num_heads, states, spec.state_content_size_bytes
    bound = layer.impl.bind_triton(layer, torch.zeros(size, dtype=torch.uint8).view(spec.dtype))
    heads = [bound.num_heads, bound.num_kv_heads, bound.num_kv_heads]
    dtype = builder.vllm_config.model_config.dtype
    draw = random.Random(0)
    for _ in range(40):
        decodes = draw.randrange(40)
        lens = [1] * decodes + [draw.randrange(2, 900) for _ in range(draw.randrange(4))] or [1]
        tokens = sum(lens)
        batch = Batch(
            torch.zeros(len(lens), draw.randrange(1, 99), dtype=torch.int32),
            torch.tensor([0, *lens]).cumsum(0),
            torch.tensor(lens),
            torch.full((tokens,), -1),
            max_query_len=max(lens),
            max_seq_len=draw.randrange(max(lens), 1025),
            num_decodes=decodes,
        )
        qkv = torch.empty(tokens, sum(heads), bound.head_size, dtype=dtype).split(heads, 1)
        out = torch.empty(tokens, bound.num_heads, bound.head_size, dtype=dtype)
        if bound.variant.gated:
            bound.write_gates(torch.empty(tokens, bound.num_heads), batch)
        bound.step(*qkv, batch, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
