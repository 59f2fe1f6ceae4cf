"""What a checkpoint's config.json and tensors say of the server that serves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attnserve.errors import UserError
from attnserve.files import CHECKOUT
from benchmarks import options as opt

if TYPE_CHECKING:
    import torch

    from attn_kernels import Variant

BUNDLED = tuple(CHECKOUT / "checkpoints" / name for name in ("softmax", "softpick", "selective"))

STORED = {"I8": 1, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, by safetensors' names."""


def config_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a checkpoint: {error}") from None
    for name in ("num_hidden_layers", "max_position_embeddings", "vocab_size"):
        if not isinstance(config, dict) or name not in config:
            raise UserError(f"{folder} is not a checkpoint: config.json has no {name}")
    return config


def variant_of(folder: Path) -> Variant | None:
    """Return the attention that a checkpoint's config.json names; None if it names none."""
    from attn_kernels import VariantError, variant_from_config

    try:
        return variant_from_config(config_of(folder))
    except VariantError as error:
        raise UserError(f"{folder}: {error}") from None


def check_room(folder: Path, tokens: int) -> None:
    """Refuse now what would fail after minutes."""
    limit = config_of(folder)["max_position_embeddings"]
    if tokens > limit:
        raise UserError(f"prompt and answer take {tokens} tokens, {folder.resolve().name} {limit}")


