"""How well a checkpoint predicts the tokens of a text, as vLLM serves it with our kernels.

transformers computes variants densely, with `num_tokens ** 2` scores in memory; here the text is
prefilled through the paged kernels, so that tens of thousands of tokens are no problem.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

import hf_attn  # noqa: F401  registers the model class
from training.data import Tokens

CHUNK = 2048
"""Tokens that vLLM prefills at once: their logits are in memory together (400 MB for a vocabulary
of 49,152)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Scorer:
    """One engine of vLLM, in a process of its own.

    Args:
        checkpoint: a Hugging Face folder; a plain Llama runs with the variant `softmax`.
        length: the most tokens that a text has. It may exceed the checkpoint's
            `max_position_embeddings`, which only says how many rotations vLLM tabulates (not so
            where `rope_type` is "dynamic", "yarn" or "longrope").
        dtype: of weights, activations and cache: float32, bfloat16 or float16.
    """

    def __init__(self, checkpoint: Path, length: int, dtype: str = "float32") -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams  # reads the variables above

        config = AutoConfig.from_pretrained(checkpoint)
        positions = max(length + 1, config.max_position_embeddings)
        heads = config.num_key_value_heads * config.num_hidden_layers
        bytes_per_token = 2 * config.head_dim * heads * DTYPE_BYTES[dtype]
        self.llm: Any = LLM(
            model=str(checkpoint),
            dtype=dtype,
            max_model_len=length + 1,
            hf_overrides={"max_position_embeddings": positions},
            attention_backend=None if hasattr(config, "attention_variant") else "softmax",
            max_num_batched_tokens=CHUNK,
            max_num_seqs=1,
            kv_cache_memory_bytes=int(1.1 * bytes_per_token * length) + 2**27,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
        )
        self.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)

    def losses(self, tokens: Tokens) -> NDArray[np.float64]:
        """`-ln p` of each token but the first, given those before it: `[num_tokens - 1]`, nats."""
        ids = tokens.tolist()
        (answer,) = self.llm.generate({"prompt_token_ids": ids}, self.sampling, use_tqdm=False)
        given = answer.prompt_logprobs[1:]
        pairs = zip(ids[1:], given, strict=True)
        return -np.array([entry[token].logprob for token, entry in pairs])

    def close(self) -> None:
        """End the engine and its process."""
        self.llm.llm_engine.engine_core.shutdown()
