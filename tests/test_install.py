"""tools/install.sh, which make and the images run, and the wheel in a clean environment."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.servers import COMMON_ENV, STARTUP_SECONDS, end_group, free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
TROUBLESHOOTING = (ROOT / "docs/TROUBLESHOOTING.md").read_text()
LOCK = "requirements/serve-cpu.txt"


def install(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with these environment variables besides."""
    return subprocess.run(
        [ROOT / "tools/install.sh", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )


@pytest.mark.parametrize(
    ("python", "line"),
    [
        ("/nonexistent", "/nonexistent not found; install Python 3.11 or name it: PYTHON="),
        ("false", "the locks are for Python 3.11 and 3.12, and false is another; use PYTHON="),
    ],
)
def test_no_python(python: str, line: str, tmp_path: Path) -> None:
    done = install("dependencies", tmp_path / "venv", LOCK, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == f"install: {line}/path/to/python3.11\n"
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("arguments", [[], ["dependencies", "venv"], ["everything", "venv"]])
def test_usage(arguments: list[str]) -> None:
    done = install(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("install: ") and len(done.stderr.splitlines()) == 1


def write_wheel(folder: Path, name: str) -> None:
    """Return the smallest wheel of a distribution, version 1.0."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")


def install_offline(folder: Path, *pins: str) -> subprocess.CompletedProcess[str]:
    """Install a lock with these lines from the wheels in `folder`."""
    lock = folder / "lock.txt"
    lock.write_text("".join(f"{pin}\n" for pin in pins))
    # pip warns of the first: "Location ... is ignored".
    links = f"{folder}/nothing {folder}"
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links, "PIP_CONFIG_FILE": os.devnull}
    return install("dependencies", folder / "venv", lock, PYTHON=sys.executable, **nowhere)


def test_steps_are_named_with_their_time(tmp_path: Path) -> None:
    """And nothing else is shown: none of pip's warnings, no blank line."""
    write_wheel(tmp_path, "one")
    done = install_offline(tmp_path, "one==1.0")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(re.match(r"\[ *\d+ s\] +\S", line) for line in lines)
    steps = [line[len("[   0 s] ") :] for line in lines]
    # Indented is what a step of 15 seconds shows of the log, on a machine with much else to do.
    assert [step for step in steps if not step.startswith("  ")] == [
        f"making {tmp_path}/venv with {sys.executable}",
        f"installing 1 distributions of {tmp_path}/lock.txt",
    ]
    assert "is ignored" in (ROOT / ".run/install.log").read_text()
    (installed,) = tmp_path.glob("venv/lib/python*/site-packages/one.py")
    assert installed.exists()


def test_failure_shows_the_line_that_matters_and_keeps_the_log(tmp_path: Path) -> None:
    write_wheel(tmp_path, "one")
    done = install_offline(tmp_path, "one==1.0", "two==2.0")
    assert done.returncode == 1
    assert done.stderr == (
        "install: ERROR: No matching distribution found for two==2.0 (log: .run/install.log)\n"
    )
    log = (ROOT / ".run/install.log").read_text()
    assert "Processing" in log and "Could not find a version" in log


@pytest.mark.slow
def test_no_cpu_build_of_torch(tmp_path: Path) -> None:
    """The line that docs/TROUBLESHOOTING.md explains."""
    torch = next(x for x in (ROOT / LOCK).read_text().splitlines() if x.startswith("torch=="))
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = install(
        "dependencies",
        tmp_path / "venv",
        LOCK,
        PYTHON=sys.executable,
        TORCH_INDEX="file:///",
        **nowhere,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"install: no {torch} there either; name an index that has it: TORCH_INDEX=URL"
    assert f"`install: no {torch} there either" in TROUBLESHOOTING


@pytest.mark.slow
def test_wheel_serves_from_a_clean_environment(tmp_path: Path) -> None:
    """Downloads the lock (1 GB), installs the built wheel beside it, and serves a checkpoint."""
    venv = tmp_path / "venv"
    done = install("dependencies", venv, LOCK, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*command, "--directory", tmp_path], cwd=ROOT, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "--no-deps", wheel], check=True)

    ports = free_port(), free_port()
    command = [str(venv / "bin/attnserve"), "serve", f"{ROOT}/checkpoints/softpick"]
    command += [f"--vllm-port={ports[0]}", f"--gateway-port={ports[1]}", "--", "--dtype=float32"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | COMMON_ENV
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while "] ready" not in (printed := (tmp_path / "log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, printed
            time.sleep(1)
        body = {"model": "softpick", "prompt": "It was the best of", "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{ports[1]}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 8
    finally:
        process.terminate()
        process.wait(60)
        end_group(process)
