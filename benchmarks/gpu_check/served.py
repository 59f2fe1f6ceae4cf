"""`vllm serve` of a checkpoint with CUDA graphs on: its greedy tokens against the law's."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from attnserve.files import CHECKOUT
from benchmarks.gpu_check.checks import Check, Row, SkippedError, Task, require_vllm
from benchmarks.servers import free_port
from serving.launch.process import DIRECT, HOST, Service

CHECKPOINT = CHECKOUT / "checkpoints" / "softpick"
PROMPT_TOKENS, NEW_TOKENS = (5, 40, 120), 24
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.25}
"""Distance of the law's two best logits below which a token may come out the other way."""

LEAST_SECONDS = 20
"""No server is started with less time than this left."""


def agreement(
    answer: Sequence[int], law: Sequence[int], margins: Sequence[float], tie: float
) -> Row:
    """How far the tokens are the law's; a difference at a near tie ends the comparison.

    Args:
        answer, law: tokens.
        margins: of the law's tokens.
        tie: largest margin that is a near tie.
    """
    for index, (found, wanted, margin) in enumerate(zip(answer, law, margins, strict=True)):
        if found != wanted:
            why = f"token {index} is {found}, the law's {wanted} by a margin of {margin:.2g}"
            near = margin <= tie
            detail = f"{why}: a near tie" if near else why
            return {"tokens": index, "status": "ok" if near else "failed", "detail": detail}
    return {"tokens": len(answer), "status": "ok", "detail": ""}


def ask(url: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of all prompts in one request."""
    body: dict[str, Any] = {"model": "model", "prompt": prompts, "max_tokens": NEW_TOKENS}
    body |= {"temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with DIRECT.open(request, timeout=60) as response:
        choices = json.load(response)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda c: int(c["index"]))]


async def answers(
    dtype: str, prompts: Sequence[Sequence[int]], seconds: float
) -> tuple[list[list[int]], str]:
    """What a server says, and its log.

    Args:
        dtype: of the model.
        prompts: token ids.
        seconds: that it may take to start.

    Raises:
        LaunchError: it does not start.
    """
    own = asyncio.current_task()
    assert own is not None
    # Else the server, in a process group of its own, would outlive this process.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, own.cancel)
    service = Service("gpu-check-vllm", free_port(), CHECKOUT / ".run")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(CHECKPOINT)]
    command += [f"--host={HOST}", f"--port={service.url.rpartition(':')[2]}"]
    command += ["--served-model-name=model", "--attention-backend=softpick", f"--dtype={dtype}"]
    command += ["--gpu-memory-utilization=0.3", "--max-model-len=256"]
    try:
        await service.start(command, {})
        ended = asyncio.ensure_future(service.ended())
        ready = asyncio.ensure_future(service.ready("/health"))
        done, _ = await asyncio.wait(
            (ended, ready), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        for task in (ended, ready):
            task.cancel()
        await asyncio.gather(ended, ready, return_exceptions=True)
        if not done:
            raise service.failed(f"did not start in {seconds:.0f} s")
        for task in done:
            task.result()
        return await asyncio.to_thread(ask, service.url, prompts), service.log()
    finally:
        await service.stop()


def check(dtype: str, task: Task) -> Iterable[Row]:
    """A row a prompt, and one that says whether CUDA graphs were captured.

    Raises:
        SkippedError: no vLLM, or not run in the project's checkout.
        LaunchError: the server does not start.
    """
    require_vllm(task.device)
    try:
        from tests.law_model import law_greedy
    except ImportError:
        raise SkippedError("the law of whole models is in tests/: run it in the checkout") from None
    generator = torch.Generator().manual_seed(task.seed)
    vocabulary = json.loads((CHECKPOINT / "config.json").read_text())["vocab_size"]
    prompts = [
        torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_TOKENS
    ]
    left = task.deadline - time.time()
    if left < LEAST_SECONDS:
        raise SkippedError(f"out of time: {left:.0f} s are left to start a server")
    found, log = asyncio.run(answers(dtype, prompts, left))
    rows: list[Row] = []
    for prompt, answer in zip(prompts, found, strict=True):
        law = law_greedy(CHECKPOINT, prompt, NEW_TOKENS)
        row = agreement(answer, law.tokens, law.margins, NEAR_TIE[dtype])
        rows.append({"prompt_tokens": len(prompt), **row})
    captured = "Graph capturing finished" in log
    said = "captured" if captured else "the log does not say that CUDA graphs were captured"
    rows.append({"phase": "CUDA graphs", "status": "ok" if captured else "failed", "detail": said})
    return rows


def checks(task: Task) -> list[Check]:
    """In float32, which must agree, and in the format that people serve."""
    return [
        Check(f"vllm serve softpick {dtype}", functools.partial(check, dtype, task))
        for dtype in NEAR_TIE
    ]
