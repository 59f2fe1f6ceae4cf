"""Log-probabilities and greedy tokens of vLLM without a server, many checkpoints in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVE = """
import gc, json, sys
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

asked = json.load(sys.stdin)
prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked["prompts"]]
sampling = SamplingParams(
    max_tokens=asked["num_tokens"], temperature=0, ignore_eos=True, prompt_logprobs=0, logprobs=0
)
for folder, options in asked["jobs"]:
    try:
        llm = LLM(folder, **asked["options"] | options)
        answers = []
        for output in llm.generate(prompts, sampling, use_tqdm=False):
            tokens = list(output.outputs[0].token_ids)
            given = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            chosen = zip(tokens, output.outputs[0].logprobs, strict=True)
            logprobs = [entry[token].logprob for token, entry in (*given, *chosen)]
            answers.append({"tokens": tokens, "logprobs": logprobs})
        found = {"answers": answers}
        if "speculative_config" in options:
            count = {metric.name.rpartition("_num_")[2]: metric for metric in llm.get_metrics()}
            found |= {"drafted": count["draft_tokens"].value}
            found |= {"accepted": count["accepted_tokens"].value}
        llm.llm_engine.engine_core.shutdown()
        del llm, output
    except Exception as error:
        found = {"refused": str(error).strip()}
    print("FOUND", json.dumps(found), flush=True)
    # What it leaves behind is not for the next one; numba, which drafts, does not start twice.
    if "refused" in found or "speculative_config" in options:
        break
    gc.collect()
    cleanup_dist_env_and_memory()
"""

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 24,
    "max_num_batched_tokens": 64,
}

Found = Mapping[str, Any]
"""`answers`: for each prompt its `tokens` and the `logprobs` of prompt and answer; of speculative
decoding the tokens that were `drafted` and `accepted`; or why it was `refused`."""


def answers(
    jobs: Sequence[tuple[Path, Mapping[str, Any]]], prompts: list[list[int]], num_tokens: int
) -> list[Found]:
    """Return what vLLM makes of prompts with each checkpoint and its options (of `vllm.LLM`, beside
    OPTIONS), in as few processes as go."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found: list[Found] = []
    while len(found) < len(jobs):
        rest = [(str(folder), options) for folder, options in jobs[len(found) :]]
        asked = {"jobs": rest, "prompts": prompts, "num_tokens": num_tokens, "options": OPTIONS}
        done = subprocess.run(
            [sys.executable, "-c", SERVE],
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environment},
            input=json.dumps(asked),
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        assert lines, (done.stdout + done.stderr)[-6000:]
        found += [json.loads(line.removeprefix("FOUND ")) for line in lines]
    return found
