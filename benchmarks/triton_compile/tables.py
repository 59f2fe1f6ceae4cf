"""Compile what tables of tiles name: `python -m benchmarks.triton_compile.tables TABLE ...`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import results

if TYPE_CHECKING:
    from attn_kernels.triton.tuned import Kind
    from attn_kernels.triton.tuning import Tile
    from benchmarks.triton_compile.dry import DryCompiler

NUM_KV_HEADS = 8


def tables(
    files: Annotated[
        list[Path] | None, Argument(help="Tables. Default: those of the package.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compile every entry of tables of tiles for its architecture, as `attnserve tune` does.

    A row is a kernel, with the limits of benchmarks.triton_compile: 24 bytes of spills and the
    shared memory that the chip has. One that exceeds them, or does not compile, is marked, and the
    exit code is 1. No GPU is needed.
    """
    with tempfile.TemporaryDirectory(prefix="attnserve-triton-") as cache:
        # Before Triton is imported. No table counts but those that are named.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        from attn_kernels.triton import tuned
        from benchmarks.triton_compile.dry import TARGETS, DryCompiler

        paths = files or sorted(tuned.PACKAGED.glob("*.json"))
        read = {path: tuned.read(path) for path in paths}
        for path, (arch, _) in read.items():
            if arch not in TARGETS:
                raise UserError(f"{path}: arch: {arch!r} is none of {', '.join(TARGETS)}")
        compiler = DryCompiler(Path(cache))
        rows = [
            {"table": path.name, **row}
            for path, (arch, tiles) in read.items()
            for kind, tile in tiles.items()
            for row in rows_of(compiler, arch, kind, tile)
        ]
    wrong = sum(bool(row["error"] or row["violation"]) for row in rows)
    about = {"tables": len(read), "kernels": len(rows), "wrong": wrong}
    results.report(about, rows, results.table(rows), csv=None, as_json=as_json)
    return 1 if wrong else 0


def rows_of(compiler: DryCompiler, arch: str, kind: Kind, tile: Tile) -> Iterator[results.Row]:
    """Yield a row for each kernel that an entry launches with the loads that it was tuned with."""
    import torch

    from attnserve.tune.work import LOADS, Work
    from benchmarks.triton_compile.__main__ import reason, row_of
    from benchmarks.triton_compile.calls import CACHE_BYTES

    for load in LOADS[kind.phase]:
        case = {"arch": arch, "kind": str(kind), "load": "x".join(map(str, load))}
        try:
            if kind.cache != kind.dtype:
                raise ValueError(f"caches of {kind.cache} are not compiled here")
            work = Work(kind, load, NUM_KV_HEADS, "cpu", launched=False, arch=arch)
            blocks = CACHE_BYTES // work.kv[0].nbytes
            work.kv = torch.empty(blocks, *work.kv.shape[1:], dtype=work.dtype)
            with compiler.target(arch) as found:
                work.attend(tile)
            yield from (row_of(case, kernel) for kernel in found)
        except Exception as error:  # a compiler raises all kinds; the other entries go on
            yield row_of(case) | {"error": reason(error)}


if __name__ == "__main__":
    main(tables, "python -m benchmarks.triton_compile.tables")
