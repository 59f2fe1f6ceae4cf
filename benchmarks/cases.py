"""What the benchmarks of whole servers compare: checkpoints, packed or not, pruned or not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_kernels import VariantError, get_variant, variant_from_config
from attnserve import machine
from attnserve.files import CHECKOUT
from attnserve.options import positive
from benchmarks.quantized import DTYPES, name_of
from benchmarks.servers import Server, config_of
from serving.launch.process import LaunchError

BUNDLED = [CHECKOUT / "checkpoints" / name for name in ("softmax", "softpick", "selective")]


@dataclass(frozen=True)
class Case:
    """One server."""

    name: str
    ckpt: Path
    variant: str
    weights: str
    """For example `float32`, or `w4-g64-e8` (benchmarks.quantized)."""
    kv_budgets: tuple[int, ...] = ()
    """Tokens that each layer keeps; none: all."""
    backend: str = ""
    """vLLM's --attention-backend; none: as config.json says."""

    def arguments(self) -> list[str]:
        """Of `vllm serve`."""
        arguments = [f"--attention-backend={self.backend}"] if self.backend else []
        if get_variant(self.variant).prunable:  # with these budgets, whatever config.json says
            variant: dict[str, Any] = {"name": self.variant}
            variant |= {"kv_budgets": self.kv_budgets} if self.kv_budgets else {}
            arguments += [f"--hf-overrides={json.dumps({'attention_variant': variant})}"]
        return arguments

    def columns(self) -> dict[str, str]:
        """Of its rows."""
        return {
            "case": self.name,
            "model": self.ckpt.resolve().name,
            "variant": self.variant,
            "weights": self.weights,
            "kv_budgets": " ".join(map(str, self.kv_budgets)),
            "backend": self.backend or self.variant,
        }


class CaseServer(Server):
    """The server of a case.

    Args:
        case: the case.
        options: with what `add_options` adds.
        arguments: more of `vllm serve`.
    """

    def __init__(self, case: Case, options: argparse.Namespace, *arguments: str) -> None:
        o = options
        common = [f"--dtype={o.dtype}", f"--kv-cache-memory-bytes={o.kv_cache_memory_bytes}"]
        common += ["--enforce-eager"] if o.enforce_eager else []
        mine = [*common, *case.arguments(), *arguments, *o.vllm_args]
        super().__init__(case.name.replace(" ", "-"), case.ckpt, mine, o.threads, o.log_folder)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """One case a checkpoint; of a prunable variant another within its budgets.

    Raises:
        LaunchError: a folder is not what it should be, or two have the same name.
    """
    cases = []
    for folder in [*options.ckpts, *options.packed]:
        config = config_of(folder)
        try:
            variant = variant_from_config(config)
        except VariantError as error:
            raise LaunchError(f"{folder}: {error}", 2) from None
        weights = name_of(folder) if folder in options.packed else options.dtype
        name = variant.name if variant else "softmax"
        cases.append(Case(folder.resolve().name, folder, name, weights))
        if variant is not None and variant.prunable:
            budgets = tuple(options.kv_budgets or variant.kv_budgets)
            layers = config["num_hidden_layers"]
            if budgets and len(budgets) != layers:
                raise LaunchError(f"{len(budgets)} budgets; {folder} has {layers} layers", 2)
            if budgets:
                cases.append(Case(f"{cases[-1].name} pruned", folder, name, weights, budgets))
    names = [case.name for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise LaunchError(f"two checkpoints' folders are called {twice.pop()}: rename one", 2)
    return cases


def add_options(
    parser: argparse.ArgumentParser, add: Callable[..., None], csv: Path, cache: int
) -> None:
    """What the command lines of these benchmarks share.

    Args:
        parser, add: of `benchmarks.options.command_line`.
        csv: where rows go by default.
        cache: `--kv-cache-memory-bytes` by default.
    """
    text = "folders of checkpoints as they were trained"
    parser.add_argument(
        "--ckpts",
        help=f"{text} (default: softmax, softpick and selective of checkpoints/)",
        type=Path,
        nargs="+",
        default=BUNDLED,
    )
    text = "folders that quant.quantize has written (default: none)"
    parser.add_argument("--packed", help=text, type=Path, nargs="+", default=[])
    text = "tokens that each layer of a selective checkpoint keeps; with none, those of config.json"
    add("--kv-budgets", text, type=positive, nargs="*", default=[8, 8, 12, 16])
    text = "of activations, caches, and weights that are not packed"
    add("--dtype", text, choices=list(DTYPES), default="float32")
    add("--threads", "OpenMP threads of a server", type=positive, default=machine.cores())
    text = "of each server, in bytes"
    add("--kv-cache-memory-bytes", text, type=positive, default=cache)
    add("--start-timeout", "longest start of a server, in s", type=positive, default=1800)
    text = "rows are added to it, and a plot is drawn beside it"
    add("--csv", text, type=Path, default=csv)
    add("--log-folder", "where the processes' logs go", type=Path, default=Path(".run"))
    parser.add_argument("--no-save", action="store_true", help="write no CSV and no plot")
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="do not compile the models (default: compile, which takes minutes a server)",
    )
    parser.add_argument(
        "vllm_args", nargs="*", metavar="-- VLLM_ARGS", help="further arguments of `vllm serve`"
    )


def described(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What a run was made on and with; `names` are those of further options."""
    return {
        **machine.described(),
        "threads": options.threads,
        "dtype": options.dtype,
        "mode": "eager" if options.enforce_eager else "compiled",
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        **{name: getattr(options, name) for name in names},
        "vllm_args": " ".join(options.vllm_args),
    }
