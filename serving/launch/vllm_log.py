"""What the log of a vLLM server says: the phases of its start, notes for its user, its last error.

Only Python's standard library, of 3.8 or later: `serving.launch.host_checks` uses this.
"""

from __future__ import annotations

import re

PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|WARNING|INFO) \S+ \S+ \[\S+\] )?")
FATAL = re.compile(r"^(\(\w+ pid=\d+\) )?attnserve: .*$", re.MULTILINE)
"""A line with which the plugin ends a start: it has no level, as what is logged does."""
ERROR_LINE = re.compile(r"^(attnserve: |[\w.]+(Error|Exception): |[\w. -]*\berror: |Value error, )")
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "See root cause above")


def plain_lines(log: str) -> list[str]:
    """Return the lines of a vLLM log without process, level, time and place; no empty ones."""
    lines = (PREFIX.sub("", line).strip() for line in log.splitlines())
    return [line for line in lines if line]


def last_line(log: str) -> str:
    """Return the last line of a log, without its prefix."""
    lines = plain_lines(log)
    return lines[-1] if lines else ""


def last_error(log: str) -> str:
    """Return the last line of a log that states an error and not a mere consequence of another."""
    errors = [line for line in plain_lines(log) if ERROR_LINE.match(line)]
    causes = [line for line in errors if not any(c in line for c in CONSEQUENCES)]
    return (causes or errors or [last_line(log)])[-1]


IMPORTING = "importing Python packages"
"""What a server does before it logs anything, for some 10 seconds."""

PHASES = (
    (r"^non-default args: ", "reading the checkpoint's configuration"),
    (r"^Using max model len", "starting the engine"),
    (r"^Initializing a V1 LLM engine", "starting the worker"),
    (r"^Starting to load model", "building the model"),
    (r"^Compiling the .* kernels", "compiling CPU kernels, once on this machine"),
    (r"^Initializing model took|^Loading safetensors", "loading the weights"),
    (r"^Compiling attention kernels", "compiling GPU kernels"),
    (r"Dynamo bytecode transform|^Compiling a graph", "compiling the model"),
    (r"^Available KV cache memory|KV cache layout|KV cache size: ", "reserving the KV cache"),
    (r"^Capturing CUDA graphs", "capturing CUDA graphs"),
    (r"^JIT kernel warmup starting|^init engine ", "warming up"),
    (r"^Supported tasks: ", "starting the API server"),
)
"""How vLLM 0.32's log says that a phase begins, and what it is."""

NOTES = re.compile(
    r"^attnserve(:| was tried)|attention, as the checkpoint's config|^Packed weights of|"
    r"^Pruned to kv_budgets|was trained with \w+ attention; serving|^prefix caching is off"
)
"""What attnserve's plugin logs and a user should read."""


def phase(lines: list[str]) -> str:
    """Return what a server is doing, by the lines of its log without their prefixes."""
    for line in reversed(lines):
        for pattern, text in PHASES:
            if re.search(pattern, line):
                return text
    return IMPORTING


def notes(lines: list[str]) -> list[str]:
    """Return the lines that a user should read, each once."""
    return list(dict.fromkeys(line for line in lines if NOTES.search(line)))
