"""The measurements of a comparison, each of which keeps what it has measured in a folder."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from attn_kernels import get_variant
from attnserve import machine, programs
from attnserve.budgets import run as pruning
from attnserve.budgets.result import Found
from attnserve.budgets.texts import parts_of
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from attnserve.evaluation.texts import read
from quant import runner, store
from quant.config import QuantConfig, Samples, SearchSpace
from quant.store import SweepResult
from quant.texts import Sources
from training.analyze.run import analyze
from training.analyze.settings import AnalysisSettings
from training.analyze.store import Stored
from training.compare.effort import MULTIPLE, Effort

FACTORS = {"ssmax": 50.0}
"""By what the paper of a variant multiplies RoPE's theta for long contexts."""
SHORT = ("perplexity", "attention")
LONG = ("length", "passkey")
SETS = ("lambada", "blimp")
FULL = (errno.ENOSPC, errno.EDQUOT)
SLACK = 32  # tokens that `benchmarks.serve` adds to a request


@dataclass
class Comparison:
    """What is compared, and what was measured of it.

    Args:
        original: the softmax checkpoint.
        converted: the others.
        data: the text, and the evaluation sets if there are any.
        calibration: a text to calibrate on; None: the original writes it.
        context: tokens that the original was trained with.
        effort: how much to measure.
        device: where transformers runs the models.
        jobs: processes of the sweep.
        force: measure again what is there.
        out: the folder of everything.
        results, quantization, budgets, served: what was measured.
        failures: what failed, and why.
        left_out: what was not measured, and why.
    """

    original: Checkpoint
    converted: list[Checkpoint]
    data: Data
    calibration: Path | None
    context: int
    effort: Effort
    device: str
    jobs: int
    force: bool
    out: Path
    results: list[Stored] = field(default_factory=list)
    quantization: list[SweepResult] = field(default_factory=list)
    budgets: dict[str, Found] = field(default_factory=dict)
    served: list[dict[str, str]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Checkpoint]:
        """Return the checkpoints, the original first."""
        return [self.original, *self.converted]

    @property
    def text(self) -> Path:
        """Return the file of the text."""
        assert self.data.text is not None
        return self.data.text

    @property
    def sequence(self) -> int:
        """Return the tokens of a sequence of perplexity and attention."""
        return min(self.context, self.effort.sequence)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure something; where that fails, note it and go on.

        Raises:
            UserError: what is there was measured otherwise, the input makes no sense, or the disk
                is full.
        """
        print(what, file=sys.stderr, flush=True)
        try:
            measure()
        except UserError:
            raise
        except Exception as error:  # whatever fails, the page says so
            if isinstance(error, OSError) and error.errno in FULL:  # so would all that follows
                raise UserError(
                    f"{self.out} has no room for results ({error.strerror}): make some, and the "
                    "same command goes on"
                ) from None
            self.failures[what] = " ".join(str(error).split()) or repr(error)
            print(f"failed: {what}: {self.failures[what]}", file=sys.stderr, flush=True)


def analyses(c: Comparison) -> None:
    """Take the measures of `training.analyze`."""
    longest = max(1, min(MULTIPLE, c.effort.max_length // c.context))
    measures = dict.fromkeys(SHORT, c.sequence)
    if c.data.evaluation is None:
        c.left_out.append(f"{', '.join(SETS)}: they need --eval")
    else:
        measures |= dict.fromkeys(SETS, c.context)
    if longest < 2:
        c.left_out.append(
            f"{', '.join(LONG)}: twice the training length of {c.context} tokens is above "
            f"--max-length {c.effort.max_length}"
        )
    else:
        measures |= dict.fromkeys(LONG, c.context)
    factors = {FACTORS[one.variant] for one in c.converted if one.variant in FACTORS}
    for checkpoint in c.all:
        own = {FACTORS[checkpoint.variant]} if checkpoint.variant in FACTORS else set()
        own = factors if checkpoint is c.original else own
        for name, context in measures.items():
            for factor in (1.0, *sorted(own)) if name in LONG else (1.0,):
                settings = AnalysisSettings(
                    limit=c.effort.limits[name],
                    max_length=max(context, longest * c.context),
                    context=context,
                    rope_theta_factor=factor,
                    out=c.out / "analysis",
                    device=c.device,
                    force=c.force,
                )
                theta = "" if factor == 1.0 else f", theta x{factor:g}"
                c.attempt(
                    f"{name} of {checkpoint.name}{theta}",
                    partial(analyzed, c, checkpoint.folder, name, settings),
                )


def analyzed(c: Comparison, folder: Path, name: str, settings: AnalysisSettings) -> None:
    """Take one measure."""
    c.results += analyze(folder, [name], c.data, settings)


def check(c: Comparison) -> None:
    """Check, before hours of work, what its later part needs.

    Raises:
        UserError: a model cannot be quantized, or a text is too short.
    """
    for one in c.all:
        runner.check_configs(one.folder, configs(c.effort))
    least = 2 * c.sequence
    for file in {c.text, c.calibration or c.text}:
        if (found := len(c.original.encode(read(file)))) < least:
            raise UserError(
                f"{file} has {found} tokens, fewer than two sequences of {c.sequence}: give more "
                "text, or lower --sequence"
            )


def configs(effort: Effort) -> list[QuantConfig]:
    """Return how models are quantized: as published, without act-order and searched ranges, since
    that is what the softpick paper compares."""
    return SearchSpace(
        targets=list(effort.targets),
        bits=list(effort.bits),
        schemes=list(effort.schemes),
        act_order=False,
        search=False,
    ).configs()


def quantized_length(c: Comparison) -> int:
    """Return the tokens of a sequence that a quantized model is measured on."""
    return min(c.sequence, c.effort.quantized_length)


def sweep(c: Comparison) -> None:
    """Quantize all models as `quant.sweep` does, on the CPU."""
    whole = Effort()
    for what, full, own in (
        ("quantization by", whole.schemes, c.effort.schemes),
        ("quantization of", whole.targets, c.effort.targets),
        ("quantization to bits:", whole.bits, c.effort.bits),
    ):
        if missing := [str(one) for one in full if one not in own]:
            c.left_out.append(f"{what} {', '.join(missing)}")

    def measure() -> None:
        effort = c.effort
        samples = Samples(effort.quantized, quantized_length(c), calibration=effort.quantized)
        calibration = () if c.calibration is None else (c.calibration,)
        folders = [one.folder for one in c.all]
        tasks = runner.plan(
            folders, configs(effort), samples, Sources((c.text,), calibration), c.out / "quantized"
        )
        missing = [task for task in tasks if c.force or not runner.is_there(task)]
        jobs = runner.affordable(c.jobs, folders)
        failed = runner.run(missing, jobs, False, lambda result: None)
        c.failures |= {f"quantization, {name}": why for name, why in failed.items()}
        c.quantization += [store.read(one.path) for one in tasks if one.name not in failed]
        c.quantization.sort(key=lambda result: result.order)

    c.attempt("quantization", measure)


def prune(c: Comparison) -> None:
    """Find out how little KV cache the prunable variants need, by length."""
    fitting = [length for length in Effort().pruning if length <= c.context]
    wanted = {length for length in c.effort.pruning if length <= c.context} or {*fitting[-1:]}
    for own in (one for one in c.converted if get_variant(one.variant).prunable):
        for length in sorted({*Effort().pruning, *c.effort.pruning}):
            what = f"budgets of {own.name} at {length} tokens"
            if length > c.context:
                c.left_out.append(f"{what}: the training length is {c.context}")
            elif length not in wanted:
                c.left_out.append(f"{what}: not with --quick")
            else:
                c.attempt(what, partial(_prune, c, own, length, what))


def _prune(c: Comparison, own: Checkpoint, length: int, what: str) -> None:
    search, judge, test = (max(2, count * 512 // length) for count in c.effort.pruned)
    try:
        parts = parts_of(own, (search, judge, test), length, [c.text])
    except UserError as error:  # the longest need more text than all the rest
        c.left_out.append(f"{what}: {str(error).partition(':')[0]}")
        return
    found = pruning.run(
        own, c.original, parts, runs=c.out / "runs", rises=[1.0], max_loss=None,
        step=max(4, length // 128), uniform=c.effort.uniform, seed=0, search=c.effort.search,
    )  # fmt: skip
    found.write(c.out / "budgets" / str(length))
    c.budgets[f"{own.name}-{length}"] = found


def serve(c: Comparison) -> None:
    """Serve each pair by `benchmarks.serve`, and a prunable model within budgets too."""
    if not c.effort.serves:
        c.left_out.append("served memory and throughput: they need --serve")
        return
    for checkpoint in c.converted:
        c.attempt(f"serving {checkpoint.name}", partial(_serve, c, checkpoint))


def _serve(c: Comparison, own: Checkpoint) -> None:
    length = min(c.effort.served, c.context) - SLACK
    config = own.config
    heads = (config.num_key_value_heads or config.num_attention_heads) * config.num_hidden_layers
    command = [
        "--ckpts", str(c.original.folder), str(own.folder), "--no-stock", "--gateway", "none",
        "--request-rates", "inf", "--running", "--enforce-eager",
        "--requests", str(c.effort.requests), "--rounds", str(c.effort.rounds),
        "--log-folder", str(c.out / "served" / "logs"),
        "--prompt-len", str(length * 3 // 4), "--new-tokens", str(length // 4),
        # Room for four requests of the original, in float32.
        "--kv-cache-memory-bytes", str(4 * (length + 4 * SLACK) * heads * config.head_dim * 8),
    ]  # fmt: skip
    # 0: those of config.json, if any.
    command += ["--kv-budgets", *map(str, smallest(c, own) or [0])]
    key = json.dumps([own.digest, c.original.digest, command, machine.summary()])
    file = c.out / "served" / f"{own.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.csv"
    if c.force or not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # A program of its own: it shares no code with this one, and the servers are its children.
        program = [sys.executable, "-m", "benchmarks.serve", *command, "--csv", str(file)]
        if code := programs.run(program, subprocess.DEVNULL):
            file.unlink(missing_ok=True)
            raise RuntimeError(f"benchmarks.serve ended with {code}: {' '.join(program)}")
    with file.open(encoding="utf-8", newline="") as opened:
        c.served += [row | {"pair": own.name} for row in csv.DictReader(opened)]


def smallest(c: Comparison, own: Checkpoint) -> Sequence[int]:
    """Return the smallest budgets found within 1 % of perplexity, of the longest text."""
    found = [one for one in c.budgets.values() if one.about["checkpoint"] == own.name]
    for result in sorted(found, key=lambda one: -one.length):
        for target in result.targets:
            if target.reached and sum(target.budgets) < result.length * len(target.budgets):
                return target.budgets
    return ()


def served_rows(c: Comparison) -> list[list[str]]:
    """Return a row a server for the page."""
    rows = []
    for row in c.served:
        tokens, cache = float(row["tokens_per_s"]), int(row["kv_cache_memory_bytes"])
        rows.append(
            [row["pair"], row["case"], f"{cache / 1e6:.0f}", row["running"], f"{tokens:.1f}",
             f"{float(row['ttft_ms_p50']):.0f}", f"{float(row['tpot_ms_p50']):.1f}"]
        )  # fmt: skip
    return rows


STAGES: tuple[Callable[[Comparison], Any], ...] = (analyses, sweep, prune, serve)


def shortened(effort: Effort, **changes: Any) -> Effort:
    """Return an effort with those of the changes that are not None."""
    return replace(effort, **{name: value for name, value in changes.items() if value is not None})
