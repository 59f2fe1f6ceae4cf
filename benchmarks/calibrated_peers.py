"""GPTQModel and AutoRound, as they are, on this project's calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from quant_kernels.weight import QuantSpec

MULTIPLE = 32
"""AutoRound leaves out matrices whose rows or columns are no multiple of this."""


def gptqmodel(weight: Tensor, spec: QuantSpec, hessian: Tensor, **options: Any) -> Tensor:
    """Quantize float32 `[rows, columns]` with GPTQModel's GPTQ; return what it dequantizes to.

    Args:
        weight: the matrix.
        spec: bits, group size and symmetry.
        hessian: float32 `[columns, columns]`, `X X^T / tokens` of the layer's inputs.
        options: of `gptqmodel.QuantizeConfig`.
    """
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = weight.clone()
    config = QuantizeConfig(
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.symmetric,
        offload_to_disk=False,
        **options,
    )
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    task.H, task.nsamples = 2 * hessian, len(hessian)  # as its `add_batch` collects it
    dequantized: Tensor = task.quantize()[0]
    return dequantized


def auto_round(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    spec: QuantSpec,
    rows: Tensor,
    iterations: int,
) -> None:
    """Quantize a model's linear layers in place with AutoRound.

    Args:
        model: in float32.
        tokenizer: its own, which the library asks for.
        spec: bits, group size and symmetry.
        rows: token ids `[sequences, tokens]` to calibrate on.
        iterations: of its signed gradient descent, for each decoder layer; its default is 200.
    """
    from auto_round import AutoRound

    width = model.config.intermediate_size
    widen(model, width + -width % MULTIPLE)
    library = AutoRound(
        model,
        tokenizer,
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.symmetric,
        iters=iterations,
        dataset=list(rows[:, None]),
        seqlen=rows.shape[1],
        nsamples=len(rows),
        device_map="cpu",
        enable_torch_compile=False,
    )
    library.quantize()
    widen(model, width)


def widen(model: PreTrainedModel, width: int) -> None:
    """Give the feed-forward layers a width by zeros at the end, or by cutting there; zeros change
    nothing of what the model computes."""
    for decoder in model.model.layers:
        mlp = decoder.mlp
        for layer in (mlp.gate_proj, mlp.up_proj):
            more = width - layer.out_features
            layer.weight = nn.Parameter(pad(layer.weight.data, (0, 0, 0, more)))
            layer.out_features = width
        more = width - mlp.down_proj.in_features
        mlp.down_proj.weight = nn.Parameter(pad(mlp.down_proj.weight.data, (0, more)))
        mlp.down_proj.in_features = width
