"""Hessians of linear layers, from texts, one decoder layer after another.

As GPTQ does: a decoder layer's Hessians are of the inputs that it gets from quantized layers
before it, so that later layers make up for earlier ones. Texts go through each layer twice, before
and after it is quantized, and never through the whole model again.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Replace = Callable[[str, Any], None]  # with a Hessian, or None


class Stopped(Exception):
    """Raised when the first layer's inputs are known."""


@torch.inference_mode()
def layer_by_layer(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    texts: Tensor,
    replace: Replace,
    known: Container[str] = (),
) -> None:
    """Call `replace(name, hessian)` for each linear layer, in order.

    Args:
        model: one whose decoder layers are `model.model.layers`.
        layers: the linear layers by name.
        texts: token ids `[sequences, tokens]`.
        replace: quantizes the layer, given `X X^T / tokens` float32 `[columns, columns]`.
        known: layers that need none, if none of their decoder layer does: they are given None.
    """
    states, arguments = first_inputs(model, texts)
    for decoder in model.model.layers:
        own = {name: layer for name, layer in layers.items() if is_inside(layer, decoder)}
        hessians: Mapping[str, Tensor | None] = dict.fromkeys(own)
        if not all(name in known for name in own):
            with watched(own) as hessians:
                for state in states:
                    decoder(state, **arguments)
        for name, hessian in hessians.items():
            replace(name, hessian)
        states = [decoder(state, **arguments) for state in states]
    for name, layer in layers.items():
        if not is_inside(layer, model.model.layers):  # the head
            with watched({name: layer}) as of_head:
                for state in states:
                    layer(model.model.norm(state))
            replace(name, of_head[name])


def first_inputs(model: PreTrainedModel, texts: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the first decoder layer's inputs for each text, and what all layers get besides."""
    states: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        arguments.update(kwargs)
        raise Stopped

    with ExitStack() as stack:
        handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        stack.callback(handle.remove)
        for text in texts:
            try:
                model(input_ids=text[None], use_cache=False)
            except Stopped:
                continue
    return states, arguments


@contextmanager
def inputs_of(
    layers: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show each layer's inputs `[tokens, columns]` to `see(name, inputs)` meanwhile."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, args: see(name, args[0].flatten(0, -2))

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield


@contextmanager
def watched(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Collect `X X^T / tokens` of layers' inputs; complete when the context is left."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(name: str, inputs: Tensor) -> None:
        product = inputs.float().T @ inputs.float()
        sums[name] = sums[name] + product if name in sums else product
        counts[name] += len(inputs)

    with inputs_of(layers, add):
        yield sums
    for name in sums:
        sums[name] = sums[name] / counts[name]


def is_inside(layer: nn.Module, parent: nn.Module) -> bool:
    """Return whether a module is a part of another."""
    return any(part is layer for part in parent.modules())
