"""Imports point one way, and never in a circle (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"attn_kernels", "quant_kernels"},
    {"hf_attn", "vllm_attn", "vllm_quant"},
    {"attnserve"},
    {"quant", "serving"},
    {"training", "benchmarks"},
)
"""Packages; each imports from layers above it in this list and from its own."""
APART = ({"quant", "serving"}, {"training", "benchmarks"})
"""Packages of one layer that do not know each other."""
ROOF = {"attnserve.cli", "attnserve.__main__"}
"""The one command, which names those of `quant` and `serving`; nothing imports it."""
LEVEL = {package: number for number, layer in enumerate(LAYERS) for package in layer}


@functools.cache
def modules() -> dict[str, Path]:
    """Return the file of every module that is not a test."""
    found = {}
    for source in (ROOT, ROOT / "kernels", ROOT / "plugins"):
        for package in LEVEL:
            for path in (source / package).rglob("*.py"):
                parts = path.relative_to(source).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(module: str) -> Iterator[str]:
    """Yield the modules of the project, or of the tests, that a module imports anywhere in it."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.append(full if full in modules() else node.module)
        yield from (name for name in names if name.partition(".")[0] in {*LEVEL, "tests"})


def test_every_package_has_a_layer() -> None:
    assert {module.partition(".")[0] for module in modules()} == set(LEVEL)
    assert len(modules()) > 150


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_point_one_way(module: str) -> None:
    package = module.partition(".")[0]
    for name in imported(module):
        other = name.partition(".")[0]
        assert other in LEVEL, f"{module} imports {name}"
        assert name not in ROOF or module in ROOF, f"{module} imports {name}"
        if module not in ROOF:
            assert LEVEL[other] <= LEVEL[package], f"{module} imports {name}, which is above it"
            for pair in APART:
                assert pair != {package, other}, f"{module} imports {name}, beside it"


def test_no_circle() -> None:
    graph = {module: set(imported(module)) - {module} for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
