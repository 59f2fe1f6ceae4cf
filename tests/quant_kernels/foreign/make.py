"""Write this folder's files: layers that the original libraries quantized, beside the weights that
they themselves dequantize them to.

It needs gptqmodel 7.6.0, bitsandbytes 0.50.2 and compressed-tensors 0.17.0; the tests do not:

    python tests/quant_kernels/foreign/make.py
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
ROWS, COLUMNS = 32, 192
Made = tuple[dict[str, Any], dict[str, Tensor], Tensor]


def matrix() -> Tensor:
    """Values of very different sizes; some groups have one sign, so that zero points reach 0 and
    the largest value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight = weight * torch.logspace(-2, 0.5, ROWS)[:, None]
    weight[3], weight[5] = weight[3].abs(), -weight[5].abs()
    return weight


def grid(weight: Tensor, bits: int, group_size: int, g_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and zero points `[rows, groups]` that reach over each group's values."""
    scales, zeros = [], []
    for group in range(COLUMNS // group_size):
        part = weight[:, g_idx == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        scales.append(scale)
        zeros.append((-low / scale).round().clamp(0, 2**bits - 1))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq(bits: int, group_size: int, desc_act: bool, layout: str) -> Made:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    weight = matrix()
    g_idx = torch.arange(COLUMNS) // group_size
    if desc_act:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight
    layer = TorchLinear(
        bits=bits,
        group_size=group_size,
        sym=False,
        desc_act=desc_act,
        in_features=COLUMNS,
        out_features=ROWS,
        bias=False,
        register_buffers=True,
    )
    scales, zeros = grid(weight, bits, group_size, g_idx)
    layer.pack_original(linear, scales, zeros, g_idx.int())
    layer.post_init()
    dequantized = layer.dequantize_weight().T.contiguous()
    config = QuantizeConfig(
        bits=bits, group_size=group_size, desc_act=desc_act, sym=False, format=FORMAT(layout)
    )
    if layout == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, config)
    names = ("qweight", "qzeros", "scales", "g_idx")
    entry = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": layout,
    }
    return entry, {name: getattr(layer, name) for name in names}, dequantized


def awq() -> Made:
    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    weight, size = matrix(), 64
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    scales, zeros = grid(weight, 4, size, torch.arange(COLUMNS) // size)
    shape = {"in_features": COLUMNS, "out_features": ROWS, "bias": False}
    settings = {"bits": 4, "group_size": size, "sym": False, "desc_act": False}
    layer = AwqTorchLinear(**settings, **shape, register_buffers=True)
    steps = (weight.unflatten(1, (-1, size)) / scales[..., None] + zeros[..., None]).round()
    linear.weight.data = ((steps.clamp(0, 15) - zeros[..., None]) * scales[..., None]).flatten(1)
    AwqGEMMLinear.pack(layer, linear, scales, zeros)  # as AutoAWQ does it
    layer.post_init()
    found = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    # The layer's own product with the unit matrix is its weight.
    dequantized = layer(torch.eye(COLUMNS, dtype=torch.float16)).T.contiguous()
    entry = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
    return entry | {"version": "gemm"}, found, dequantized


def bnb(kind: str, nested: bool = False) -> Made:
    import bitsandbytes

    weight = matrix().half()
    if kind == "int8":
        values, scb, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
        dequantized = bitsandbytes.functional.int8_vectorwise_dequant(values, scb)
        entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        return entry, {"weight": values, "SCB": scb}, dequantized
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.float(), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    dequantized = bitsandbytes.functional.dequantize_4bit(packed, state)
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    entry = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    return entry, {"weight": packed, **tensors}, dequantized


def compressed(bits: int, symmetric: bool, act_order: bool) -> Made:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight, size = matrix(), 64
    g_idx = torch.arange(COLUMNS) // size
    if act_order:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    scales, zeros = grid(weight, bits, size, g_idx)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group",
        group_size=size,
        actorder="group" if act_order else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    half = 2 ** (bits - 1)
    if symmetric:
        scales = torch.stack([weight[:, g_idx == group].abs().amax(1) for group in range(3)], 1)
        scales, zeros = scales / (half - 0.5), torch.full_like(scales, half)
    state = {"weight": weight, "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = (zeros - half).to(torch.int8)
    if act_order:
        state["weight_g_idx"] = g_idx.int()
    tensors = PackedQuantizationCompressor.compress(state, scheme)
    dequantized = PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    entry = args.model_dump(mode="json", exclude_none=True)
    return {"quant_method": "compressed-tensors", "weights": entry}, tensors, dequantized


def main() -> None:
    made = {
        "gptq-4bit-v1": gptq(4, 64, False, "gptq"),
        "gptq-4bit-desc_act": gptq(4, 64, True, "gptq_v2"),
        "gptq-3bit": gptq(3, 64, True, "gptq"),
        "gptq-2bit-v2": gptq(2, 32, False, "gptq_v2"),
        "gptq-8bit": gptq(8, 64, False, "gptq"),
        "awq": awq(),
        "bitsandbytes-nf4": bnb("nf4"),
        "bitsandbytes-nf4-double": bnb("nf4", nested=True),
        "bitsandbytes-fp4": bnb("fp4"),
        "bitsandbytes-int8": bnb("int8"),
        "compressed-tensors-4bit": compressed(4, False, False),
        "compressed-tensors-4bit-actorder": compressed(4, False, True),
        "compressed-tensors-3bit-gaps": compressed(3, True, False),
    }
    for name, (config, tensors, dequantized) in made.items():
        stored = {f"layer.{part}": tensor.contiguous() for part, tensor in tensors.items()}
        stored["dequantized"] = dequantized.detach().clone()
        save_file(stored, HERE / f"{name}.safetensors", metadata={"config": json.dumps(config)})


if __name__ == "__main__":
    main()
