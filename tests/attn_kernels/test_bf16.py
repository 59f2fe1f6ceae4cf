"""Products of pairs of bfloat16 (AVX512-BF16), on processors that have none: the same sums by other
instructions, and what the compiler makes of the real ones."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

from attn_kernels import cpu
from attn_kernels.cpu import build
from tests.attn_kernels.test_paged import (
    AMX_TOLERANCE,
    SHAPES,
    TOLERANCE,
    Shape,
    error_against_reference,
)

BLOCKS_OF_32 = (SHAPES[5], SHAPES[6], Shape(26, 2, 32, 96, 600, 150))
"""Where these products are used. In the last one, segments of a span begin between two tiles."""


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Load softmax kernels of that kind as "avx512"."""
    if "avx512" not in cpu.usable_isas():
        pytest.skip("needs AVX-512")
    monkeypatch.setenv("CXX", "g++ -DDOT_IN_AVX512")
    build.build_library.cache_clear()
    cpu._load.cache_clear()
    yield
    build.build_library.cache_clear()
    cpu._load.cache_clear()


@pytest.mark.usefixtures("instead")
def test_sums_of_pairs_equal_reference() -> None:
    for shape in BLOCKS_OF_32:
        for window, threads in ((None, 1), (19, 3)):
            error = error_against_reference(
                "avx512", "softmax", shape, window, torch.bfloat16, threads
            )
            # Weights are rounded to bfloat16 nowhere else.
            assert TOLERANCE < error <= AMX_TOLERANCE, (shape, window)
    # Head size 80 is not for them.
    error = error_against_reference("avx512", "softmax", SHAPES[3], None, torch.bfloat16, 1)
    assert error <= TOLERANCE


def test_compilers_know_the_instruction() -> None:
    if not (compiler := shutil.which("g++")) or "avx512" not in cpu.usable_isas():
        pytest.skip("needs g++, and a processor with AVX-512")
    source = '#include "bf16.hpp"\nauto* product = multiply_bf16<2, true>;\n'
    flags = build.flags_of("avx512_bf16")
    options = ["-xc++", "-S", "-o-", f"-I{build.HERE}", "-"]
    done = subprocess.run(
        [compiler, *flags, *options], input=source, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("vdpbf16ps") >= 8
