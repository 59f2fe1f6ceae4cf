"""The correctness matrix: every variant, dtype, head size, group and window, in all phases."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from benchmarks.gpu_check.checks import Check, Row, SkippedError, Task
from benchmarks.gpu_check.paged import Paged, Requests, Setup, judged, worse

GROUPS = (1, 4, 3)
WINDOWS = (None, 24)
FP8_CAPABILITY = (8, 9)

UNSPLIT = 1


def split_processors(device: str) -> int:
    """Processors of the device, as `TritonLayer` is told: so many that a few decoding requests are
    cut into 32 parts (in the slow interpreter, 2); with one processor they are not cut."""
    return 132 if device == "cuda" else 8


def setups(task: Task) -> list[Setup]:
    """All of them: first each variant in each dtype in its most usual shape, then float8 caches,
    then the rest in random order, so that a run that is cut short has seen something of all."""
    common: dict[str, Any] = {"longest": task.longest, "device": task.device, "seed": task.seed}
    usual = 128 if 128 in task.head_dims else task.head_dims[0]
    first = [
        Setup(variant, dtype, usual, 4, None, **common)
        for dtype, variant in product(task.dtypes, task.variants)
    ]
    quantized = [
        Setup(variant, "bf16", head_dim, 4, None, fp8=True, **common)
        for head_dim, variant in product(task.head_dims, task.variants)
        if "bf16" in task.dtypes
    ]
    rest = [
        Setup(variant, dtype, head_dim, group, window, **common)
        for variant, dtype, head_dim, group, window in product(
            task.variants, task.dtypes, task.head_dims, GROUPS, WINDOWS
        )
    ]
    rest = [setup for setup in rest if setup not in first]
    random.Random(task.seed).shuffle(rest)
    return first + quantized + rest


def phases(
    lengths: tuple[int, ...], split: int
) -> Iterator[tuple[str, int, list[tuple[int, int, int]]]]:
    """Steps that run requests of these lengths to their ends: `(phase, processors, spans)`."""
    halves = [n // 2 for n in lengths]
    yield "prefill", split, [(r, 0, half) for r, half in enumerate(halves)]
    # The first request decodes while the others are prefilled.
    done = [
        halves[0] + 1,
        *(max(half, n - 4) for n, half in zip(lengths[1:], halves[1:], strict=True)),
    ]
    spans = zip(halves, done, strict=True)
    yield "mixed", split, [(r, a, b) for r, (a, b) in enumerate(spans) if b > a]
    for step in range(max(n - d for n, d in zip(lengths, done, strict=True))):
        phase, processors = (("decode unsplit", UNSPLIT), ("decode split", split))[step % 2]
        now = [(r, d + step) for r, d in enumerate(done) if d + step < lengths[r]]
        yield phase, processors, [(r, d, d + 1) for r, d in now]


def check(setup: Setup) -> Iterable[Row]:
    """One row a phase: the largest error of its steps.

    Raises:
        SkippedError: the device has no float8.
    """
    if setup.fp8:
        require_fp8(setup.device)
    requests = Requests(setup)
    paged = Paged(requests)
    errors: dict[str, float] = {}
    for phase, processors, spans in phases(setup.lengths, split_processors(setup.device)):
        paged.layer.num_processors = processors
        error = paged.error(spans, paged.step(spans))
        errors[phase] = worse(error, errors.get(phase, 0.0))
    columns = {
        "variant": setup.variant,
        "dtype": "bf16+fp8" if setup.fp8 else setup.dtype,
        "head_dim": setup.head_dim,
        "group": setup.group,
        "window": setup.window,
    }
    return [judged(error, requests, phase=phase, **columns) for phase, error in errors.items()]


def require_fp8(device: str) -> None:
    """Make sure that the device converts float8.

    Raises:
        SkippedError: it does not.
    """
    import torch

    if device != "cuda":
        raise SkippedError("float8 is checked on a GPU only")
    if not torch.version.hip and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise SkippedError("float8 needs a GPU of compute capability 8.9 or later")


def checks(task: Task) -> list[Check]:
    """One a setup."""
    return [Check(str(setup), functools.partial(check, setup)) for setup in setups(task)]
