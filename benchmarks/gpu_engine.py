"""One vLLM engine with random weights, for `benchmarks.gpu_serving`, in a process of its own.

Usage: python -m benchmarks.gpu_engine ARGUMENTS, a JSON object of `Arguments`. It prints a line
`ROW {...}` for the start and for each load, as soon as that is measured.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "ROW "

TWICE = 1 << 18
"""Tokens of prompts, at most, of a load whose prefill is measured twice."""

RUNNING = "vllm:num_requests_running"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}  # fmt: skip
"""The shape of Llama 3.1 8B's layers."""

TINY = LLAMA | {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 512,
    "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """What an engine is.

    Attributes:
        backend: vLLM's name of an attention backend, or a variant's.
        budget: tokens that each layer of a variant keeps; 0: all.
        layers: of the model.
        tiny: a tiny model, for a dry run on a CPU.
        kv_bytes: of the KV cache.
        compiled: the model is compiled, as vLLM does by default; else it only has CUDA graphs.
        loads: requests and tokens of each prompt.
        new_tokens: of each answer.
        folder: where config.json is written.
    """

    backend: str
    budget: int
    layers: int
    tiny: bool
    kv_bytes: int
    compiled: bool
    loads: list[tuple[int, int]]
    new_tokens: int
    folder: str

    def config(self) -> dict[str, Any]:
        """Return the model's config.json."""
        config = {**(TINY if self.tiny else LLAMA), "num_hidden_layers": self.layers}
        if self.backend.islower():  # a variant
            variant: dict[str, Any] = {"name": self.backend}
            if self.budget:
                variant["kv_budgets"] = [self.budget] * self.layers
            config |= {"architectures": ["VariantLlamaForCausalLM"], "model_type": "variant_llama"}
            config["attention_variant"] = variant
        return config

    def options(self) -> dict[str, Any]:
        """Return those of `vllm.LLM`."""
        longest = max(length for _, length in self.loads) + self.new_tokens
        options: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "attention_backend": self.backend,
            "max_model_len": longest,
            "kv_cache_memory_bytes": self.kv_bytes,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 512 if self.tiny else 8192,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        if self.tiny:
            options["enforce_eager"] = True
        elif not self.compiled:
            sizes = sorted({1, *(batch for batch, _ in self.loads)})
            graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
            options["compilation_config"] = {"mode": 0, **graphs}
        return options


@contextmanager
def most_running(llm: Any) -> Iterator[list[int]]:
    """Yield a list, whose last entry at the end is the most requests that ran at once."""
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.004):
            now = [metric.value for metric in llm.get_metrics() if metric.name == RUNNING]
            found.append(max(found[-1], int(sum(now))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measured(
    llm: Any, load: Sequence[int], new_tokens: int, vocabulary: int, rng: random.Random
) -> dict[str, Any]:
    """Return the rates of a load: of prefill from answers of one token, of small loads the faster
    of two runs; of decode from what longer answers take beyond that."""
    from vllm import SamplingParams

    batch, length = load

    def seconds(tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(3, vocabulary) for _ in range(length)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False
        )
        began = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        took = time.perf_counter() - began
        found = {len(answer.outputs[0].token_ids) for answer in answers}
        if len(answers) != batch or found != {tokens}:
            raise RuntimeError(f"{len(answers)} answers of {found} tokens")
        return took

    prefill = min(seconds(1) for _ in range(2 if batch * length <= TWICE else 1))
    with most_running(llm) as running:
        whole = seconds(new_tokens)
    decode = whole - prefill
    return {
        "load": f"{batch} x {length}",
        "prefill_tokens_per_s": batch * length / prefill,
        "decode_tokens_per_s": batch * (new_tokens - 1) / decode,
        "decode_ms_per_step": decode / (new_tokens - 1) * 1e3,
        "tokens_per_s": batch * new_tokens / whole,
        "in_flight": running[-1],
    }


def main() -> None:
    arguments = Arguments(**json.loads(sys.argv[1]))
    config = arguments.config()
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if arguments.tiny:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    began = time.perf_counter()
    from vllm import LLM

    llm = LLM(str(folder), **arguments.options())
    started = time.perf_counter() - began
    print(PREFIX + json.dumps({"load": "start", "s": started}), flush=True)
    rng = random.Random(0)
    batch, length = arguments.loads[0]
    measured(llm, (min(batch, 2), min(length, 512)), 4, config["vocab_size"], rng)  # warm
    for load in arguments.loads:
        row = measured(llm, load, arguments.new_tokens, config["vocab_size"], rng)
        print(PREFIX + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
