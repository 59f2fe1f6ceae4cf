"""What packed weights save: tokens per second and memory of `vllm serve` with a few bits a weight.

They are compared with the same checkpoint unquantized in stock vLLM (without this project's
plugins).

    python -m quant.quantize CKPT w4 --bits 4 --scheme gptq --embeddings 8
    python -m benchmarks.quantized --ckpt CKPT --packed w4

All servers are up at once and take turns; ratios are made inside a round (benchmarks.rates). In
bfloat16, stock vLLM 0.32 can die on processors with AMX (README): --peer-backend softmax runs this
project's attention kernel in all servers instead, and then nothing but the weights differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from safetensors import safe_open

from attnserve import machine
from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.rates import Case, check, described, measure, results
from benchmarks.servers import Server, append_csv, run
from serving.launch.process import LaunchError

CSV = RESULTS / "quantized_cpu.csv"
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""Of activations, and of weights that are not packed; what safetensors calls them."""


class Peer(Server):
    """The server of one checkpoint.

    Args:
        name: of its rows.
        ckpt: the folder.
        dtype: of activations, and of weights that are not packed.
        stock: without this project's plugins.
        options: the command's.
    """

    def __init__(
        self, name: str, ckpt: Path, dtype: str, stock: bool, options: argparse.Namespace
    ) -> None:
        o = options
        arguments = [f"--dtype={dtype}", f"--max-model-len={max(o.prompt_lens) + o.new_tokens}"]
        arguments += [f"--kv-cache-memory-bytes={o.kv_cache_memory_bytes}"]
        arguments += ["--enable-prompt-tokens-details", *o.vllm_args]
        arguments += ["--enforce-eager"] if o.enforce_eager else []
        arguments += [f"--attention-backend={o.peer_backend}"] if o.peer_backend else []
        super().__init__(name, ckpt, arguments, o.threads, o.log_folder)
        if stock and not o.peer_backend:
            self.environment["VLLM_PLUGINS"] = ""
        self.dtype, self.ckpt = dtype, ckpt
        self.weights = weight_bytes(ckpt, dtype)

    def resident(self) -> int:
        """Bytes that only this server's processes have in memory."""
        process = self.service.process
        if process is None:
            return 0
        leader = psutil.Process(process.pid)
        tree = [leader, *leader.children(recursive=True)]
        return sum(one.memory_full_info().uss for one in tree)


