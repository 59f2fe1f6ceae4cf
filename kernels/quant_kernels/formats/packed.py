"""compressed-tensors' format `pack-quantized`, which `quant.quantize` writes and vLLM serves.

`weight_packed` int32 `[rows, words]`, `weight_scale` `[rows, groups]`, `weight_shape`, and where
they are needed `weight_zero_point` and `weight_g_idx`. Zero points that are quantized values are
packed along the rows. Beyond what that library writes there are zero points in floating point
(`zp_dtype`), a short last group, and embeddings.

Two-level scales (`quant_kernels.levels`) are the format `two-level`: `weight_scale` `[rows, 1]` and
`weight_levels`. A checkpoint with them names the method `attnserve`, so that no other program takes
it for what it knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_kernels.formats.reader import Reader, check_shapes, reading
from quant_kernels.pack import pack, unpack, words
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec, TwoLevelWeight

FORMAT, TWO_LEVEL = "pack-quantized", "two-level"
METHOD = "attnserve"
"""`quant_method` of a checkpoint with two-level scales."""
PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_levels",
    "weight_g_idx",
    "weight_shape",
)
HEAD = "lm_head"


def stored_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a layer's tensors by name."""
    bits, zeros = weight.spec.bits, weight.zeros
    tensors = {
        "weight_packed": pack(weight.values, bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if zeros is not None:
        is_packed = zeros.dtype == torch.uint8
        packed = pack(zeros.T.contiguous(), bits).T.contiguous() if is_packed else zeros
        tensors["weight_zero_point"] = packed
    if isinstance(weight, TwoLevelWeight):
        tensors["weight_levels"] = weight.levels
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def packed_tensors(
    tensors: Iterable[tuple[str, Tensor]], reader: Reader
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint of another format as this one has them: layers packed, or
    dequantized to `weight` if their values are no integers.

    Raises:
        ValueError: as `Reader.weights`.
    """
    for name, found in reader.weights(tensors):
        if isinstance(found, Tensor):
            yield name, found
        elif reader.spec is None:
            yield f"{name}.weight", found.dequantize()
        else:
            for part, tensor in stored_tensors(found).items():
                yield f"{name}.{part}", tensor


def read_stored(
    parts: Mapping[str, Tensor], entry: Mapping[str, Any], layer: str = "a layer"
) -> QuantizedWeight:
    """Return the weight that `stored_tensors`, or compressed-tensors, has stored.

    Args:
        parts: the tensors by name.
        entry: what config.json says of them.
        layer: whose they are, for messages.

    Raises:
        ValueError: with one line: one is missing, or they do not belong together.
    """
    with reading(layer, parts):
        return _read_stored(parts, entry)


def _read_stored(parts: Mapping[str, Tensor], entry: Mapping[str, Any]) -> QuantizedWeight:
    spec = spec_of(entry)
    rows, columns = parts["weight_shape"].tolist()
    values = unpack_any(parts["weight_packed"], spec.bits, columns)
    scales, zeros = parts["weight_scale"], None
    if len(values) != rows:
        raise ValueError(f"weight_shape says {rows} rows")
    if "weight_levels" in parts:
        levels = parts["weight_levels"]
        check_shapes(values, levels, None, spec)
        check_shapes(values, scales, None, QuantSpec(spec.bits, None))
        return TwoLevelWeight(values, scales, None, spec, levels=levels)
    if not spec.symmetric:
        zeros = parts["weight_zero_point"]
        if zeros.dtype == torch.int32:
            zeros = unpack_any(zeros.T.contiguous(), spec.bits, rows).T.contiguous()
    g_idx = parts["weight_g_idx"] if is_act_order(entry) else None
    check_shapes(values, scales, zeros, spec, g_idx)
    return QuantizedWeight(values, scales, zeros, spec, g_idx)


def unpack_any(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the values of dense words, or of words that begin with a value each and end with
    unused bits, as compressed-tensors before 0.19 packs 3, 5, 6 and 7 bits."""
    each = 32 // bits
    stored = packed.shape[1] if packed.dim() == 2 else 0
    if stored == words(columns, bits):
        return unpack(packed, bits, columns)
    if stored != -(-columns // each):
        raise ValueError(
            f"words {list(packed.shape)} do not hold rows of {columns} values of {bits} bits"
        )
    shifts = torch.arange(0, each * bits, bits)
    values = packed.long()[:, :, None] >> shifts & 2**bits - 1
    return values.to(torch.uint8).flatten(1)[:, :columns].contiguous()


def weights_entry(
    spec: QuantSpec, zero_dtype: torch.dtype | None = None, act_order: bool = False
) -> dict[str, Any]:
    """Return what config.json says of weights.

    Args:
        spec: bits, groups and symmetry.
        zero_dtype: of their zero points; None or uint8 if these are quantized values, or none.
        act_order: whether there is a `weight_g_idx`.
    """
    entry: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    if zero_dtype not in (None, torch.uint8):
        entry["zp_dtype"] = str(zero_dtype)
    if act_order:
        entry["actorder"] = "group"
    return entry


def entry_of(weight: QuantizedWeight) -> dict[str, Any]:
    """Return what config.json says of a weight."""
    zeros = weight.zeros
    return weights_entry(
        weight.spec, None if zeros is None else zeros.dtype, weight.g_idx is not None
    )


def format_of(weight: QuantizedWeight) -> str:
    """Return the format that a weight is stored in."""
    return TWO_LEVEL if isinstance(weight, TwoLevelWeight) else FORMAT


def config_of(
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any], str]], ignore: Sequence[str]
) -> dict[str, Any]:
    """Return the entry `quantization_config`.

    Args:
        groups: targets, what `weights_entry` says of them, and their format.
        ignore: modules that are not quantized.
    """
    formats = [format for _, _, format in groups]
    return {
        "quant_method": METHOD if TWO_LEVEL in formats else "compressed-tensors",
        "format": formats[0] if formats else FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{place}": {
                "targets": list(targets),
                "weights": dict(entry),
                "input_activations": None,
                "output_activations": None,
                "format": format,
            }
            for place, (targets, entry, format) in enumerate(groups)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def spec_of(entry: Mapping[str, Any]) -> QuantSpec:
    """Return bits, groups and symmetry that config.json says of weights."""
    group_size = entry.get("group_size")
    channel = entry.get("strategy") == "channel" or group_size in (None, -1)
    return QuantSpec(entry["num_bits"], None if channel else group_size, entry["symmetric"])


def check_entry(config: Mapping[str, Any]) -> None:
    """Refuse an entry `quantization_config` that is not as compressed-tensors writes it, as far as
    it is read here.

    Raises:
        ValueError: with one line.
    """
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else [("", groups)]:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or not isinstance(targets, list):
            wrong = "no group with targets and weights"
        elif not all(isinstance(target, str) for target in targets):
            wrong = "no targets that are names"
        elif is_packed({**config, "config_groups": {name: group}}) and not is_spec(weights):
            wrong = f"no weights of 2 to 8 bits in groups, or whole rows: {dict(weights)}"
        else:
            continue
        raise ValueError(
            f"config_groups.{name} in quantization_config of config.json is {wrong}: copy "
            "config.json again"
        )


def is_spec(entry: Mapping[str, Any]) -> bool:
    """Return whether `spec_of` can read what config.json says of weights."""
    bits, size = entry.get("num_bits"), entry.get("group_size")
    numbers = type(bits) is int and (size is None or type(size) is int)
    return numbers and bits in BITS and (size in (None, -1) or size > 0) and "symmetric" in entry


def is_act_order(entry: Mapping[str, Any]) -> bool:
    """Return whether a layer has a `weight_g_idx`."""
    return entry.get("actorder") in ("group", "dynamic", True)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Return whether all that an entry `quantization_config` says is of this format: integers, with
    activations as they are."""
    groups = list((config.get("config_groups") or {}).values())
    return bool(groups) and all(
        isinstance(group, Mapping)
        and (group.get("format") or config.get("format")) in (FORMAT, TWO_LEVEL)
        and (group.get("weights") or {}).get("type", "int") == "int"
        and not group.get("input_activations")
        for group in groups
    )


def entry_for(config: Mapping[str, Any], layer: str, kind: str) -> Mapping[str, Any]:
    """Return what config.json says of a layer's weights.

    Args:
        config: its entry `quantization_config`.
        layer: the layer's name.
        kind: its class, for example Linear.

    Raises:
        ValueError: it says nothing.
    """
    groups = config["config_groups"].values()
    for test in (layer, kind):
        for group in groups:
            if any(matches(target, test) for target in group["targets"]):
                entry: Mapping[str, Any] = group["weights"]
                return entry
    raise ValueError(f"config.json says nothing of the packed layer {layer}")


def matches(target: str, name: str) -> bool:
    """Return whether a target of config.json means a name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name
