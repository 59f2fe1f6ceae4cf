"""tools/install.sh, which make and the images run, and the wheel in a clean environment."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.servers import COMMON_ENV, STARTUP_SECONDS, end_group, free_port

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
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
        ("false", "the locks are for Python 3.11 and false is another; use PYTHON="),
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


@pytest.mark.slow
def test_no_cpu_build_of_torch(tmp_path: Path) -> None:
    """The line that the README explains."""
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
    assert f"`install: no {torch} there either" in README


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
    command = [str(venv / "bin/attnserve"), f"--ckpt={ROOT}/checkpoints/softpick"]
    command += [f"--vllm-port={ports[0]}", f"--gateway-port={ports[1]}", "--", "--dtype=float32"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | COMMON_ENV
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while "Ready" not in (printed := (tmp_path / "log").read_text()):
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
