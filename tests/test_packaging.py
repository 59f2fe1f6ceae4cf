"""The distribution and the environment: what is installed, and what must not be."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if "==" in line]


def test_environment_is_the_locked_one() -> None:
    pins = dict(pin.split("==") for pin in LOCK)
    assert {name: importlib.metadata.version(name) for name in pins} == pins


@pytest.mark.parametrize("name", PROJECT["tool"]["attnserve"]["lock"]["left_out"])
def test_cuda_builds_are_left_out(name: str) -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(name)


def test_vllm_metadata_owns_no_module() -> None:
    shim = importlib.metadata.distribution("vllm")
    assert shim.version == "0.32.0+cpu"
    assert {file.parts[0] for file in shim.files or []} == {"vllm-0.32.0+cpu.dist-info"}


def test_vllm_command_knows_its_version() -> None:
    command = [str(Path(sys.executable).with_name("vllm")), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "0.32.0+cpu"


@pytest.mark.parametrize(
    "group", ["vllm.general_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins"]
)
def test_entry_points_resolve(group: str) -> None:
    (ours,) = importlib.metadata.entry_points(group=group, name="attnserve")
    assert callable(ours.load())


def test_wheel_holds_the_packages_and_does_not_ask_for_vllm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*command, "--directory", tmp_path], cwd=ROOT, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("dist-info/METADATA")]
        asked = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.M)
    listed = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    found = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert found == {Path(package).name for package in listed}
    assert not [line for line in asked if line.startswith("vllm") and "extra ==" not in line]
    # The kernels are compiled where they are installed.
    package = ROOT / "kernels/attn_kernels"
    sources = {p.relative_to(package.parent).as_posix() for p in package.rglob("*.[hc]pp")}
    assert "attn_kernels/cpu/kernel.cpp" in sources and sources <= set(names)
    page = {f"serving/playground/{p.name}" for p in (ROOT / "serving/playground").glob("*.*")}
    assert "serving/playground/index.html" in page and page <= set(names)
