"""Decode and prefill of one request: packed weights in vLLM beside stock vLLM and llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.checkpoints import check_room, packed_name, variant_of

CSV = RESULTS / "quantized_cpu.csv"
SCRIPT = Path(__file__).with_name("engine.py")
PROMPT, LONG_PROMPT = 64, 512


@dataclass
class Engine:
    """One process of `engine.py`, and the tokens/s that it gave.

    Attributes:
        weights, activations: of its row.
        command: starts it.
        environment: more of it.
    """

    weights: str
    activations: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    def start(self, log: Path) -> None:
        """Start it; its log is its standard error."""
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.environment}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | environment,
            )

    def ask(self, length: int, tokens: int) -> dict[str, list[float]]:
        """Return what `engine.py` prints for a prompt and an answer."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{length} {tokens}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            words = self.log.read_text().strip().splitlines()[-1:]
            raise UserError(f"{self.weights} ended: {' '.join(words)} (log: {self.log})")
        found: dict[str, list[float]] = json.loads(line)
        return found

    def measure(self, new_tokens: int, clock: int) -> None:
        """Add one round."""
        self.decode.append(new_tokens / self.ask(PROMPT, new_tokens + 1)["rest"][clock])
        self.prefill.append(LONG_PROMPT / self.ask(LONG_PROMPT, 1)["first"][clock])


def engines(
    packed: Annotated[Path, opt.folder("Folder that quant.quantize has written.")],
    ckpt: Annotated[Path, opt.folder("The same model unquantized, for stock vLLM.")],
    gguf: Annotated[Path | None, opt.folder("The same model for llama.cpp, say in Q4_0.")] = None,
    llama_python: Annotated[
        str, opt.option("Python of the environment that has llama-cpp-python.")
    ] = sys.executable,
    dtypes: Annotated[
        list[opt.Dtype] | None, opt.option("Of activations and unpacked weights (default: both).")
    ] = None,
    backend: Annotated[
        str, opt.option("Attention of the packed model; stock vLLM has its own.")
    ] = "softmax",
    new_tokens: opt.NewTokens = 64,
    rounds: Annotated[int, opt.count("Rounds, in each of which all take a turn.")] = 5,
    clock: Annotated[
        Literal["wall", "cpu"],
        opt.option("cpu: the process's own time, for machines that others use, too."),
    ] = "wall",
    log_folder: opt.LogFolder = Path(".run"),
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> None:
    """Compare packed weights in vLLM with stock vLLM and llama.cpp, one request, one thread.

    Each is a process without a server, so that engines are compared, not their servers. All are
    loaded first and then take turns. Decode is what comes after 64 tokens of a random prompt;
    prefill reads one of 512. Ratios are to the first row in the same round: llama.cpp's, or stock
    vLLM's.

        python -m benchmarks.engines --packed w4 --ckpt smollm2 --gguf q4_0.gguf \\
            --llama-python llama/bin/python
    """
    chosen = [str(dtype) for dtype in dtypes or [opt.Dtype.FLOAT32, opt.Dtype.BFLOAT16]]
    for folder in (packed, ckpt):
        check_room(folder, LONG_PROMPT + new_tokens)
    name = packed_name(packed)
    save = results.checked(csv, no_save)
    script = [sys.executable, str(SCRIPT), "vllm"]
    every = []
    if gguf is not None:
        command = [llama_python, str(SCRIPT), "llama.cpp", str(gguf)]
        every.append(Engine(f"llama.cpp {gguf.stem}", "its own", command))
    # vLLM serves what is not a variant's without this project.
    alone = {} if variant_of(ckpt) else {"VLLM_PLUGINS": ""}
    every += [
        Engine(dtype, dtype, [*script, str(ckpt), dtype, "CPU_ATTN"], alone) for dtype in chosen
    ]
    every += [Engine(name, dtype, [*script, str(packed), dtype, backend]) for dtype in chosen]
    log_folder.mkdir(parents=True, exist_ok=True)
    try:
        for number, engine in enumerate(every):
            print(f"starting {engine.weights}", file=sys.stderr, flush=True)
            engine.start(log_folder / f"engine-{number}.log")
            for length, tokens in ((PROMPT, 4), (LONG_PROMPT, 1)):
                engine.ask(length, tokens)
        for index in range(rounds):
            for engine in every[:: -1 if index % 2 else 1]:
                engine.measure(new_tokens, int(clock == "cpu"))
    finally:
        for engine in every:
            if hasattr(engine, "process"):
                engine.process.kill()
                engine.process.wait()
    found = [row_of(engine, every[0]) for engine in every]
    about = {
        **machine.described(),
        "threads": 1,
        "model": ckpt.resolve().name,
        "mode": "engine",
        "clock": clock,
        "backend": backend,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "prompt_len": PROMPT,
        "prefill_len": LONG_PROMPT,
        "batch": 1,
    }
    results.report(about, found, results.table(shown(found)), csv=save, as_json=as_json)


def row_of(engine: Engine, peer: Engine) -> results.Row:
    """Return a row: tokens/s, and ratios to the peer in the same rounds."""
    row: results.Row = {"weights": engine.weights, "activations": engine.activations}
    for phase in ("decode", "prefill"):
        mine, its = getattr(engine, phase), getattr(peer, phase)
        row |= results.spread(f"{phase}_tokens_per_s", mine)
        row |= results.spread(f"{phase}_ratio", np.divide(mine, its))
    return row


def shown(rows: Sequence[results.Row]) -> list[results.Row]:
    """Return the rows of a table for people."""
    return [
        {
            "weights": row["weights"],
            "activations": row["activations"],
            **{
                f"{phase} {what}": results.shown(row, f"{phase}_{column}", digits)
                for phase in ("decode", "prefill")
                for what, column, digits in (("tokens/s", "tokens_per_s", 1), ("x", "ratio", 2))
            },
        }
        for row in rows
    ]


if __name__ == "__main__":
    main(engines, "python -m benchmarks.engines")
