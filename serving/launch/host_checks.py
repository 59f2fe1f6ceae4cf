"""Check a machine before anything is installed on it.

Only Python's standard library, of 3.8 or later: `make doctor` runs this with any Python where .venv
is missing or broken. `attnserve doctor` shares some of the checks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from serving.launch.vllm_log import last_line, plain_lines

GIB = 2**30

ENOUGH_GIB = 4.0  # a vLLM server with a small model takes 2 to 3 GiB on a CPU

INSTALL_GIB = 6.0
"""What an install takes on disk while it runs: 3.5 GiB in the end, and pip's copies of wheels."""

COMPILER_FIX = "install g++ (Debian: apt install g++), or set CXX"

LINK_OPENMP = '#include <omp.h>\nextern "C" int f() { return omp_get_max_threads(); }\n'


@dataclass(frozen=True)
class Check:
    """One row: what was checked, how it is, what was found and what to do."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    fix: str = ""


def ok(name: str, found: str) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name, "ok", found)


def warning(name: str, found: str, fix: str) -> Check:
    """Return a check that found something that serves, but not as it could."""
    return Check(name, "warning", found, fix)


def problem(name: str, found: str, fix: str) -> Check:
    """Return a check that found what does not serve, or wrongly, or many times slower."""
    return Check(name, "problem", found, fix)


def enough(is_enough: bool, name: str, found: str, fix: str) -> Check:
    """Return a check of how much there is."""
    return ok(name, found) if is_enough else warning(name, found, fix)


def before_install(venv: Path, python: str, ports: Mapping[str, int]) -> Iterator[Check]:
    """Yield the checks of a machine on which `make install` has not ended well yet.

    The environment that it makes is `venv`, by means of `python`; ports are by variable.
    """
    yield check_environment(venv)
    yield check_installer(python)
    yield check_processor()
    yield check_compiler()
    yield check_libnuma()
    yield from check_memory()
    yield check_disk(Path())
    yield from check_ports(ports)


def check_environment(venv: Path) -> Check:
    """Check the environment that `make install` makes."""
    fix = "make install"
    python = venv / "bin/python"
    if not venv.exists():
        return problem(str(venv), "nothing is installed yet", fix)
    if not python.exists():
        return problem(str(venv), f"there is no {python}", f"make clean; {fix}")
    # Not from the present folder, where the packages lie whether installed or not.
    command = [str(python.absolute()), "-c", "import attnserve.cli, serving.app"]
    try:
        done = subprocess.run(command, cwd="/", stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return problem(str(venv), f"{python}: {error.strerror}", f"make clean; {fix}")
    if done.returncode:
        why = last_line(done.stderr) or f"exit code {done.returncode}"
        return problem(str(venv), f"the install is not complete: {why}", fix)
    return ok(str(venv), "installed")


def check_installer(python: str) -> Check:
    """Check the Python that makes the environment: 3.11 or 3.12, which the lock is for."""
    fix = "install Python 3.11 (Debian: apt install python3.11-venv), or name one: make PYTHON=PATH"
    program = "import sys; print('%d.%d.%d' % sys.version_info[:3]); import ensurepip, venv"
    if (path := shutil.which(python)) is None:
        return problem("python", f"{python} not found", fix)
    done = subprocess.run([path, "-c", program], capture_output=True, text=True)
    version = done.stdout.strip()
    if not version:  # a shim of pyenv's, say
        why = (plain_lines(done.stderr) or ["does not run"])[0]
        return problem("python", f"{path}: {why}", fix)
    if not version.startswith(("3.11.", "3.12.")):
        found = f"{path} is {version}, the lock is for 3.11 and 3.12"
        return problem("python", found, fix)
    if done.returncode:
        return problem("python", f"{path}: {last_line(done.stderr)}", fix)
    return ok("python", f"{version}, {path}")


def check_processor() -> Check:
    """Check the processor, of which vLLM's build for CPUs asks AVX2."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        known = ""
    if platform.machine() not in ("x86_64", "AMD64"):
        return problem("processor", platform.machine(), "the lock is for Linux on x86_64")
    if " avx2 " not in known:
        return problem("processor", "no AVX2", "use a processor with AVX2")
    best = next((isa for isa in ("amx_bf16", "avx512f") if f" {isa}" in known), "avx2")
    return ok("processor", f"x86_64 with {best}")


