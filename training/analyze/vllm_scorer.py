"""The same scores through vLLM: `prompt_logprobs` of whole texts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

import hf_attn  # noqa: F401  registers the configuration
from training.analyze.rope import rope_parameters
from training.analyze.scorer import Item, Scored

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VLLMScorer:
    """One engine of unmodified vLLM, in a process of its own, with the checkpoint's own backend.

    Args:
        folder: a Hugging Face folder.
        longest: tokens of the longest item.
        rope_theta_factor: what RoPE's theta is multiplied with.
        kv_cache_memory_bytes: of the paged cache.
        quiet: no progress bars.
    """

    def __init__(
        self,
        folder: Path,
        longest: int,
        rope_theta_factor: float = 1.0,
        kv_cache_memory_bytes: int = 2**30,
        quiet: bool = False,
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        config = AutoConfig.from_pretrained(folder)
        # vLLM refuses prompts beyond the trained length, and its table of RoPE's angles ends there.
        overrides: dict[str, Any] = {
            "max_position_embeddings": max(config.max_position_embeddings, longest + 1)
        }
        if rope_theta_factor != 1.0:
            overrides["rope_parameters"] = rope_parameters(config, rope_theta_factor)
        self.quiet = quiet
        self.llm = LLM(
            model=str(folder),
            dtype="float32",
            max_model_len=longest + 1,  # it insists on generating a token
            hf_overrides=overrides,
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
        """See `Scorer`."""
        prompts = [{"prompt_token_ids": item.tokens} for item in items]
        if not self.quiet:
            print(f"{label}:", flush=True)
        answers = self.llm.generate(prompts, self.sampling, use_tqdm=not self.quiet)
        return [_read(a.prompt_logprobs, i) for a, i in zip(answers, items, strict=True)]

    def close(self) -> None:
        """See `Scorer`."""
        self.llm.llm_engine.engine_core.shutdown(timeout=10)


def _read(prompt_logprobs: Sequence[Any], item: Item) -> Scored:
    """The continuation's scores from vLLM's entries, one `{token: Logprob}` a token."""
    start = len(item.prompt)
    entries = [
        entry[token]
        for entry, token in zip(prompt_logprobs[start:], item.continuation, strict=True)
    ]
    return Scored(
        np.array([entry.logprob for entry in entries], dtype=np.float64),
        np.array([entry.rank == 1 for entry in entries], dtype=np.bool_),
    )
