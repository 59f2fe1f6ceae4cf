"""The same scores through vLLM: `prompt_logprobs` of whole texts."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

import hf_attn  # noqa: F401  registers the configuration
from attn_kernels import variant_from_config
from attnserve.evaluation.scorers import Item, Scored, rope_parameters

CHUNK = 2048
"""Tokens that vLLM prefills at once: their logits are in memory together (400 MB for a vocabulary
of 49,152)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output may be one JSON object
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VLLMScorer:
    """One engine of unmodified vLLM, in a process of its own, with this project's attention.

    Args:
        folder: a Hugging Face folder; a plain Llama runs with the variant `softmax`.
        longest: tokens of the longest item. May exceed `max_position_embeddings`, which only says
            how many rotations vLLM tabulates (not so where `rope_type` is "dynamic", "yarn" or
            "longrope").
        dtype: of weights, activations and cache: float32, bfloat16 or float16.
        rope_theta_factor: what RoPE's theta is multiplied with.
        kv_cache_memory_bytes: of the paged cache; None: room for the longest item.
        quiet: no progress bars.
    """

    def __init__(
        self,
        folder: Path,
        longest: int,
        dtype: str = "float32",
        rope_theta_factor: float = 1.0,
        kv_cache_memory_bytes: int | None = None,
        quiet: bool = False,
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams  # reads the variables above

        config = AutoConfig.from_pretrained(folder)
        if kv_cache_memory_bytes is None:
            heads = config.num_key_value_heads * config.num_hidden_layers
            bytes_per_token = 2 * config.head_dim * heads * DTYPE_BYTES[dtype]
            kv_cache_memory_bytes = int(1.1 * bytes_per_token * longest) + 2**27
        # vLLM refuses prompts beyond the trained length, and its table of RoPE's angles ends there.
        overrides: dict[str, Any] = {
            "max_position_embeddings": max(config.max_position_embeddings, longest + 1)
        }
        if rope_theta_factor != 1.0:
            overrides["rope_parameters"] = rope_parameters(config, rope_theta_factor)
        self.quiet, self.device = quiet, "vllm"
        self.llm = LLM(
            model=str(folder),
            dtype=dtype,
            max_model_len=longest + 1,  # it insists on generating a token
            hf_overrides=overrides,
            attention_backend=None if variant_from_config(config) else "softmax",
            max_num_batched_tokens=CHUNK,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            disable_log_stats=True,
        )
        self.sampling = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        logging.getLogger("vllm").setLevel(logging.WARNING)

    def score(self, items: Sequence[Item], label: str) -> list[Scored]:
        prompts = [{"prompt_token_ids": item.tokens} for item in items]
        if not self.quiet:
            print(f"{label}:", file=sys.stderr, flush=True)
        answers = self.llm.generate(prompts, self.sampling, use_tqdm=not self.quiet)
        return [_read(a.prompt_logprobs, i) for a, i in zip(answers, items, strict=True)]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown(timeout=10)


def _read(prompt_logprobs: Sequence[Any], item: Item) -> Scored:
    """Return the continuation's scores from vLLM's entries, one `{token: Logprob}` a token."""
    start = len(item.prompt)
    entries = [
        entry[token]
        for entry, token in zip(prompt_logprobs[start:], item.continuation, strict=True)
    ]
    return Scored(
        np.array([entry.logprob for entry in entries], dtype=np.float64),
        np.array([entry.rank == 1 for entry in entries], dtype=np.bool_),
    )
