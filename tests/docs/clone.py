"""A fresh clone as a stranger has it: nothing beside it, and an empty home folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.text import ROOT

PYTHONS = re.compile(rb"\A#!\S*/python[\d.]*\n")
FORGOTTEN = ("ATTNSERVE_", "VLLM_", "PYTHON", "PYTEST", "COV_", "TRITON_")
"""Beginnings of environment variables that a stranger has not set."""


@dataclass(frozen=True)
class Clone:
    """The checkout as it is now, in a folder of its own with an environment of its own."""

    root: Path
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables of a shell in which `.venv` is activated."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(FORGOTTEN) and not name.startswith("XDG_")
        }
        here = str(self.root / ".venv")
        path = f"{here}/bin:{os.environ['PATH']}"
        own = {"HOME": str(self.home), "VIRTUAL_ENV": here, "PATH": path, "HF_HUB_OFFLINE": "1"}
        # Threads of tiny operations wait for each other many times longer where a test runs beside.
        own["OMP_NUM_THREADS"] = "1"
        return {**kept, **own, **more}

    def run(self, command: str, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
        """Return what `command`, typed in bash in the clone's folder, printed (both streams)."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.root,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )


def make_clone(folder: Path) -> Clone:
    """Clone the checkout into `folder`, with its changes that are not committed yet.

    The environment is as `make install` leaves it, without its gigabyte: the packages of the
    environment that runs the tests are found through a path, and the clone's own project comes
    before theirs.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("there is no git repository here to clone")
    clone = Clone(folder / "attnserve", folder / "home")
    clone.home.mkdir(parents=True)
    git = ["git", "-C", str(ROOT)]
    subprocess.run(
        [*git, "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone.root)], check=True
    )
    listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, text=True).split("\0")[:-1]:
        source, target = ROOT / name, clone.root / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        else:
            target.unlink(missing_ok=True)
    assert not (folder / "shared").exists()
    make_environment(clone.root / ".venv")
    done = clone.run("tools/install.sh project .venv --editable")
    assert done.returncode == 0, done.stdout
    (clone.root / ".venv/.ready").touch()
    return clone


def make_environment(venv: Path) -> None:
    """Make a virtual environment that has the packages and programs of this one."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(venv)]
    subprocess.run(command, check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    shebang = f"#!{venv}/bin/python\n".encode()
    for program in Path(sys.executable).parent.iterdir():
        target = venv / "bin" / program.name
        if target.exists() or program.name.startswith(("python", "activate", "Activate")):
            continue
        target.write_bytes(PYTHONS.sub(shebang, program.read_bytes(), count=1))
        target.chmod(0o755)
