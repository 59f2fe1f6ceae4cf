"""Where the milliseconds of one decode step of vLLM on a CPU go.

vLLM runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that functions of its engine,
of the attention backend and of the backend's kernels can be timed by wrapping them at run time;
nothing of them is changed. A wrapper counts the time of its call without the wrapped calls inside,
so the parts of a step add up to it. Blocks of steps with and without the wrappers alternate: their
difference is what the wrappers cost. torch.profiler, which distorts more, has a pass of its own,
for the split of the model into operators.

What `vllm serve` adds to a step is not in here: queues between its three processes, HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from attnserve import machine
from attnserve.options import command_line, positive
from benchmarks.servers import config_of, variant_of
from serving.launch.process import LaunchError
from serving.launch.vllm_log import last_error

BLOCK = 5
"""Decode steps with the wrappers, then as many without."""

WARM_UP = 3
"""Decode steps before the first timed one."""

SCHEDULER = "scheduler"
INPUTS = "input preparation"
METADATA = "attention metadata"
MODEL = "model outside attention"
LINEAR = "linear layers"
POINTWISE = "norms, rotary embedding, activation"
BACKEND = "attention backend's Python"
ATTENTION = "attention kernel"
WRITE = "cache write kernel"
LOGITS = "output layer (logits)"
SAMPLING = "sampling"
OUTPUT = "output, detokenizer"
REST = "everything else"

ATTENTION_PARTS = (ATTENTION, WRITE, BACKEND)

LINEAR_OPS = ("mm", "linear")
"""Ends of the names of operators that apply a weight; attention in torch operations uses bmm."""

FUSED = "CompiledFxGraph"
"""In the name of compiled code's own work: everything that is not an operator outside of it."""


@dataclass(frozen=True)
class Point:
    """A function to be timed, by where it is looked up at each call."""

    owner: Any
    name: str
    label: str


