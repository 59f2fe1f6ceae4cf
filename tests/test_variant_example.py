"""docs/VARIANT.md's promise: the tests cover a variant in files of its own as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attn_kernels.test_example import example, write_example

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent

PLUGIN = """
from tests.attn_kernels import paper_formulas
exec(open({file!r}).read(), vars(paper_formulas))
"""
"""A pytest plugin: the formula once more, for the tests."""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # four instruction sets are compiled, and 260 tests run
def test_example_is_covered_by_the_tests_as_they_are(tmp_path: Path) -> None:
    """In a package of its own, named by an entry point; its kernels are compiled (some minutes)."""
    write_example(tmp_path / "relu")
    info = tmp_path / "relu_attention-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: relu-attention\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[attnserve.variants]\nrelu = relu\n")
    formula = tmp_path / "formula.txt"
    formula.write_text(example("python", "FORMULAS["))
    (tmp_path / "relu_formula.py").write_text(PLUGIN.format(file=str(formula)))

    command = [sys.executable, "-m", "pytest", "-q", "-k", "relu", "-m", "not slow and not gpu"]
    command += ["-p", "relu_formula", "-p", "no:cacheprovider", "--timeout=1800"]
    # These register the example themselves.
    command += [f"--ignore=tests/attn_kernels/test_{name}.py" for name in ("example", "registry")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [*command, "tests/attn_kernels", "tests/hf_attn"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    summary = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= 200, summary
