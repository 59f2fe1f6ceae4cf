"""Tables, plots and pages from a sweep's results; `python -m quant.report` writes them all."""

from quant.report.frame import frame, table
from quant.report.section import section
from quant.report.write import write

__all__ = ["frame", "section", "table", "write"]
