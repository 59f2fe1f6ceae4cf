"""The command `attnserve tune`."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from datetime import UTC, datetime
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from attnserve import machine
from attnserve.command import AsJson, expanded, main
from attnserve.errors import UserError

if TYPE_CHECKING:
    from attn_kernels.triton.tuned import Kind
    from attn_kernels.triton.tuning import Tile
    from attnserve.files import Journal

Phase = StrEnum(
    "Phase", {"DECODE": "decode", "PREFILL": "prefill", "SHORT_PREFILL": "short-prefill"}
)
Dtype = StrEnum("Dtype", ["FLOAT32", "BFLOAT16", "FLOAT16"])
Device = StrEnum("Device", ["CUDA", "CPU"])

COMPILING = 0.45
"""Share of the time in which candidates are compiled, at most."""

DRY_VARIANTS = ["softpick", "selective"]
"""What is tuned on a CPU if nothing is said."""


def tune(
    variants: Annotated[list[str] | None, Option(help="Default: all.")] = None,
    dtypes: Annotated[
        list[Dtype] | None, Option(help="Of queries, keys and values. Default: bfloat16.")
    ] = None,
    head_sizes: Annotated[list[int] | None, Option(min=1, help="Default: 128.")] = None,
    groups: Annotated[
        list[int] | None, Option(min=1, help="Query heads of a KV head. Default: 4.")
    ] = None,
    phases: Annotated[
        list[Phase] | None,
        Option(
            help="short-prefill: of too few queries to fill the GPU with large tiles. Default: all."
        ),
    ] = None,
    block_sizes: Annotated[
        list[int] | None, Option(min=1, help="Tokens of a block of the cache. Default: 64.")
    ] = None,
    kv_heads: Annotated[int, Option(min=1, help="KV heads of what is timed.")] = 8,
    minutes: Annotated[
        float, Option(min=0.0, help="All of it takes about so long, whatever is asked for.")
    ] = 7.0,
    out: Annotated[
        Path | None,
        Option(
            parser=expanded,
            metavar="DIR",
            help="Folder of the table. Default: the one that is read from: "
            "ATTNSERVE_TRITON_CONFIGS, else ~/.cache/attnserve/triton.",
        ),
    ] = None,
    jobs: Annotated[int, Option(min=1, help="Processes that compile.")] = machine.cores(),
    force: Annotated[bool, Option("--force", help="Measure again what was measured.")] = False,
    device: Annotated[
        Device, Option(help="cpu: a dry run of tiny cases in Triton's interpreter.")
    ] = Device.CUDA,
    candidates: Annotated[
        Path | None,
        Option(
            parser=expanded,
            metavar="FILE",
            help="Only these tiles, which benchmarks.triton_compile.candidates has compiled for "
            "the same architecture.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Find the fastest tiles of the attention kernels on this GPU.

      attnserve tune --variants softpick --head-sizes 64 128

    For each kernel, candidates are compiled side by side, those that spill registers or need more
    shared memory than there is are dropped, and the others are timed in CUDA graphs whose caches do
    not fit the GPU's; the slower half drops out again and again. A tile is taken if its outputs are
    those of the usual tile and of the float64 reference, and if it is faster than the usual one.
    Where the usual tile fails or is wrong, the exit code is 1.

    The table, named after the GPU and Triton's version, is written whenever a kernel is done, and
    found by every server that starts from then on. Run again, the command goes on with the kernels
    that are missing.
    """
    dry = device is Device.CPU
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    try:
        import torch
        import triton
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'attnserve[cuda]'") from None
    if not dry and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no GPU to tune for; --device cpu is a dry run"
        )
    from attn_kernels.triton import tuned
    from attn_kernels.triton.layer import device_figures
    from attnserve.files import Journal, check_writable
    from attnserve.tune.candidates import kinds_of, listed

    kinds = kinds_of(
        phases=[phase.value for phase in phases or Phase],
        variants=variants or (DRY_VARIANTS if dry else None),
        dtypes=[dtype.value for dtype in dtypes or ()] or (["float32"] if dry else None),
        head_sizes=head_sizes or ([16] if dry else None),
        groups=groups or ([2] if dry else None),
        block_sizes=block_sizes,
    )
    arch, _ = device_figures(torch.device(device.value, 0) if not dry else torch.device("cpu"))
    name = machine.cpu_model() if dry else torch.cuda.get_device_name()
    folder = out or tuned.user_folder()
    if folder is None:
        raise UserError(f"this user has no home folder: --out or {tuned.VARIABLE} names another")
    table = folder / tuned.file_name(name)
    check_writable(table)
    if table.exists():
        tuned.read(table)  # now rather than when the first kernel is done
    about = {"device": name, "arch": arch, "triton": triton.__version__}
    about |= {"torch": torch.__version__, "commit": machine.commit()}
    given = listed(candidates, arch) if candidates else {}
    journal = Journal(table.with_suffix(".jsonl"), about, force)
    failed = run(
        kinds, given, journal, table, about,
        kv_heads=2 if dry else kv_heads, minutes=minutes, jobs=jobs, dry=dry,
    )  # fmt: skip
    results = {
        str(kind): journal.values[str(kind)] for kind in kinds if str(kind) in journal.values
    }
    if as_json:
        print(json.dumps({"table": str(table), **about, "kinds": results}))
    else:
        for text, result in results.items():
            print(f"{text}: {result['ratio']:.2f} of the usual tile's time: {result['tile']}")
        print(f"{table}: {len(results)} of {len(kinds)} kernels")
    return 1 if failed else 0


