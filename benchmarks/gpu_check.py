"""What a GPU at hand must show, in 15 minutes: `python -m benchmarks.gpu_check`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from attn_kernels import get_variant
from attnserve.command import AsJson, main
from attnserve.errors import UserError
from attnserve.files import CHECKOUT, check_writable, write_text
from benchmarks import options as opt
from benchmarks import results

Stage = StrEnum("Stage", ["CORRECTNESS", "TUNE", "TIMES", "PACKED", "SERVING", "TOKENS"])

SECONDS = {
    Stage.CORRECTNESS: 100,
    Stage.TUNE: 240,
    Stage.TIMES: 110,
    Stage.PACKED: 45,
    Stage.SERVING: 265,
    Stage.TOKENS: 90,
}
"""Longest time of each: 850 s together."""

GRACE = 15
"""Seconds in which a stage that was told to end may end what it has started."""

TESTS = [
    f"tests/gpu/test_{name}.py" for name in ("graph", "packed", "hopper", "attention", "training")
]
"""Those of attention come late: there are hundreds, and the first of each file have seen something
of everything."""

VARIANTS = ("softpick", "softmax", "lssa", "lssar", "selective")
"""The others' kernels are much like these: ssmax's like softmax's."""

PEERS = ("vLLM FlashAttention", "vLLM Triton")
"""Those that need no compiling: FlexAttention takes as long as all the others."""


@dataclass(frozen=True)
class Run:
    """Where and how the stages run.

    Attributes:
        out: folder of the results.
        dry: tiny, on the CPU.
        jobs: processes of tests and of compilers.
        variants: which are tuned and timed.
        candidates: a list of what `attnserve tune` tries, if there is one.
    """

    out: Path
    dry: bool
    jobs: int
    variants: tuple[str, ...]
    candidates: Path | None = None

    def command(self, stage: Stage, seconds: float) -> list[str]:
        """Return what a stage runs, which ends by itself before `seconds` have passed."""
        device = ["--device=cpu"] if self.dry else []
        variants = ["--variants", *self.variants]
        within = f"--minutes={max(seconds - 20, 1) / 60:.3f}"
        match stage:
            case Stage.CORRECTNESS:
                # Of the CPU's, two of attention.
                few = ["tests/gpu/test_attention.py", "-k", "softpick or slightly"]
                return self._tests(seconds, *(few if self.dry else TESTS))
            case Stage.TUNE:
                dry = ["--variants", "softpick", "--phases", "decode"] if self.dry else variants
                module = ["-m", "attnserve.tune.command", *device, *dry]
                module += [f"--candidates={self.candidates}"] if self.candidates else []
                return [*module, f"--out={self.out / 'tiles'}", f"--jobs={self.jobs}", within]
            case Stage.TIMES:
                dry = ["--variants", "softpick"] if self.dry else [*variants, "--peers", *PEERS]
                csv = f"--csv={self.out / 'gpu.csv'}"
                return ["-m", "benchmarks.gpu", *device, *dry, csv, within]
            case Stage.PACKED:
                csv = f"--csv={self.out / 'gpu_packed.csv'}"
                return ["-m", "benchmarks.gpu_packed", *device, csv, within]
            case Stage.SERVING:
                dry = ["--engines", "selective:8", "--new-tokens=5"] if self.dry else []
                where = [f"--csv={self.out / 'gpu_serving.csv'}", f"--log-folder={self.out}"]
                limit = f"--seconds={seconds if self.dry else min(seconds, 90)}"
                return ["-m", "benchmarks.gpu_serving", *device, *dry, *where, limit, within]
            case _:
                return self._tests(seconds, "tests/gpu/test_served.py")

    def _tests(self, seconds: float, *arguments: str) -> list[str]:
        """Return how tests are run: on a GPU those that need one, on the CPU the others."""
        command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
        command += [f"--session-timeout={max(seconds - 10, 1):.0f}"]
        if self.dry:
            return [*command, "-m", "not gpu", "-n0"]
        return [*command, "-m", "gpu", f"-n{self.jobs}", "--dist=loadgroup"]

    def environment(self) -> dict[str, str]:
        """Return the stages' environment: the tiles that the second finds count for the others."""
        found = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        found["ATTNSERVE_TRITON_CONFIGS"] = str(self.out / "tiles")
        return found | {"TRITON_INTERPRET": "1" if self.dry else "0"}


