"""Tables, plots and pages from a sweep's results; `python -m quant.report` writes them all.

`section.section` is the part of docs/RESULTS.md.
"""
