"""Write chats that a chat model makes up, to train on where there are none."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs
from attnserve.errors import UserError
from attnserve.files import check_writable, replacing

USER = "\ufdd0"
"""Stands for what a user says in the output of a chat template: a character of no text."""
CACHE_BYTES = 2**30  # of vLLM's cache


@needs("train")
def chats(
    source: Annotated[
        Path, Argument(metavar="SRC", help="Folder of a chat model.", show_default=False)
    ],
    out: Annotated[
        Path, Argument(metavar="OUT", help="File to write: *.jsonl.", show_default=False)
    ],
    count: Annotated[int, Option(min=1, help="Chats to begin; some do not end in time.")] = 1000,
    tokens: Annotated[int, Option(min=1, help="Of a question or an answer, at most.")] = 400,
    temperature: Annotated[float, Option(min=0.01, help="Of the sampling.")] = 0.8,
    seed: Annotated[int, Option(help="Of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write chats that a chat model makes up.

      python -m training.chats smollm2 chats.jsonl

    Behind the head of a user's turn a chat model writes a question, of the kind that it was
    trained on, and then answers it (Magpie, arXiv 2406.08464). OUT is --data of training.convert,
    so that a converted model still chats.
    """
    from attnserve.evaluation.checkpoint import Checkpoint
    from attnserve.evaluation.vllm_scorer import ENVIRONMENT

    if out.suffix != ".jsonl":
        raise UserError(f"{out} must be named *.jsonl: training.convert knows it by that")
    check_writable(out)
    checkpoint = Checkpoint(source)
    tokenizer = checkpoint.tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"{source} has no chat template: name a chat model")

    def asked(text: str) -> str:
        user = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True))

    longest = len(checkpoint.encode(asked(""))) + 2 * tokens + 1
    if longest > checkpoint.config.max_position_embeddings:
        raise UserError(
            f"a chat may have {longest} tokens, and {source} reads "
            f"{checkpoint.config.max_position_embeddings}: lower --tokens"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM, SamplingParams  # reads the variables above
    except ImportError as error:
        raise UserError(f"vLLM is not installed ({error}): pip install 'attnserve[cpu]'") from None

    llm = LLM(
        model=str(source),
        seed=seed,
        max_model_len=longest,
        kv_cache_memory_bytes=CACHE_BYTES,
        enforce_eager=True,
        disable_log_stats=True,
    )

    def written(texts: Sequence[str]) -> list[str]:
        """Return how texts go on; nothing where that has no end in time."""
        prompts = [{"prompt_token_ids": checkpoint.encode(text)} for text in texts]
        sampling = SamplingParams(temperature=temperature, max_tokens=tokens)
        outputs = [each.outputs[0] for each in llm.generate(prompts, sampling)]
        return [one.text.strip() if one.finish_reason == "stop" else "" for one in outputs]

    questions = [
        text
        for text in written([asked(USER).partition(USER)[0]] * count)
        if text and len(checkpoint.encode(text)) <= tokens  # read, it may have more than written
    ]
    answers = written([asked(question) for question in questions]) if questions else []
    found = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers, strict=True)
        if answer
    ]
    llm.llm_engine.engine_core.shutdown(timeout=10)
    if not found:
        raise UserError(f"none of {count} chats ended within {tokens} tokens a turn: allow more")
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in found)
    record = {"file": str(out), "chats": len(found), "begun": count}
    print(json.dumps(record) if as_json else f"{out}: {len(found)} of {count} chats")


if __name__ == "__main__":
    main(chats, "python -m training.chats")
