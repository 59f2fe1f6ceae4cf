"""Compile the candidates of `attnserve tune` ahead of time, and list those worth a GPU's time:
`python -m benchmarks.triton_compile.candidates`."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attnserve import machine
from attnserve.command import main
from attnserve.files import Journal
from benchmarks import options as opt

if TYPE_CHECKING:
    from attn_kernels.triton.tuned import Kind
    from attn_kernels.triton.tuning import Tile
    from benchmarks.triton_compile.dry import Compiled, DryCompiler

Arch = StrEnum("Arch", ["SM_80", "SM_90", "SM_100", "GFX942"])
Phase = StrEnum(
    "Phase", {"DECODE": "decode", "PREFILL": "prefill", "SHORT_PREFILL": "short-prefill"}
)


def candidates(
    out: Annotated[Path, opt.folder("The list.")] = Path(".run/candidates.jsonl"),
    arch: Annotated[Arch, opt.option("Architecture.")] = Arch.SM_90,
    phases: Annotated[list[Phase] | None, opt.option("Default: all.")] = None,
    variants: Annotated[list[str] | None, opt.option("Default: all.")] = None,
    dtypes: Annotated[list[opt.Dtype] | None, opt.option("Default: bfloat16.")] = None,
    head_sizes: Annotated[list[int] | None, opt.option("Default: 128.", min=1)] = None,
    groups: Annotated[list[int] | None, opt.option("Default: 4.", min=1)] = None,
    block_sizes: Annotated[list[int] | None, opt.option("Default: 64.", min=1)] = None,
    keep: Annotated[int, opt.count("Candidates of a kernel that are listed.")] = 12,
    most: Annotated[
        int | None, opt.option("Compile no more of each, the nearest to the usual tile.", min=1)
    ] = None,
    force: Annotated[bool, opt.option("Compile again what is listed.", "--force")] = False,
) -> None:
    """Compile the candidates of `attnserve tune --candidates FILE` for a GPU that is not here.

    What spills, needs more shared memory than there is, or makes Hopper's matrix products wait for
    one another is left out; of the others, those of the fewest instructions a score are listed.
    That takes a few seconds a candidate. A kernel is listed when it is done, and run again, the
    command goes on with the others.
    """
    with tempfile.TemporaryDirectory(prefix="attnserve-triton-") as cache:
        # Before Triton is imported.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        import triton

        from attnserve.tune.candidates import candidates as tiles_of
        from attnserve.tune.candidates import kinds_of
        from benchmarks.triton_compile.dry import DryCompiler

        about = {"arch": arch.value, "triton": triton.__version__, "commit": machine.commit()}
        out.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(out, about, force)
        compiler = DryCompiler(Path(cache))
        for kind in kinds_of(
            phases=[phase.value for phase in phases or Phase],
            variants=variants,
            dtypes=[dtype.value for dtype in dtypes or ()],
            head_sizes=head_sizes,
            groups=groups,
            block_sizes=block_sizes,
        ):
            every = tiles_of(kind, arch.value)[:most]

            def best(kind: Kind = kind, every: list[Tile] = every) -> list[dict[str, Any]]:
                costs = {tile: cost(compiler, arch.value, kind, tile) for tile in every}
                good = [tile for tile in every if costs[tile] is not None]
                good.sort(key=lambda tile: costs[tile] or 0.0)
                print(f"{kind}: {len(good)} of {len(every)} fit", file=sys.stderr, flush=True)
                return [dataclasses.asdict(tile) for tile in good[:keep]]

            journal.get(str(kind), best)
    print(out)


def cost(compiler: DryCompiler, arch: str, kind: Kind, tile: Tile) -> float | None:
    """Return the instructions a score of all loops with matrix products, 0 where there are none;
    None where the tile is not to be tried.

    Args:
        compiler: compiles, for `arch`.
        kind, tile: what.
    """
    from attnserve.tune.work import LOADS, Work
    from benchmarks.triton_compile.__main__ import row_of
    from benchmarks.triton_compile.tables import NUM_KV_HEADS

    work = Work(kind, LOADS[kind.phase][0], NUM_KV_HEADS, "cpu", launched=False, arch=arch)
    try:
        with compiler.target(arch) as found:
            work.attend(tile)
    except Exception:  # a compiler raises all kinds
        return None
    rows = [row_of({"arch": arch}, kernel) for kernel in found]
    if any(row["violation"] for row in rows) or any(kernel.serialised for kernel in found):
        return None
    return sum(map(per_score, found))


def per_score(kernel: Compiled) -> float:
    """Return the instructions of a kernel's loops by each score of a thread."""
    if kernel.scores is None:
        return 0.0
    return sum(loop.instructions for loop in kernel.loops) / kernel.scores


if __name__ == "__main__":
    main(candidates, "python -m benchmarks.triton_compile.candidates")
