"""The commands of this package under one name; each is also `python -m quant.COMMAND`."""

from __future__ import annotations

from attnserve.command import run_package
from quant.convert import convert
from quant.quantize import quantize
from quant.report.__main__ import report
from quant.sensitivity import sensitivity
from quant.sweep import sweep

if __name__ == "__main__":
    about = "What 2 to 8 bits cost each attention variant."
    run_package("python -m quant", about, sweep, quantize, convert, sensitivity, report)