def run(
    kinds: list[Kind],
    given: dict[str, list[Tile]],
    journal: Journal,
    table: Path,
    about: dict[str, Any],
    *,
    kv_heads: int,
    minutes: float,
    jobs: int,
    dry: bool,
) -> list[Kind]:
    """Tune the kernels that the journal does not have, and write the table after each; return those
    whose usual tile fails. `given` are the candidates of some kernels by name."""
    import torch

    from attn_kernels.triton.tuning import GLUON
    from attnserve.tune.candidates import candidates, usual_tile
    from attnserve.tune.compiling import Compilers, Place, Task
    from attnserve.tune.search import Bench, UsualTileError, search
    from attnserve.tune.trial import trial

    device = "cpu" if dry else "cuda"
    began = time.monotonic()
    deadline = began + 60 * minutes
    todo = [kind for kind in kinds if str(kind) not in journal.values]
    tiles, failed = {}, []
    for kind in todo:
        every = candidates(kind, about["arch"], few=dry)
        if str(kind) in given:
            every = list(dict.fromkeys([usual_tile(kind, about["arch"]), *given[str(kind)]]))
        tiles[kind] = every
    # A candidate of each kernel in turn, from the most promising on.
    tasks = [
        Task(kind, tile, 0)
        for of_all in zip_longest(*([(kind, tile) for tile in tiles[kind]] for kind in todo))
        for kind, tile in filter(None, of_all)
    ]
    cold = 0 if dry else 3 * torch.cuda.get_device_properties(0).L2_cache_size
    bench = Bench(device, kv_heads, cold, dry)
    with Compilers(Place(device, kv_heads, dry), jobs) as compilers:
        faults = compilers.compile(tasks, began + 60 * minutes * COMPILING)
        dropped = sum(map(bool, faults.values()))
        print(
            f"{len(faults)} of {len(tasks)} candidates compiled in "
            f"{time.monotonic() - began:.0f} s, {dropped} of them dropped",
            file=sys.stderr,
        )
        gluon = [task for task, why in faults.items() if task.tile.kernel == GLUON and not why]
        if gluon and (why := trial(gluon[0].kind, gluon[0].tile, compilers.place)):
            print(f"no tile in Gluon is tried: the first one {why}", file=sys.stderr)
            tiles = {kind: [t for t in of if t.kernel != GLUON] for kind, of in tiles.items()}
        for index, kind in enumerate(todo):
            now = time.monotonic()
            if now > deadline:
                print(f"out of time, run again for {len(todo) - index} more", file=sys.stderr)
                break
            usual, *others = tiles[kind]
            good = [usual, *(tile for tile in others if faults.get(Task(kind, tile, 0)) == "")]
            share = now + (deadline - now) / (len(todo) - index)
            print(f"{kind}: {len(good)} tiles ...", file=sys.stderr, flush=True)
            find = functools.partial(search, kind, good, bench, compilers, journal, share)
            try:
                result = journal.get(str(kind), find)
            except UsualTileError as error:
                print(f"  {error}", file=sys.stderr)
                failed.append(kind)
                continue
            print(f"  {result['ratio']} of the usual tile's time", file=sys.stderr)
            write_table(table, kinds, journal, about)
    return failed


def write_table(table: Path, kinds: list[Kind], journal: Journal, about: dict[str, Any]) -> None:
    """Write the tiles that the journal has, beside those that the table has of other kernels."""
    from attn_kernels.triton import tuned
    from attn_kernels.triton.tuning import Tile
    from attnserve.files import write_text

    tuned.read.cache_clear()
    tiles = tuned.read(table)[1] if table.exists() else {}
    done = [kind for kind in kinds if str(kind) in journal.values]
    tiles |= {kind: Tile(**journal.values[str(kind)]["tile"]) for kind in done}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    others = {name: value for name, value in about.items() if name != "arch"}
    write_text(table, tuned.text_of(about["arch"], tiles, **others, date=date))


if __name__ == "__main__":
    main(tune, "python -m attnserve.tune.command")
