"""Time the CPU attention kernels.

Every variant, vLLM's C++ softmax (`cpu_attention_with_kv_cache`) and torch's
`scaled_dot_product_attention` on dense keys and values run in turn, A B C A B C ..., on the same
random data. Before a case is timed, each one's output on this data is compared with the float64
law; what is wrong is not timed, its ratios are null and the exit code is 1.

/vLLM and /SDPA are our time divided by theirs (below 1: we are faster): the median over the rounds
of the two times of one round. Both compute softmax, whatever the variant. A decode case is copied
until it is larger than the caches, and each call takes the next copy, as a model's layers would.
"of limit" is, in decode, the rate at which keys and values are read by the read bandwidth, and in
prefill the rate of arithmetic by torch's float32 matrix product (for bf16 too); both limits are
measured before and after each case.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from attn_kernels import VariantError, get_variant, variant_names
from attn_kernels.cpu import usable_isas
from attnserve import machine
from attnserve.options import positive
from benchmarks import RESULTS
from benchmarks.kernels.case import DTYPES, FULL, QUICK, Grid
from benchmarks.kernels.measure import Budget
from benchmarks.kernels.peer import ISAS, PeerError
from benchmarks.kernels.run import BenchmarkError, Options, run

CSV = RESULTS / "kernels_cpu.csv"
SECONDS, QUICK_SECONDS = 6.0, 1.0


def natural(text: str) -> int:
    """An argument that must be a whole number, 0 or above."""
    return 0 if text == "0" else positive(text)


def seconds(text: str) -> float:
    """An argument that must be a finite time above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value


def known_variant(text: str) -> str:
    """An argument that must name a variant."""
    try:
        return get_variant(text).name
    except VariantError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        usage="%(prog)s [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def listed(values: Sequence[object]) -> str:
        return " ".join(str(value) for value in values)

    add = made.add_argument
    add("--quick", action="store_true", help="a few cases, under a minute (default: all)")
    add(
        "--threads",
        type=positive,
        default=machine.cores(),
        help="threads of everything that is timed (default: %(default)s, this machine's cores)",
    )
    add(
        "--variants",
        type=known_variant,
        nargs="+",
        metavar="NAME",
        help=f"default: all that have a C++ kernel, of {listed(variant_names())}",
    )
    add("--isa", choices=usable_isas(), help="instruction set of our kernels (default: the best)")
    add(
        "--peer-isa",
        choices=ISAS,
        default="vec",
        help="vLLM's kernel; amx is for bf16 only, others then use vec (default: %(default)s)",
    )
    add(
        "--seconds",
        type=seconds,
        help=f"for the rounds of a case, in s (default: {SECONDS}; {QUICK_SECONDS} if --quick)",
    )
    add("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    add("--num-heads", type=positive, default=8, help="query heads (default: %(default)s)")
    add("--num-kv-heads", type=positive, default=2, help="KV heads (default: %(default)s)")
    add(
        "--block-size",
        type=positive,
        default=128,
        help="tokens in a block of both caches (default: %(default)s)",
    )
    save = made.add_argument_group("results")
    save.add_argument(
        "--csv",
        type=Path,
        default=CSV,
        help="rows are added to it (default: benchmarks/results/kernels_cpu.csv of this checkout)",
    )
    save.add_argument("--plot", type=Path, help="a PNG (default: beside --csv)")
    save.add_argument("--no-save", action="store_true", help="write neither")
    grid = made.add_argument_group("cases (the default is the full grid, see also --quick)")
    for name, kind, text in (
        ("phases", str, "of the two"),
        ("dtypes", str, "of queries, keys and values"),
        ("head_dims", positive, "elements of a head"),
        ("ctx", positive, "decode: tokens in the cache of each request"),
        ("batch", positive, "decode: requests"),
        ("new_tokens", positive, "prefill: tokens of the chunk"),
        ("context", natural, "prefill: tokens before the chunk"),
    ):
        default = listed(getattr(FULL, name))
        quick = listed(getattr(QUICK, name))
        also = "" if quick == default else f"; {quick} if --quick"
        choices = {"phases": FULL.phases, "dtypes": tuple(DTYPES)}.get(name)
        grid.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            nargs="+",
            choices=choices,
            metavar="N" if choices is None else None,
            help=f"{text} (default: {default}{also})",
        )
    return made


def chosen_grid(options: argparse.Namespace) -> Grid:
    """The full or the quick grid, with what the options say instead."""
    grid = QUICK if options.quick else FULL
    named = {field.name: getattr(options, field.name) for field in dataclasses.fields(Grid)}
    return dataclasses.replace(grid, **{name: tuple(v) for name, v in named.items() if v})


def read_options(argv: Sequence[str] | None) -> Options:
    """The command line's meaning; exits with code 2 where it has none."""
    command = parser()
    given = command.parse_args(argv)
    if given.num_heads % given.num_kv_heads:
        command.error(f"{given.num_heads} heads cannot share {given.num_kv_heads} KV heads")
    quick = given.quick
    plot = given.plot or given.csv.with_name(given.csv.stem + "-quick" * quick + ".png")
    budget = Budget(
        given.seconds or (QUICK_SECONDS if quick else SECONDS), min_rounds=3 if quick else 5
    )
    cases = chosen_grid(given).cases(given.num_heads, given.num_kv_heads, given.block_size)
    return Options(
        cases=tuple(cases),
        threads=given.threads,
        variants=given.variants and tuple(given.variants),
        isa=given.isa,
        peer_isa=given.peer_isa,
        budget=budget,
        seed=given.seed,
        csv=None if given.no_save else given.csv,
        plot=None if given.no_save else plot,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = read_options(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read where vLLM is imported
    try:
        return run(options)
    except (BenchmarkError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
