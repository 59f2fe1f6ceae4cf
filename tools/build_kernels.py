"""Compile the CPU kernels of every variant ahead of their first use (for container images).

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


def build(name: str, isa: str) -> Path | None:
    """One library; None for a variant without a C++ form."""
    variant = get_variant(name)
    header = variant.cpu_header or HERE / "variants" / f"{name}.hpp"
    return build_library(header, type(variant).__name__, isa) if header.exists() else None


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=list(ISAS), help="default: all of them"
    )
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="default: %(default)s")
    options = parser.parse_args()

    wanted = [(name, isa) for name in variant_names() for isa in options.isa]
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            done = pool.map(lambda pair: build(*pair), wanted)
            libraries = list(tqdm(done, total=len(wanted), unit="library"))
    except BuildError as error:
        raise SystemExit(f"build_kernels: {error}") from None
    for (name, isa), library in zip(wanted, libraries, strict=True):
        print(f"{name:12} {isa:10} {library or 'has no C++ form'}")
    print(json.dumps({"libraries": sum(library is not None for library in libraries)}))


if __name__ == "__main__":
    main()
