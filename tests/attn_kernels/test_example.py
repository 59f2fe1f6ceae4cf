"""docs/VARIANT.md's example as it is printed there: a variant of another package, whose files
lie in a folder of their own."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attn_kernels import Variant, cpu, get_variant, reference, variant_names
from attn_kernels import variant as registry
from tests.attn_kernels import cases, paper_formulas, test_paged

pytestmark = pytest.mark.integration

DOCS = (Path(__file__).parents[2] / "docs/VARIANT.md").read_text()


def example(language: str, what: str) -> str:
    """Return the one code block of docs/VARIANT.md in this language that has this text in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.M | re.S)
    (block,) = (block for block in blocks if what in block)
    return str(block)


def write_example(folder: Path) -> None:
    """Write the example's files, as the page names them."""
    folder.mkdir()
    (folder / "__init__.py").write_text(example("python", "class Relu"))
    (folder / "kernel.hpp").write_text(example("cpp", "struct Relu"))
    (folder / "kernel.py").write_text(example("python", "import triton"))


@pytest.fixture
def relu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Variant]:
    """Return the example, registered for one test."""
    variant_names()  # loads what there is, so that only the example is forgotten afterwards
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    write_example(tmp_path / "relu")
    importlib.import_module("relu")
    yield get_variant("relu")
    del sys.modules["relu"]
    sys.modules.pop("relu.kernel", None)


@pytest.mark.parametrize("shape", [cases.SHAPES[3], cases.SHAPES[7], cases.SHAPES[11]], ids=str)
def test_reference_equals_formula(
    relu: Variant, shape: cases.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_formulas, "FORMULAS", dict(paper_formulas.FORMULAS))
    exec(example("python", "FORMULAS["), dict(vars(paper_formulas)))
    inputs = cases.make_inputs(relu, shape, seed=1)
    rows = range(shape.start, shape.stop)
    _, want = cases.by_paper_formula(relu, *inputs.qkv, rows=rows, window=shape.window)
    q, k, v = inputs.qkv
    got, _ = reference.attention(
        relu, q[:, rows.start : rows.stop], k, v, query_start=rows.start, window=shape.window
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("relu")
@pytest.mark.parametrize("path", cpu.usable_isas())
def test_kernels_equal_reference(path: str) -> None:
    for shape in test_paged.SHAPES:
        for window in (None, 19):
            for dtype in (torch.float32, torch.bfloat16):
                error = test_paged.error_against_reference(path, "relu", shape, window, dtype, 1)
                assert error <= test_paged.tolerance(path, dtype), (shape, window, dtype)
    split = test_paged.Shape(4, 2, 32, 16, 1800, 1797)
    error = test_paged.error_against_reference(path, "relu", split, None, torch.float32, threads=2)
    assert error <= test_paged.TOLERANCE


def test_serving_binds_the_kernels(relu: Variant, caplog: pytest.LogCaptureFixture) -> None:
    layer = cpu.bind(relu, torch.zeros(2, 1, 16, 64), num_heads=2, scale=0.2)
    assert isinstance(layer, cpu.CPULayer)
    assert not [r for r in caplog.records if not r.getMessage().startswith("Compiling ")]


def test_example_is_gone() -> None:
    assert "relu" not in variant_names()
