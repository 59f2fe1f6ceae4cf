"""A model in a process of its own, which `benchmarks.engines` asks for its times. A script without
imports of this project, so that an environment with nothing but llama-cpp-python runs it, too.

Usage: python engine.py vllm FOLDER DTYPE [ATTENTION] | llama.cpp FILE.gguf

It reads lines of two numbers, the tokens of a random prompt and of a greedy answer, and prints for
each the seconds until the first token and those of all later ones, by the clock and by the
process's own (CPU) time, as JSON.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

Engine = Callable[[list[int], int], Iterator[object]]
"""Takes a prompt and the number of tokens; yields with each token."""

CONTEXT = 1024


def vllm(folder: str, dtype: str, backend: str | None = None) -> Engine:
    """Load a checkpoint as `vllm serve` does by default, compiled, but in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.inputs import TokensPrompt

    arguments = EngineArgs(
        model=folder,
        dtype=dtype,
        attention_backend=backend,
        max_model_len=CONTEXT,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=128 << 20,
    )
    engine = LLMEngine.from_engine_args(arguments)
    numbers = iter(range(sys.maxsize))

    def run(prompt: list[int], tokens: int) -> Iterator[object]:
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        engine.add_request(str(next(numbers)), TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            yield from engine.step()

    return run


def llama_cpp(file: str) -> Engine:
    """Load a GGUF file in llama.cpp, with one thread."""
    import llama_cpp

    model = llama_cpp.Llama(
        file, n_ctx=CONTEXT, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False
    )

    def run(prompt: list[int], tokens: int) -> Iterator[object]:
        model.reset()
        model.eval(prompt)
        for last in range(1 - tokens, 1):
            token = model.sample(temp=0)
            yield token
            if last:
                model.eval([token])

    return run


def main() -> None:
    kind, *arguments = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    run = vllm(*arguments) if kind == "vllm" else llama_cpp(*arguments)
    generator = random.Random(0)
    for line in sys.stdin:
        length, tokens = map(int, line.split())
        prompt = [generator.randrange(100, 30000) for _ in range(length)]
        clocks = [(time.perf_counter(), time.process_time())]
        clocks += [(time.perf_counter(), time.process_time()) for _ in run(prompt, tokens)]
        if len(clocks) != tokens + 1:
            raise RuntimeError(f"{len(clocks) - 1} tokens instead of {tokens}")
        first, rest = (
            [after - before for before, after in zip(*pair, strict=True)]
            for pair in (clocks[:2], (clocks[1], clocks[-1]))
        )
        print(json.dumps({"first": first, "rest": rest}), file=answers, flush=True)


if __name__ == "__main__":
    main()
