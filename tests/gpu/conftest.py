"""GPU tests run twice: tiny cases in Triton's interpreter on the CPU, all cases on a GPU.

`TRITON_INTERPRET=0 pytest -m gpu` chooses the second. With `-n 15` (xdist) that many processes
compile side by side, and one that loses its device is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kernels be interpreted, or skip a GPU test where there is no GPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device (torch {torch.__version__})")
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    if isinstance(triton.language.cdiv, InterpretedFunction):
        pytest.skip("kernels are interpreted in this process: run with TRITON_INTERPRET=0")
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        # An illegal memory access spoils the device for this process; xdist starts another.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        raise