@dataclass
class Stopwatch:
    """Time by label, without the time of labelled calls inside; in s."""

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    inner: list[float] = field(default_factory=lambda: [0.0])
    """Of each wrapped call that is running, the time of wrapped calls inside it."""

    def wrap(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The same function, timed."""
        now, inner, spent, calls = time.perf_counter, self.inner, self.spent, self.calls

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                took = now() - start
                spent[label] += took - inner.pop()
                inner[-1] += took
                calls[label] += 1

        return timed

    def reset(self) -> None:
        """Forget what was counted."""
        self.spent.clear()
        self.calls.clear()
        self.inner[:] = [0.0]

    @contextmanager
    def installed(self, points: Sequence[Point]) -> Iterator[None]:
        """Time `points` while inside; afterwards everything is as it was."""
        own = [point.name in vars(point.owner) for point in points]
        before = [getattr(point.owner, point.name) for point in points]
        for point, function in zip(points, before, strict=True):
            setattr(point.owner, point.name, self.wrap(function, point.label))
        try:
            yield
        finally:
            for point, function, was_own in zip(points, before, own, strict=True):
                if was_own:
                    setattr(point.owner, point.name, function)
                else:  # a method: the instance hides its class's
                    delattr(point.owner, point.name)


def wrapper_cost(repeats: int = 20_000) -> float:
    """Seconds that a wrapper adds to a call."""
    watch = Stopwatch()

    def nothing() -> None:
        pass

    def took(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return time.perf_counter() - start

    wrapped = watch.wrap(nothing, "")
    return median(took(wrapped) - took(nothing) for _ in range(5)) / repeats


def kernel_points(impl: Any) -> list[Point]:
    """The kernels below an attention impl: its layer's C functions, else the torch operations that
    stand for them, else vLLM's own operators."""
    layer = getattr(impl, "layer", None)
    if layer is not None:
        compiled = hasattr(layer, "run_attend")
        attend, write = ("run_attend", "run_write") if compiled else ("attend", "write_cache")
        return [Point(layer, attend, ATTENTION), Point(layer, write, WRITE)]
    module = sys.modules[type(impl).__module__]
    owner: ModuleType = getattr(module, "ops", module)
    labels = {
        "cpu_attention_with_kv_cache": ATTENTION,
        "cpu_attn_reshape_and_cache": WRITE,
    }
    return [Point(owner, name, label) for name, label in labels.items() if hasattr(owner, name)]


def model_points(model: Any) -> list[Point]:
    """Layers of a model that runs without compilation; compiled code does not call them."""
    from vllm.model_executor.custom_op import CustomOp

    points = []
    for module in model.model.modules():
        if hasattr(module, "cpu_linear"):
            points.append(Point(module, "cpu_linear", LINEAR))
        elif isinstance(module, CustomOp):
            points.append(Point(module, "forward", POINTWISE))
    return points


def answer_length(options: argparse.Namespace) -> int:
    """Return the tokens that a request may generate, more than it is asked for."""
    return WARM_UP + 2 * int(options.steps) + int(options.profiled_steps) + 2 * BLOCK


class Engine:
    """vLLM in this process, with a batch of requests that decode together."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        tokens = answer_length(options)
        llm = LLM(
            model=str(options.ckpt),
            dtype=options.dtype,
            max_model_len=options.prompt_len + tokens,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            enforce_eager=options.enforce_eager,
            attention_backend=options.backend,
            disable_log_stats=True,
        )
        self.engine: Any = llm.llm_engine
        self.core: Any = self.engine.engine_core.engine_core
        self.runner: Any = self.core.model_executor.driver_worker.worker.model_runner
        context = self.runner.vllm_config.compilation_config.static_forward_context
        self.impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
        rng = np.random.default_rng(0)
        vocabulary = self.runner.model_config.get_vocab_size()
        for index in range(options.batch):
            prompt = {"prompt_token_ids": rng.integers(1, vocabulary, options.prompt_len).tolist()}
            sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            self.engine.add_request(str(index), prompt, sampling)

    def prefill(self) -> None:
        """Step until every request decodes, and a few steps more."""
        started: set[str] = set()
        while len(started) < self.engine.get_num_unfinished_requests():
            started |= {out.request_id for out in self.engine.step() if out.outputs[0].token_ids}
        for _ in range(WARM_UP):
            self.engine.step()

    def step(self) -> float:
        """One decode step, in s."""
        start = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start

    def points(self, compiled: bool) -> list[Point]:
        """What to time. Call it after `prefill`, when all kernels have been called once."""
        runner, scheduler = self.runner, self.core.scheduler
        points = [
            Point(scheduler, "schedule", SCHEDULER),
            Point(scheduler, "update_from_output", SCHEDULER),
            Point(runner, "_update_states", INPUTS),
            Point(runner, "_prepare_inputs", INPUTS),
            Point(runner, "_determine_batch_execution_and_padding", INPUTS),
            Point(runner, "_get_slot_mappings", INPUTS),
            Point(runner, "_preprocess", INPUTS),
            Point(runner, "_build_attention_metadata", METADATA),
            Point(runner, "_model_forward", MODEL),
            Point(runner.model, "compute_logits", LOGITS),
            Point(runner, "_sample", SAMPLING),
            Point(runner, "_bookkeeping_sync", SAMPLING),
            Point(self.engine.output_processor, "process_outputs", OUTPUT),
        ]
        for impl in self.impls:
            hooks = [name for name in ("forward", "do_kv_cache_update") if hasattr(impl, name)]
            points += [Point(impl, name, BACKEND) for name in hooks]
        shared = {(id(p.owner), p.name): p for impl in self.impls for p in kernel_points(impl)}
        points += list(shared.values())
        return points if compiled else points + model_points(runner.model)

    def operators(self, steps: int) -> dict[str, float]:
        """Seconds per step inside each torch operator itself, by torch.profiler, largest first.

        Those of the output layer are one, LOGITS: its product has the linear layers' name.
        """
        from torch.profiler import ProfilerActivity, profile, record_function

        model, compute_logits = self.runner.model, self.runner.model.compute_logits

        def labelled(*args: Any, **kwargs: Any) -> Any:
            with record_function(LOGITS):
                return compute_logits(*args, **kwargs)

        model.compute_logits = labelled
        try:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(steps):
                    self.engine.step()
        finally:
            del model.compute_logits
        seconds: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            above = event
            while above is not None and above.name != LOGITS:
                above = above.cpu_parent
            seconds[above.name if above else event.name] += event.self_cpu_time_total / 1e6 / steps
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@dataclass
class Profile:
    """Steps in s; parts of the instrumented ones in s, per step."""

    plain: list[float]
    timed: list[float]
    parts: list[dict[str, float]]
    calls: dict[str, int]


def profile_steps(engine: Engine, points: Sequence[Point], steps: int) -> Profile:
    """Time `steps` decode steps with the wrappers and as many without, in alternating blocks."""
    watch = Stopwatch()
    found = Profile([], [], [], {})
    while len(found.timed) < steps:
        found.plain += [engine.step() for _ in range(BLOCK)]
        with watch.installed(points):
            for _ in range(BLOCK):
                watch.reset()
                took = engine.step()
                found.timed.append(took)
                found.parts.append({**watch.spent, REST: took - watch.inner[0]})
        found.calls = dict(watch.calls)
    return found


def summary(
    found: Profile, layers: int, operators: dict[str, float], compiled: bool
) -> dict[str, Any]:
    """The figures of a profile, in ms per step; medians over the steps."""
    parts = {
        label: 1e3 * median(step.get(label, 0.0) for step in found.parts)
        for label in {label for step in found.parts for label in step}
    }
    if compiled:  # one call holds both; torch.profiler tells in which proportion
        linear = sum(t for name, t in operators.items() if is_linear(name))
        fused = sum(t for name, t in operators.items() if FUSED in name)
        whole, share = parts.pop(MODEL, 0.0), linear / (linear + fused or 1.0)
        parts |= {LINEAR: whole * share, POINTWISE: whole * (1 - share)}
    plain, timed = (1e3 * median(steps) for steps in (found.plain, found.timed))
    attention = sum(parts.get(label, 0.0) for label in ATTENTION_PARTS)
    return {
        "step_ms": plain,
        "step_ms_p20_p80": [float(1e3 * x) for x in np.percentile(found.plain, (20, 80))],
        "instrumented_step_ms": timed,
        "instrumentation_ms": timed - plain,
        "wrapped_calls_per_step": sum(found.calls.values()),
        "wrapper_us_per_call": 1e6 * wrapper_cost(),
        "attention_share": attention / timed,
        "backend_python_us_per_layer": 1e3 * parts.get(BACKEND, 0.0) / layers,
        "parts_ms": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "operators_ms": {key: 1e3 * s for key, s in list(operators.items())[:12]},
    }


def is_linear(operator: str) -> bool:
    """Whether a torch operator multiplies by a layer's weights."""
    name = operator.rpartition("::")[2]
    return name.endswith(LINEAR_OPS) and not name.endswith("bmm")


def table(figures: dict[str, Any]) -> str:
    """For people: the parts of the step, then the operators."""
    step = figures["instrumented_step_ms"]
    parts = [
        {"part of the step": k, "ms": f"{v:.3f}", "share": f"{v / step:.1%}"}
        for k, v in figures["parts_ms"].items()
    ]
    operators = [
        {"operator (torch.profiler)": k, "ms": f"{v:.3f}"}
        for k, v in figures["operators_ms"].items()
    ]
    low, high = figures["step_ms_p20_p80"]
    return "\n".join(
        (
            pd.DataFrame(parts).to_string(index=False),
            "",
            pd.DataFrame(operators).to_string(index=False),
            "",
            f"step {figures['step_ms']:.2f} ms ({low:.2f}-{high:.2f}); with the wrappers "
            f"{figures['instrumentation_ms']:+.2f} ms ({figures['wrapped_calls_per_step']} calls, "
            f"{figures['wrapper_us_per_call']:.2f} us each)",
            f"attention {figures['attention_share']:.1%} of the step; the backend's own Python "
            f"{figures['backend_python_us_per_layer']:.1f} us per layer",
        )
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.decode_step", __doc__)
    add("--ckpt", "the checkpoint's folder", type=Path, required=True)
    parser.add_argument(
        "--backend", help="vLLM's attention backend (default: by config.json, else softpick)"
    )
    parser.add_argument(
        "--prompt-len",
        type=positive,
        help="tokens of a prompt (default: 1024, or what the model has room for)",
    )
    add("--batch", "requests that decode together", type=positive, default=1)
    add("--steps", "decode steps timed with wrappers, as many without", type=positive, default=40)
    add("--profiled-steps", "decode steps under torch.profiler", type=positive, default=10)
    add("--dtype", "of the model and its cache", default="float32")
    add("--threads", "OpenMP threads", type=positive, default=machine.cores())
    add("--kv-cache-bytes", "memory of the KV cache, in bytes", type=positive, default=2 * 2**30)
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="do not compile the model: starts 2-3 minutes sooner and times each linear layer and "
        "norm (default: compile, as `vllm serve` does)",
    )
    options = parser.parse_args(arguments)
    try:
        config = config_of(options.ckpt)
    except LaunchError as error:
        parser.error(str(error))
    options.backend = options.backend or variant_of(config) or "softpick"
    room = config["max_position_embeddings"] - answer_length(options)
    if (options.prompt_len or 1) > room:
        parser.error(
            f"the model has room for a prompt of {room} tokens beside the steps: give a shorter "
            "--prompt-len, or fewer --steps"
        )
    options.prompt_len = options.prompt_len or min(1024, room)
    return options


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    options = parse()
    # Before torch and vLLM are imported, which read them then.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    compiled = not options.enforce_eager
    try:
        engine = Engine(options)
        engine.prefill()
    except Exception as error:  # vLLM raises all kinds; the one line that says why is what counts
        reason = last_error(f"{type(error).__name__}: {error}")
        sys.exit(f"benchmarks.decode_step: {reason}")
    found = profile_steps(engine, engine.points(compiled), options.steps)
    operators = engine.operators(options.profiled_steps)
    figures = summary(found, len(engine.impls), operators, compiled)
    about = {
        "machine": machine.cpu_model(),
        "threads": options.threads,
        "commit": machine.commit(),
        "model": options.ckpt.resolve().name,
        "backend": options.backend,
        "prompt_len": options.prompt_len,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": "compiled" if compiled else "eager",
        "layers": len(engine.impls),
    }
    print(table(figures))
    print(json.dumps({**about, **figures}))


if __name__ == "__main__":
    main()
