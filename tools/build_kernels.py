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
from attn_kernels.cpu.build import ISAS, BuildError, build_library, header_of
from quant_kernels import ops
from quant_kernels.weight import BITS


def build(name: str | int, isa: str, quantized: bool) -> Path | None:
    """One library, of a variant (for quantized caches or others) or of a width in bits; None where
    there is none to build."""
    if isinstance(name, int):
        return ops.build(name, isa)
    variant = get_variant(name)
    header = header_of(variant)
    if header is None:
        return None
    return build_library(header, type(variant).__name__, isa, quantized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=list(ISAS), help="default: all of them"
    )
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="default: %(default)s")
    options = parser.parse_args()

    names: list[tuple[str | int, bool]] = [(bits, False) for bits in BITS]
    names += [(name, quantized) for name in variant_names() for quantized in (False, True)]
    wanted = [(name, isa, quantized) for name, quantized in names for isa in options.isa]
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            done = pool.map(lambda each: build(*each), wanted)
            libraries = list(tqdm(done, total=len(wanted), unit="library"))
        # What calls those of the bit-widths; of no instruction set.
        wanted.append(("operators", "portable", False))
        libraries.append(ops.build_operators())
    except BuildError as error:
        raise SystemExit(f"build_kernels: {error}") from None
    for (name, isa, quantized), path in zip(wanted, libraries, strict=True):
        what = f"{name} bits" if isinstance(name, int) else name + ", quantized" * quantized
        print(f"{what:24} {isa:10} {path or 'none of its own'}")
    print(json.dumps({"libraries": sum(path is not None for path in libraries)}))


if __name__ == "__main__":
    main()