def heads_of(config: dict[str, Any]) -> tuple[int, int]:
    """Return the KV heads and the head size of a layer."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    return config.get("num_key_value_heads") or heads, head_size


def token_bytes(config: dict[str, Any], dtype: torch.dtype, variant: Variant) -> int:
    """Return the bytes of KV cache of a token that is kept in every layer."""
    from attn_kernels.paged import content_bytes

    kv_heads, head_size = heads_of(config)
    group = config["num_attention_heads"] // kv_heads
    head = content_bytes(variant, head_size, dtype, group=group)
    return int(config["num_hidden_layers"] * kv_heads * head)


def pruned_bytes(
    config: dict[str, Any], dtype: torch.dtype, budgets: Sequence[int], length: int
) -> int:
    """Return the bytes of a request's KV pages of fixed size, for at most `length` tokens."""
    from attn_kernels.pruning import slot_bytes

    return sum(min(budget, length) for budget in budgets) * slot_bytes(*heads_of(config), dtype)


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes of all weights of a checkpoint in memory.

    Packed values and scales count as they are stored, a zero point as one byte (two if it is not an
    integer), and other tensors in `dtype`.
    """
    import math

    import torch
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it has no iterator
                tensor = opened.get_slice(name)
                size, item = math.prod(tensor.get_shape()), getattr(torch, dtype).itemsize
                kind, stored = name.rpartition(".")[2], tensor.get_dtype()
                if kind == "weight_shape":
                    continue
                if kind == "weight_zero_point" and stored == "I32":
                    scales = opened.get_slice(name.replace("zero_point", "scale"))
                    size, item = math.prod(scales.get_shape()), 1
                elif kind.startswith("weight_") or stored == "I8":
                    item = STORED[stored]
                total += size * item
    return total


def packed_name(folder: Path) -> str:
    """Return for example `w4-g64-e8`: bits and group size of the linear layers, bits of the
    embeddings.
    """
    try:
        groups = config_of(folder)["quantization_config"]["config_groups"]
    except KeyError as error:
        raise UserError(f"--packed {folder} is not from quant.quantize: {error} missing") from None
    linear = groups["group_0"]["weights"]
    if groups["group_0"]["input_activations"] is not None:
        return f"w{linear['num_bits']}a8"
    name = f"w{linear['num_bits']}-g{linear['group_size'] or 'channel'}"
    return name + (f"-e{groups['group_1']['weights']['num_bits']}" if "group_1" in groups else "")


@dataclass(frozen=True)
class ServerCase:
    """One server to measure: the name of its rows, the checkpoint's folder, its attention, its
    weights (`float32`, or `packed_name`), the type of activations, caches and weights that are not
    packed, the tokens that each layer keeps (none: all), and vLLM's --attention-backend (none: as
    config.json says)."""

    name: str
    ckpt: Path
    variant: str
    weights: str
    dtype: str = "float32"
    kv_budgets: tuple[int, ...] = ()
    backend: str = ""

    def arguments(self) -> list[str]:
        """Return those of `vllm serve`."""
        from attn_kernels import get_variant

        arguments = [f"--dtype={self.dtype}"]
        arguments += [f"--attention-backend={self.backend}"] * bool(self.backend)
        if get_variant(self.variant).prunable:  # with these budgets, whatever config.json says
            variant: dict[str, Any] = {"name": self.variant}
            variant |= {"kv_budgets": self.kv_budgets} if self.kv_budgets else {}
            arguments += [f"--hf-overrides={json.dumps({'attention_variant': variant})}"]
        return arguments

    def columns(self) -> dict[str, str]:
        """Return those of its rows."""
        return {
            "case": self.name,
            "model": self.ckpt.resolve().name,
            "variant": self.variant,
            "weights": self.weights,
            "dtype": self.dtype,
            "kv_budgets": " ".join(map(str, self.kv_budgets)),
            "backend": self.backend or self.variant,
        }


@dataclass(frozen=True)
class CaseOptions:
    """What is served: a case for each checkpoint, type and backend, and of a prunable variant
    another within its budgets."""

    ckpts: Annotated[
        list[Path] | None,
        opt.folder("Folders of checkpoints as they were trained (default: softmax, softpick and "
                   "selective of checkpoints/)."),
    ] = None  # fmt: skip
    packed: Annotated[list[Path] | None, opt.folder("Folders that quant.quantize has written.")] = (
        None
    )
    kv_budgets: Annotated[
        list[int] | None,
        opt.option("Tokens that each layer of a selective checkpoint keeps (default: 8 8 12 16; 0: "
                   "those of config.json).", min=0),
    ] = None  # fmt: skip
    dtypes: Annotated[
        list[opt.Dtype] | None,
        opt.option("Types of activations, caches and unpacked weights (default: float32); "
                   "packed checkpoints are served in the first."),
    ] = None  # fmt: skip
    backends: Annotated[
        list[str] | None,
        opt.option("Attention backends (default: as config.json says, or vLLM's own)."),
    ] = None

    def cases(self) -> list[ServerCase]:
        """Return all of them, those of packed checkpoints last."""
        dtypes = [str(dtype) for dtype in self.dtypes or [opt.Dtype.FLOAT32]]
        packed, kv_budgets = self.packed or [], self.kv_budgets or [8, 8, 12, 16]
        if 0 in kv_budgets and len(kv_budgets) > 1:
            raise UserError("--kv-budgets 0 stands alone: the budgets of config.json")
        folders = [(folder, dtype) for dtype in dtypes for folder in self.ckpts or BUNDLED]
        folders += [(folder, dtypes[0]) for folder in packed]
        cases: list[ServerCase] = []
        for (folder, dtype), backend in product(folders, self.backends or [""]):
            variant, config = variant_of(folder), config_of(folder)
            weights = packed_name(folder) if folder in packed else dtype
            parts = [folder.resolve().name, backend, dtype if dtype != dtypes[0] else ""]
            case = ServerCase(" ".join(filter(None, parts)), folder,
                              variant.name if variant else "softmax", weights, dtype,
                              backend=backend or ("" if variant else "cpu_attn"))  # fmt: skip
            cases.append(case)
            if variant is not None and variant.prunable:
                layers = config["num_hidden_layers"]
                budgets = tuple(variant.kv_budgets if kv_budgets == [0] else kv_budgets)
                if budgets and len(budgets) != layers:
                    raise UserError(f"{len(budgets)} budgets; {folder} has {layers} layers")
                if budgets:
                    cases.append(replace(case, name=f"{case.name} pruned", kv_budgets=budgets))
        names = [case.name for case in cases]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two checkpoints' folders are called {twice.pop()}: rename one")
        return cases