def check_compiler() -> Check:
    """Check the C++ compiler, which compiles the kernels at their first use."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "clang++", "c++"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            break
    else:
        fault = f"CXX={chosen} is not found" if chosen else "no g++, clang++ or c++"
        return problem("compiler", fault, COMPILER_FIX)
    if fault := compiler_fault(command):
        return problem("compiler", fault, COMPILER_FIX)
    return ok("compiler", name)


def compiler_fault(compiler: Sequence[str]) -> str:
    """Return why the compiler cannot make a shared library with OpenMP; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "t.cpp").write_text(LINK_OPENMP)
        command = [*compiler, "-std=c++17", "-fPIC", "-shared", "-fopenmp", "t.cpp", "-o", "t.so"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            return f"{compiler[0]} cannot be run ({error.strerror})"
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return f"{compiler[0]} failed ({(errors or ['no message'])[0]})" if done.returncode else ""


def check_libnuma() -> Check:
    """Check the one system library that vLLM's build for CPUs needs besides a compiler's own."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        return problem("libnuma", str(error), "Debian: apt install libnuma1")
    return ok("libnuma", "libnuma.so.1")


def check_memory() -> Iterator[Check]:
    """Check cores and memory that this process may use, by the kernel and its cgroup."""
    cores = len(os.sched_getaffinity(0))
    yield enough(cores > 1, "cores", str(cores), "use 2")
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024 / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, (int(text) - used) / GIB)
    fix = f"free some, or give the container more: a small model needs {ENOUGH_GIB:.0f} GiB"
    yield enough(free >= ENOUGH_GIB, "memory", f"{free:.1f} GiB free", fix)


def check_disk(folder: Path) -> Check:
    """Check the room for an install."""
    free = shutil.disk_usage(folder).free / GIB
    fix = f"an install takes up to {INSTALL_GIB:.0f} GiB"
    return enough(free >= INSTALL_GIB, "disk", f"{free:.1f} GiB free", fix)


def check_ports(ports: Mapping[str, int]) -> Iterator[Check]:
    """Check the ports of `attnserve serve`, by the variables of `make serve`."""
    for variable, port in ports.items():
        if fault := port_fault(port):
            yield problem(f"port {port}", fault, f"choose another {variable}")
        else:
            yield ok(f"port {port}", f"free ({variable})")


def port_fault(port: int, host: str = "127.0.0.1") -> str:
    """Return why nothing can listen on a port; empty if something can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"cannot listen on {host}:{port}: {error.strerror}"
    return ""


def print_checks(checks: Iterable[Check], as_json: bool) -> int:
    """Print a table, or one JSON object; return the exit code, 1 if there is a problem."""
    rows = []
    for check in checks:
        rows.append(check)
        if not as_json:
            print(f"{check.state:8} {check.name:17} {check.found}", flush=True)
            if check.fix:
                print(f"{'':26} -> {check.fix}", flush=True)
    count = {state: sum(r.state == state for r in rows) for state in ("ok", "warning", "problem")}
    if as_json:
        print(json.dumps({**count, "checks": [asdict(row) for row in rows]}))
    else:
        print(", ".join(f"{number} {state}" for state, number in count.items()))
    return 1 if count["problem"] else 0


def main() -> int:
    """Check what `make install` needs; return the exit code."""
    parser = argparse.ArgumentParser(description="Check what `make install` needs.")
    parser.add_argument("venv", type=Path, help="the environment that it makes")
    parser.add_argument("--python", default="python3.11", help="what it makes that with")
    parser.add_argument("--json", action="store_true", help="one JSON object and no table")
    parser.add_argument("--vllm-port", type=int, default=8000, help="vLLM's port")
    parser.add_argument("--gateway-port", type=int, default=8080, help="the gateway's port")
    options = parser.parse_args()
    ports = {"VLLM_PORT": options.vllm_port, "GATEWAY_PORT": options.gateway_port}
    return print_checks(before_install(options.venv, options.python, ports), options.json)


if __name__ == "__main__":
    sys.exit(main())
