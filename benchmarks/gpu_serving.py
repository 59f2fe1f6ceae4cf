"""Prefill and decode rates of vLLM on a GPU, by attention: `python -m benchmarks.gpu_serving`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.gpu import described
from benchmarks.gpu_engine import PREFIX, Arguments

CSV = RESULTS / "gpu_serving.csv"

ENGINES = (
    *("FLASH_ATTN", "TRITON_ATTN", "softmax", "softpick", "lssar", "selective"),
    "selective:256",
)
LOADS = ((8, 8192), (32, 4096), (1, 12288), (64, 8192))
"""Requests and tokens of each prompt. Of the last a cache of 5 GiB holds a quarter."""

DRY_ENGINES = ("CPU_ATTN", "selective:8")
DRY_LOADS = ((2, 40), (6, 100))

COLUMNS = {
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "decode_ms_per_step": "ms a step",
    "in_flight": "in flight",
}
COMPARED = ("prefill_tokens_per_s", "decode_tokens_per_s", "in_flight")


def gpu_serving(
    engines: Annotated[
        list[str] | None,
        opt.option(
            f"vLLM's attention backends and variants, NAME or NAME:BUDGET. Default: "
            f"{' '.join(ENGINES)}."
        ),
    ] = None,
    minutes: Annotated[float, opt.option("No engine starts after this time.", min=0)] = 5.0,
    seconds: Annotated[float, opt.option("An engine is ended after this time.", min=1)] = 120.0,
    layers: Annotated[int, opt.count("Of the model.")] = 8,
    new_tokens: Annotated[int, opt.option("Tokens of an answer.", min=2)] = 65,
    kv_cache_memory_bytes: opt.CacheBytes = 5 << 30,
    compiled: Annotated[
        bool, opt.option("Compile the model, as vLLM does by default.", "--compiled")
    ] = False,
    device: Annotated[
        Literal["cuda", "cpu"], opt.option("cpu: tiny models, to try the command itself.")
    ] = "cuda",
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    log_folder: opt.LogFolder = Path(".run"),
    as_json: AsJson = False,
) -> int:
    """Measure vLLM's rates with each kind of attention, one engine after another.

    The model has the shape of Llama 3.1 8B's layers, fewer of them, and random weights, so that
    only times mean anything. Loads: 8 prompts of 8192 tokens, 32 of 4096, 1 of 12288, and 64 of
    8192, of which the KV cache holds a quarter unless layers have budgets.

      prefill    prompts whose answers are one token: of small loads the faster of two runs
      decode     what answers of --new-tokens take beyond that
      in flight  the most requests that ran at once

    Each row is added to the CSV as soon as it is measured. The last columns are ratios to the first
    engine. Run again, the command goes on with the engines of which the CSV lacks rows of this GPU,
    commit and software; one that fails or takes too long is named, and the exit code is 1.
    """
    dry = device == "cpu"
    names = engines or list(DRY_ENGINES if dry else ENGINES)
    loads = DRY_LOADS if dry else LOADS
    made = {
        name: arguments_of(
            name, dry=dry, layers=2 if dry else layers, loads=loads, new_tokens=new_tokens,
            kv_bytes=1 << 20 if dry else kv_cache_memory_bytes, compiled=compiled,
            folder=log_folder,
        )
        for name in names
    }  # fmt: skip
    if not dry:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"torch {torch.__version__} finds no GPU; --device cpu tries the command itself"
            )
    about = described(device) | {"layers": next(iter(made.values())).layers}
    about |= {"kv_bytes": next(iter(made.values())).kv_bytes, "compiled": compiled}
    save = results.checked(csv, no_save)
    deadline = time.monotonic() + 60 * minutes
    rows: list[results.Row] = []
    faults = []
    for name, arguments in made.items():
        kept = known(save, about, name, len(loads))
        if kept:
            print(f"{name}: taken from {save}", file=sys.stderr)
            rows += kept
            continue
        if time.monotonic() > deadline:
            faults.append(f"{name}: out of time, run again")
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        log = log_folder / f"gpu-engine-{name.replace(':', '-')}.log"
        found = 0
        for row in run(arguments, log, seconds):
            row = {"engine": name, **row}
            rows.append(row)
            found += 1
            if save is not None:
                results.append_csv(save, about, [row])
        if found <= len(loads):  # the first row is of the start
            faults.append(f"{name}: {found} of {len(loads) + 1} rows, see {log}")
    results.report(
        {**about, "faults": faults}, rows, table(rows, names[0]), csv=None, as_json=as_json
    )
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def arguments_of(name: str, *, dry: bool, folder: Path, **given: Any) -> Arguments:
    """Return what an engine is made with.

    Raises:
        UserError: there is no such variant, or it takes no budget.
    """
    from attn_kernels import VariantError, get_variant

    backend, _, budget = name.partition(":")
    if budget and not budget.isdigit():
        raise UserError(f"--engines {name}: {budget!r} is no number of tokens")
    try:
        prunable = backend.islower() and get_variant(backend).prunable
    except VariantError as error:
        raise UserError(f"--engines {name}: {error}") from None
    if budget and not prunable:
        raise UserError(f"--engines {name}: {backend} takes no budgets")
    own = str(folder / f"gpu-engine-{name.replace(':', '-')}")
    return Arguments(backend, int(budget or 0), tiny=dry, folder=own, **given)


def known(csv: Path | None, about: dict[str, Any], engine: str, loads: int) -> list[results.Row]:
    """Return an engine's rows in the CSV, if all are there."""
    if csv is None or not csv.exists():
        return []
    frame = results.read_csv(csv)
    same = {**{key: str(value) for key, value in about.items() if key != "date"}, "engine": engine}
    if not set(same) <= set(frame.columns):
        return []
    frame = frame[(frame[list(same)] == list(same.values())).all(axis=1)]
    if len(frame) <= loads:
        return []
    return [
        {k: v if k in ("engine", "load") else float(v) for k, v in row.items() if v != ""}
        for row in frame.drop(columns=list(about)).to_dict("records")
    ]


def run(arguments: Arguments, log: Path, seconds: float) -> Iterator[results.Row]:
    """Yield what an engine measures, as soon as it says so; end it and all its children after
    `seconds`. Everything else that it prints goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_engine"]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(arguments))],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(seconds, end, (process,))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(PREFIX):
                    yield json.loads(line.removeprefix(PREFIX))
                else:
                    file.write(line)
        finally:
            timer.cancel()
            end(process)
            process.wait()


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def table(rows: list[results.Row], first: str) -> str:
    """Return a line an engine and load, with ratios to the first engine."""
    peers = {row["load"]: row for row in rows if row["engine"] == first}
    lines = []
    for row in rows:
        line = {"engine": row["engine"], "load": row["load"]}
        if row["load"] == "start":
            lines.append(line | {"s": f"{row['s']:.1f}"})
            continue
        line |= {text: f"{row[name]:.4g}" for name, text in COLUMNS.items()}
        if peer := peers.get(row["load"]):
            ratios = "/".join(f"{row[name] / max(peer[name], 1):.2f}" for name in COMPARED)
            line[f"of {first}"] = ratios
        lines.append(line)
    return results.table(lines)


if __name__ == "__main__":
    main(gpu_serving, "python -m benchmarks.gpu_serving")
