"""Compile the CPU kernels of all variants and bit-widths ahead of use, for container images.

Usage: python tools/build_kernels.py [--isa ISA ...] [--jobs N]

They go where the server looks for them, ATTNSERVE_CACHE. A library of an instruction set runs only
where the processor has it, and the server takes the best that is there; the compiling machine needs
none of them. About 30 seconds a library on one slow core.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from tqdm import tqdm

from attn_kernels import get_variant, variant_names
from attn_kernels.cpu.build import HERE, ISAS, BuildError, build_library
from quant_kernels import ops
from quant_kernels.weight import BITS


def build(name: str | int, isa: str) -> Path | None:
    """One library, of a variant or of a width in bits; None where there is none to build."""
    if isinstance(name, int):
        return ops.build(name, isa) if isa != "amx" else None  # AVX-512's is taken
    variant = get_variant(name)
    header = variant.cpu_header or HERE / "variants" / f"{name}.hpp"
    return build_library(header, type(variant).__name__, isa) if header.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=list(ISAS), help="default: all of them"
    )
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="default: %(default)s")
    options = parser.parse_args()

    names: list[str | int] = [*variant_names(), *BITS]
    wanted = [(name, isa) for name in names for isa in options.isa]
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            done = pool.map(lambda pair: build(*pair), wanted)
            libraries = list(tqdm(done, total=len(wanted), unit="library"))
        # What calls those of the bit-widths; of no instruction set.
        wanted.append(("operators", "portable"))
        libraries.append(ops.build_operators())
    except BuildError as error:
        raise SystemExit(f"build_kernels: {error}") from None
    for (name, isa), path in zip(wanted, libraries, strict=True):
        what = f"{name} bits" if isinstance(name, int) else name
        print(f"{what:12} {isa:10} {path or 'none of its own'}")
    print(json.dumps({"libraries": sum(path is not None for path in libraries)}))


if __name__ == "__main__":
    main()
