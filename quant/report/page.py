"""A page with everything in it: no other file is needed to read it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from quant.report.frame import lines
from quant.report.section import explanations
from quant.store import Stored
from quant.texts import explained

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: left; white-space: nowrap }
img { max-width: 100% } .wide { overflow-x: auto }
"""


def page(results: Sequence[Stored], plots: Mapping[str, Path]) -> str:
    """The HTML text."""
    images = "".join(
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for name, path in plots.items()
    )
    told = "".join(f"<p>{html.escape(line)}</p>" for line in explanations(results))
    machines = "; ".join(sorted({stored.machine for stored in results}))
    samples = "; ".join(sorted({str(stored.key["samples"]) for stored in results}))
    said = dict.fromkeys(explained(**stored.texts) for stored in results)
    texts = "".join(f"<p>{html.escape(line)}</p>" for line in said)
    names = ", ".join(dict.fromkeys(stored.checkpoint for stored in results))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Quantization</title>"
        f"<style>{STYLE}</style><h1>What few bits cost</h1>"
        f"<p>Checkpoints: {html.escape(names)}.</p>{texts}<p>Figures are of the text that was "
        "measured on unless another is named, with 95 % intervals over its sequences; changes are "
        "against the unquantized model on the same text.</p>"
        f"{images}<h2>Outliers and cost</h2>{told}"
        f"<h2>All cells</h2><div class=wide>{table(results)}</div>"
        f"<p>Samples: {html.escape(samples)}</p><p>On: {html.escape(machines)}</p></html>\n"
    )


def table(results: Sequence[Stored]) -> str:
    """The main figures in HTML."""
    head, *rows = lines(results)
    rows_text = ["<tr>" + "".join(f"<th>{html.escape(text)}" for text in head)]
    rows_text += ["<tr>" + "".join(f"<td>{html.escape(text)}" for text in row) for row in rows]
    return f"<table>{''.join(rows_text)}</table>"
