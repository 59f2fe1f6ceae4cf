"""The least time of each variant's GPU kernels, counted, not measured.

Nothing is measured and no GPU is needed: bytes, matrix products, other operations and exponentials
are counted along the kernels' own loops, tile by tile, and divided by what a chip can do at most.
The largest quotient is the limit; all others are taken to be hidden behind it. A kernel can come
near it or not, but not below. "x softmax" is a limit divided by softmax's of the same case.

Bytes: each key and value comes from memory once; what a tile reads again is found in the chip's
cache if that holds what was read in between. "loop bytes" is all that is loaded and stored; where
a cache's rate is known, they bind too. Keys are walked without a window.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from attn_kernels import get_variant, variant_names
from attnserve.options import command_line
from benchmarks import RESULTS
from benchmarks.kernels.case import Case
from benchmarks.roofline.chips import CHIPS, REACHED, Chip
from benchmarks.roofline.count import Counts, count
from benchmarks.roofline.trace import UncountedError

CSV = RESULTS / "roofline.csv"
NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE = 32, 8, 16
CACHES = {"bf16": 2, "fp8": 1}


def cases() -> Iterable[Case]:
    """Decode over batch and context, prefill of 2048 tokens with and without a context."""
    heads = (NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE)
    for head_dim in (64, 128):
        for batch, ctx in product((1, 8, 64), (1024, 8192, 32768)):
            yield Case("decode", "bf16", head_dim, ctx, batch, 1, *heads)
        for ctx in (0, 8192):
            yield Case("prefill", "bf16", head_dim, ctx, 1, 2048, *heads)


def limits(counts: Counts, chip: Chip) -> dict[str, float]:
    """Seconds that each of the chip's resources needs at least."""
    found = {
        "memory": counts.memory_bytes(chip.cache) / chip.memory,
        "tensor": counts.flops / chip.tensor,
        "scalar": counts.ops.scalar / chip.scalar,
        "special": counts.ops.special / chip.special,
    }
    if chip.cache_rate is not None:
        found["cache"] = counts.loop_bytes / chip.cache_rate
    return found


def row(name: str, case: Case, cache: str, chip: Chip) -> dict[str, Any]:
    """Counts and limits of one call.

    Raises:
        UncountedError, ValueError: as `count`.
    """
    counts = count(get_variant(name), case, chip.arch, chip.processors, CACHES[cache])
    seconds = limits(counts, chip)
    binds = max(seconds, key=lambda key: seconds[key])
    return {
        "chip": chip.name,
        "variant": name,
        "phase": case.phase,
        "kv_dtype": cache,
        "head_dim": case.head_dim,
        "batch": case.batch,
        "ctx": case.ctx,
        "new_tokens": case.new_tokens,
        "parts": counts.parts,
        "tile_rows": counts.tile.rows,
        "tile_keys": counts.tile.keys,
        "memory_bytes": counts.memory_bytes(chip.cache),
        "loop_bytes": counts.loop_bytes,
        "tensor_flops": counts.flops,
        "useful_flops": case.flops,
        "scalar_ops": counts.ops.scalar,
        "exponentials": counts.ops.special,
        **{
            f"us_{key}": 1e6 * seconds[key] if key in seconds else None
            for key in ("memory", "cache", "tensor", "scalar", "special")
        },
        "binds": binds,
        "us_limit": 1e6 * seconds[binds],
    }


def rows_of(
    names: Sequence[str], chips: Sequence[Chip]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All rows, and why a variant has none."""
    rows, failed = [], {}
    for name in names:
        try:
            rows += [row(name, *each) for each in product(cases(), CACHES, chips)]
        except (UncountedError, ValueError) as error:
            failed[name] = str(error)
    return rows, failed


CASE = ["chip", "phase", "kv_dtype", "head_dim", "batch", "ctx"]


def with_ratios(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows, sorted by chip and case, each with its ratio to softmax's limit."""
    table = pd.DataFrame(rows)
    softmax = table[table.variant == "softmax"].set_index(CASE).us_limit
    if len(softmax):
        table["ratio_softmax"] = (
            table.us_limit / softmax.loc[pd.MultiIndex.from_frame(table[CASE])].to_numpy()
        )
    else:
        table["ratio_softmax"] = float("nan")
    order = pd.Categorical(table.chip, [chip.name for chip in CHIPS])
    table = table.assign(chip=order).sort_values([*CASE, "variant"], kind="stable")
    return table.assign(chip=table.chip.astype(str)).reset_index(drop=True)


def shown(table: pd.DataFrame) -> str:
    """For people: softmax's limit and what binds it, then each variant's ratio and bound."""
    lines = []
    for key, group in table.groupby(CASE, sort=False):
        chip, phase, cache, head_dim, batch, ctx = key
        new = f"+{group.new_tokens.iloc[0]}" if phase == "prefill" else f" x{batch}"
        line = {"chip": chip, "KV": cache, "D": head_dim, "case": f"{phase} {ctx}{new}"}
        for each in group.itertuples():
            if each.variant == "softmax":
                line["softmax us"] = f"{each.us_limit:.1f} {each.binds}"
        for each in group.itertuples():
            if each.variant != "softmax":
                line[each.variant] = f"{each.ratio_softmax:.2f} {each.binds}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("-").to_string(index=False)


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """By chip, phase and variant: the range of ratios to softmax, and what binds."""
    found: dict[str, Any] = {}
    for (chip, phase, variant), group in table.groupby(["chip", "phase", "variant"], sort=False):
        ratios = [round(float(value), 3) for value in group.ratio_softmax.agg(["min", "max"])]
        found.setdefault(chip, {}).setdefault(phase, {})[variant] = {
            "ratio_softmax": ratios,
            "binds": group.binds.value_counts().to_dict(),
        }
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made, add = command_line("benchmarks.roofline", __doc__)
    names = [chip.name for chip in CHIPS]
    add("--chips", "chips to print and save", nargs="+", choices=names, default=names)
    add("--csv", "written anew", type=Path, default=CSV)
    made.add_argument("--no-save", action="store_true", help="write no CSV")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, the sources and, last, one JSON object; 1 if a variant has no row."""
    options = parser().parse_args(arguments)
    chips = [chip for chip in CHIPS if chip.name in options.chips]
    rows, failed = rows_of(variant_names(), chips)
    found: dict[str, Any] = {}
    if rows:
        table = with_ratios(rows)
        found = summary(table)
        if not options.no_save:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            partial = options.csv.with_name(options.csv.name + ".partial")
            table.to_csv(partial, index=False, float_format="%.6g")
            partial.replace(options.csv)
        print(shown(table))
    print(f"\n{NUM_HEADS} query heads, {NUM_KV_HEADS} KV heads, queries in bf16. Sources:")
    for chip in chips:
        for name, source in chip.sources.items():
            print(f"  {chip.name} {name} {getattr(chip, name):.4g}: {source}")
    print("\n  ".join(REACHED))
    for name, why in failed.items():
        print(f"roofline: {name} has no row: {why}", file=sys.stderr)
    csv = None if options.no_save else str(options.csv)
    print(json.dumps({"rows": len(rows), "csv": csv, "failed": failed, "limits": found}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