def gpu_check(
    out: Annotated[Path, opt.folder("Folder of the results.")] = Path(".run/gpu-check"),
    only: Annotated[list[Stage] | None, opt.option("Which stages (default: all).")] = None,
    seconds: Annotated[
        list[str] | None,
        opt.option("Longest time of stages, like tune=420.", metavar="STAGE=SECONDS"),
    ] = None,
    variants: Annotated[
        list[str] | None,
        opt.option(f"Which are tuned and timed. Default: {' '.join(VARIANTS)}."),
    ] = None,
    candidates: Annotated[
        Path | None,
        opt.folder("What attnserve tune tries: a list by benchmarks.triton_compile.candidates."),
    ] = None,
    jobs: Annotated[int, opt.count("Processes of tests and of compilers.")] = opt.CORES,
    dry: Annotated[
        bool, opt.option("All stages tiny on a CPU, to try the command itself.", "--dry")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Check, tune and time the GPU kernels, in 15 minutes and in this order:

      correctness   tests/gpu against the float64 reference, but for servers: 100 s
      tune          attnserve tune; the stages that follow use its tiles: 240 s
      times         benchmarks.gpu, beside FlashAttention and vLLM's Triton kernel: 110 s
      packed        benchmarks.gpu_packed, beside vLLM's Marlin and torch: 45 s
      serving       benchmarks.gpu_serving, vLLM's rates by attention: 265 s
      tokens        tests/gpu/test_served.py: greedy tokens are those of the reference: 90 s

    Each stage is ended after its time and the next one begins; what it has found by then is in the
    folder, with its output in STAGE.log, and summary.json says how each has ended. Nothing is
    downloaded. Run again, tune, times and serving go on where they were.
    """
    for name in variants or ():
        get_variant(name)
    limits = {**SECONDS, **dict(map(limit_of, seconds or ()))}
    if not dry:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"torch {torch.__version__} finds no GPU; --dry tries the stages here")
    out = out.absolute()
    check_writable(out / "summary.json")
    out.mkdir(parents=True, exist_ok=True)
    listed = candidates.absolute() if candidates else None
    setup = Run(out, dry, jobs, tuple(variants or VARIANTS), listed)
    stages = [stage for stage in Stage if stage in (only or Stage)]
    rows: list[results.Row] = []
    for stage in stages:
        limit = limits[stage]
        print(f"{stage} (at most {limit:.0f} s) ...", file=sys.stderr, flush=True)
        rows.append(run(stage, setup.command(stage, limit), setup.environment(), out, limit))
        write_text(out / "summary.json", json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"out": str(out), "stages": rows}) if as_json else results.table(rows))
    return int(any(row["exit code"] for row in rows))


def limit_of(text: str) -> tuple[Stage, float]:
    """Return a stage and its seconds from `tune=420`."""
    name, _, value = text.partition("=")
    try:
        found = Stage(name), float(value)
        if not found[1] > 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--seconds {text}: give STAGE=SECONDS with one of {', '.join(Stage)}"
        ) from None
    return found


def run(
    stage: Stage, command: Sequence[str], environment: dict[str, str], out: Path, seconds: float
) -> dict[str, Any]:
    """Run a stage, its output in a log, and end it and its children after its time."""
    log = out / f"{stage}.log"
    began = time.monotonic()
    late = False
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
    took = round(time.monotonic() - began, 1)
    row = {"stage": str(stage), "s": took, "exit code": process.returncode, "late": late}
    return row | {"last line": last_line(log)}


def end(process: subprocess.Popen[bytes]) -> None:
    """Tell a process and its children to end, then kill what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def last_line(log: Path) -> str:
    """Return the last line of a log that says anything."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip(" =\r")), "")


if __name__ == "__main__":
    main(gpu_check, "python -m benchmarks.gpu_check")
