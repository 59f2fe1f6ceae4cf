"""The command line of the sweep."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from attnserve.options import positive
from quant import store
from quant.config import TENSORS as PARTS
from quant.options import add_text_options, columns_of_group
from quant.samples import Samples
from quant.schemes.registry import SCHEMES
from quant_kernels.weight import BITS


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m quant.sweep`."""
    made = argparse.ArgumentParser(
        prog="python -m quant.sweep",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "checkpoints",
        nargs="*",
        type=Path,
        help="Hugging Face folders (default: every checkpoint that comes with the project)",
    )
    add(
        "--bits",
        nargs="+",
        type=int,
        default=[2, 3, 4, 8],
        help=f"widths from {BITS[0]} to {BITS[-1]} of what is named first in --what "
        "(default: 2 3 4 8)",
    )
    titles = "; ".join(f"{name}: {scheme.title}" for name, scheme in SCHEMES.items())
    add(
        "--schemes",
        nargs="+",
        default=["rtn", "hqq", "gptq"],
        metavar="SCHEME",
        help=f"of weights. {titles} (default: rtn hqq gptq)",
    )
    add(
        "--targets",
        "--what",
        nargs="+",
        default=["weights", "weights+activations", "kv"],
        help=f"what is quantized: {', '.join(PARTS)}, or several joined by +; activations are the "
        "inputs of linear layers, kv the cache (default: weights weights+activations kv)",
    )
    add(
        "--group-sizes",
        "--groups",
        nargs="+",
        type=columns_of_group,
        default=[64],
        metavar="GROUP",
        help="columns of the weights that share a scale, or channel (default: 64)",
    )
    add("--symmetric", action="store_true", help="no zero points (default: with)")
    add("--act-order", action="store_true", help="gptq takes columns by their Hessian")
    add("--lm-head", action="store_true", help="quantize the head's weights too")
    add("--static", action="store_true", help="calibrated scales of activations, not one a token")
    add(
        "--activation-bits",
        type=int,
        default=8,
        help="of activations beside weights (default: %(default)s)",
    )
    add("--kv-bits", type=int, default=8, help="of the cache beside others (default: %(default)s)")
    units = {
        "sequences": "of each text, for perplexity and divergence",
        "length": "tokens of a sequence; the training length at most",
        "pairs": "of each BLiMP set, with --eval",
        "passages": "of LAMBADA, with --eval",
        "calibration": "sequences to calibrate on",
    }
    for name, text in units.items():
        default = getattr(Samples(), name)
        add(f"--{name}", type=positive, default=default, help=f"{text} (default: {default})")
    add(
        "--lm-eval",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-eval too, where their data is local: pip install -e '.[lm-eval]', "
        "HF_HUB_OFFLINE=1 (default: none)",
    )
    add("--lm-eval-include", type=Path, metavar="DIR", help="folder with tasks of your own (YAML)")
    add("--lm-eval-limit", type=positive, metavar="N", help="documents of a task (default: all)")
    add("--seed", type=int, default=0, help="of the calibration text (default: %(default)s)")
    add(
        "--jobs",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes; fewer if memory is short (default: one a core, %(default)s)",
    )
    add(
        "--ray",
        action="store_true",
        help="spread cells over the Ray cluster that RAY_ADDRESS names, which must see the same "
        "folders; --jobs has no meaning then",
    )
    add_text_options(made)
    add(
        "--eval",
        type=Path,
        metavar="DIR",
        help="folder with wikitext2_test_raw.txt, lambada_test.jsonl and blimp/*.jsonl, which are "
        "measured too (default: none)",
    )
    add("--out", type=Path, default=store.OUT, help="folder of results (default: %(default)s)")
    add("--force", action="store_true", help="measure again what is there")
    return made
