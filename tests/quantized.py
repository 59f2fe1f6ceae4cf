"""Quantized checkpoints for tests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from attnserve.command import main
from quant.quantize import quantize as command


def quantize(arguments: Sequence[str]) -> None:
    """Run `python -m quant.quantize` in this process."""
    with pytest.raises(SystemExit) as ended:
        main(command, "python -m quant.quantize", arguments)
    assert not ended.value.code
