"""Models with quantized linear layers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import hf_attn  # noqa: F401  registers the model classes
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import first_line, read_config
from quant.schemes.hessian import inputs_of, layer_by_layer
from quant.schemes.registry import Scheme
from quant_kernels.weight import QuantizedWeight, QuantSpec

HEAD = "lm_head"
Observer = Callable[[str, Tensor], None]

logging.disable_progress_bar()  # a sweep loads a model for each config


def linears(model: nn.Module, lm_head: bool = False) -> dict[str, nn.Linear]:
    """Return the linear layers by name that are quantized, the head only if asked for; embeddings
    are none. Projections to gates, `[num_heads, hidden_size]`, stay: what they save is little, and
    the error of a gate counts in every later token."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (lm_head or name != HEAD)
        and not name.endswith(".f_proj")
    }


def has_decoder_layers(model: nn.Module) -> bool:
    """Return whether a calibrated scheme finds the decoder layers, one after another."""
    return isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList)


def columns(model: nn.Module, lm_head: bool = False) -> set[int]:
    """Return the columns that the matrices of `linears` have."""
    return {layer.in_features for layer in linears(model, lm_head).values()}


def empty_model(folder: Path) -> PreTrainedModel:
    """Return a checkpoint's model without its weights, for shapes.

    Raises:
        UserError: with one line: its configuration describes none.
    """
    config = read_config(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers lets anything through that a wrong file causes
        why = first_line(error)
        raise UserError(f"config.json of {folder} describes no model: {why}") from None
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if isinstance(theta, int | float) and theta <= 0:  # transformers would compute NaN
        raise UserError(f"config.json of {folder} has rope_theta {theta}, which is not above 0")
    return model


def quantize(
    model: PreTrainedModel,
    scheme: Scheme,
    spec: QuantSpec,
    texts: Tensor,
    lm_head: bool = False,
    options: Mapping[str, bool] = MappingProxyType({}),
    on_layer: Callable[[], object] = lambda: None,
    quantized: dict[str, QuantizedWeight] | None = None,
    specs: Mapping[str, QuantSpec] = MappingProxyType({}),
) -> dict[str, QuantizedWeight]:
    """Quantize a model's linear layers in place; it computes with the dequantized weights.

    Args:
        model: in float32.
        scheme, spec: of all layers.
        specs: of layers by name that have another one.
        texts: token ids `[sequences, tokens]` that a calibrated scheme calibrates on.
        lm_head: the head too; one that is tied to the embeddings gets a matrix of its own.
        options: of the scheme, see `gptq`.
        on_layer: called after each layer, for progress.
        quantized: gets the weights; layers that it has already are not quantized again.
    """
    chosen = linears(model, lm_head)
    quantized = {} if quantized is None else quantized

    def replace(name: str, hessian: Tensor | None) -> None:
        if hessian is not None and not hessian.isfinite().all():
            raise UserError(
                f"the inputs of {name} are too large for float32: use a scheme without calibration"
            )
        if name not in quantized:
            quantized[name] = scheme(
                chosen[name].weight.data, specs.get(name, spec), hessian, **options
            )
        put(chosen[name], quantized[name])
        on_layer()

    if scheme.calibrated:
        layer_by_layer(model, chosen, texts, replace, quantized)
    else:
        for name in chosen:
            replace(name, None)
    return quantized


def put(layer: nn.Linear, quantized: QuantizedWeight) -> None:
    """Make a layer compute with a quantized weight; a tied weight is untied."""
    layer.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)


def stored_bytes(
    model: PreTrainedModel, quantized: Mapping[str, QuantizedWeight], item: int
) -> int:
    """Return the bytes of all parameters of a model with quantized weights in place: these
    packed, the others `item` bytes a number."""
    packed = {f"{name}.weight" for name in quantized}
    plain = sum(p.numel() for name, p in model.named_parameters() if name not in packed)
    return plain * item + sum(weight.packed_bytes for weight in quantized.values())


def observe(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], texts: Tensor, see: Observer
) -> None:
    """Run a model over texts `[sequences, tokens]`, one at a time, and show each layer's inputs
    `[tokens, columns]` to `see(name, inputs)`."""
    with torch.inference_mode(), inputs_of(layers, see):
        for text in texts:
            model(input_ids=text[None], use_cache=False)


def largest_inputs(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], texts: Tensor
) -> dict[str, float]:
    """Return the largest absolute input of each layer, over texts."""
    found = dict.fromkeys(layers, 0.0)

    def see(name: str, inputs: Tensor) -> None:
        found[name] = max(found[name], float(inputs.abs().max()))

    observe(model, layers, texts, see)
    return found
