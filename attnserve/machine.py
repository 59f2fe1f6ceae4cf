"""What a measurement was taken on: the processor, the software and the commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnserve.files import CHECKOUT


def cpu_model() -> str:
    """Return the processor's name as Linux tells it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def last_level_cache() -> int:
    """Return the bytes of the first processor's largest cache; 0 if Linux does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    texts = [size.read_text(encoding="utf-8").strip() for size in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text), default=0)


def compiler() -> str:
    """Return the first line of the C++ compiler's `--version`; empty if there is none.

    It is the compiler that builds the kernels: CXX, else the first of g++, clang++ and c++.
    """
    from attn_kernels.cpu.build import BuildError, find_compiler

    try:
        return find_compiler()[1].partition("\n")[0]
    except BuildError:
        return ""


def package(name: str) -> str:
    """Return the version of an installed distribution; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    """Return the output of a git command in the checkout; empty if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Return the short commit of the checkout; empty outside a checkout.

    It ends with `-dirty` where a file outside benchmarks/results differs from it.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    dirty = head and _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head + "-dirty" if dirty else head


def described() -> dict[str, Any]:
    """Return when, on what and with what a run is made; `load_average` is others' work."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": cpu_model(),
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2),
        **{name: package(name) for name in ("vllm", "torch", "attnserve")},
        "commit": commit(),
    }


def summary() -> str:
    """Return in one line the processor, its cores and the versions that a result depends on."""
    import torch  # a gateway's machine has neither
    import transformers

    return (
        f"{cpu_model()}, {os.cpu_count()} cores (torch threads: {torch.get_num_threads()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