STORED = {"I8": 1, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, by safetensors' names."""


def weight_bytes(folder: Path, dtype: str) -> int:
    """Of all weights of a checkpoint in memory: packed codes and scales as they are stored, a byte
    for a zero point (two if it is no code), other tensors in `dtype`."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it has no iterator
                tensor = opened.get_slice(name)
                size, item = int(np.prod(tensor.get_shape())), STORED[DTYPES[dtype]]
                kind, stored = name.rpartition(".")[2], tensor.get_dtype()
                if kind == "weight_shape":
                    continue
                if kind == "weight_zero_point" and stored == "I32":
                    scales = opened.get_slice(name.replace("zero_point", "scale"))
                    size, item = int(np.prod(scales.get_shape())), 1
                elif kind.startswith("weight_") or stored == "I8":
                    item = STORED[stored]
                total += size * item
    return total


def name_of(folder: Path) -> str:
    """For example `w4-g64 e8`: bits and group of the linear layers, bits of the embeddings.

    Raises:
        LaunchError: it is no packed checkpoint.
    """
    try:
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        groups = config["config_groups"]
    except (OSError, KeyError) as error:
        raise LaunchError(
            f"--packed {folder} is not from quant.quantize: {error!r} missing", 2
        ) from None
    linear = groups["group_0"]["weights"]
    if groups["group_0"]["input_activations"] is not None:
        return f"w{linear['num_bits']}a8"
    name = f"w{linear['num_bits']}-g{linear['group_size'] or 'channel'}"
    return name + (f"-e{groups['group_1']['weights']['num_bits']}" if "group_1" in groups else "")


def rows_of(
    peers: Sequence[Peer], cases: Sequence[Case], resident: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a case and server. `decode_ratio` is to the first, `decode_ratio_2` to the second."""
    rows = results([peer.name for peer in peers], cases)
    for i, row in enumerate(rows):
        case, index = cases[i // len(peers)], i % len(peers)
        ratios = [r[index].rate / r[1].rate for r in case.decode]
        row["weights"] = row.pop("backend")
        row["activations"] = peers[index].dtype
        row["decode_ratio_2_median"] = float(f"{np.median(ratios):.6g}")
        row["weight_bytes"] = peers[index].weights
        row["weight_ratio_2"] = float(f"{peers[index].weights / peers[1].weights:.6g}")
        row["resident_bytes"] = resident[index]
    return rows


def table(rows: Sequence[dict[str, Any]], peers: Sequence[Peer]) -> str:
    """For people: medians, and in brackets p20 to p80."""
    first, second = (f"x {peer.name}" for peer in peers[:2])
    lines = [
        {
            "weights": row["weights"],
            "activations": row["activations"],
            "prompt": row["prompt_len"],
            "batch": row["batch"],
            "decode tokens/s": f"{row['decode_tokens_per_s_median']:.1f} "
            f"({row['decode_tokens_per_s_p20']:.1f}-{row['decode_tokens_per_s_p80']:.1f})",
            first: f"{row['decode_ratio_median']:.2f} "
            f"({row['decode_ratio_p20']:.2f}-{row['decode_ratio_p80']:.2f})",
            second: f"{row['decode_ratio_2_median']:.2f}",
            "prefill tokens/s": f"{row['prefill_tokens_per_s_median']:.0f}",
            "weights MB": f"{row['weight_bytes'] / 1e6:.1f}",
            f"of {peers[1].name}'s": f"{row['weight_ratio_2']:.3f}",
            "resident MB": f"{row['resident_bytes'] / 1e6:.0f}",
        }
        for row in rows
    ]
    return pd.DataFrame(lines).to_string(index=False)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.quantized", __doc__)
    add("--ckpt", "the unquantized checkpoint's folder", type=Path, required=True)
    text = "folders that quant.quantize has written from it"
    add("--packed", text, type=Path, nargs="+", required=True)
    text = "activations of packed checkpoints"
    add("--packed-dtypes", text, nargs="+", choices=DTYPES, default=["float32"])
    text = "attention backend of all servers; none: stock vLLM's own for the unquantized ones"
    add("--peer-backend", text, default="")
    lengths = {"type": positive, "nargs": "+"}
    add("--prompt-lens", "tokens of a prompt", default=[128], **lengths)
    add("--batches", "requests at once", default=[1], **lengths)
    add("--new-tokens", "tokens of an answer", type=positive, default=64)
    add("--rounds", "decode rounds of each case", type=positive, default=7)
    add("--prefill-rounds", "uncached rounds of each case", type=positive, default=3)
    add("--threads", "OpenMP threads of a server", type=positive, default=machine.cores())
    add("--kv-cache-memory-bytes", "of each server, in bytes or as 2G", default="256M")
    add("--seed", "of the random prompts", type=int, default=0)
    add("--start-timeout", "longest start of all servers, in s", type=positive, default=1800)
    add("--csv", "rows are added to it", type=Path, default=CSV)
    add("--log-folder", "where the servers' logs go", type=Path, default=Path(".run"))
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    parser.add_argument(
        "--enforce-eager", action="store_true", help="do not compile the models (default: compile)"
    )
    parser.add_argument(
        "vllm_args", nargs="*", metavar="-- VLLM_ARGS", help="further arguments of `vllm serve`"
    )
    options = parser.parse_args(arguments)
    check(options)
    return options


def peers_of(options: argparse.Namespace) -> list[Peer]:
    """The unquantized checkpoint in float32 and in bfloat16, then the packed ones."""
    plain = [Peer(dtype, options.ckpt, dtype, True, options) for dtype in DTYPES]
    packed = [
        Peer(name_of(folder), folder, dtype, False, options)
        for dtype in options.packed_dtypes
        for folder in options.packed
    ]
    return plain + packed


async def work(peers: Sequence[Peer], options: argparse.Namespace) -> tuple[list[Case], list[int]]:
    """The cases, and what is resident afterwards."""
    cases = await measure(peers, options)
    return cases, [peer.resident() for peer in peers]


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    try:
        options = parse()
        peers = peers_of(options)
        running = run(peers, work(peers, options), options.start_timeout)
        rows = rows_of(peers, *asyncio.run(running))
    except LaunchError as error:
        print(f"benchmarks.quantized: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("benchmarks.quantized: interrupted; all servers are stopped", file=sys.stderr)
        sys.exit(130)
    options.dtype = options.packed_dtypes[0]
    about = described(options) | {"peer_backend": options.peer_backend}
    del about["dtype"]
    if not options.no_save:
        append_csv(options.csv, about, rows, leave_out=["decode_ratios"])
    print(table(rows, peers))
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
