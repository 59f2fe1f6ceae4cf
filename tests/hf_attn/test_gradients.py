"""Gradients of every variant against finite differences, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attn_kernels import attend, causal_mask, get_variant, selectable_mask, variant_names
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM

HEADS, KV_HEADS, TOKENS, SIZE = 4, 2, 7, 4


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", variant_names())
def test_attend(name: str, window: int | None) -> None:
    """With respect to queries, keys, values, learned tensors and what gates are computed from, also
    through the selection."""
    variant = get_variant(name)
    positions = torch.arange(TOKENS)
    mask = causal_mask(positions, positions, window)
    selectable = selectable_mask(positions, positions, window)
    torch.manual_seed(0)
    shapes = [(2, HEADS, TOKENS, SIZE), *[(2, KV_HEADS, TOKENS, SIZE)] * 2]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for tensor in variant.learned:
        spread = torch.linspace(0.5, 1.5, HEADS, dtype=torch.float64)
        inputs.append((spread * variant.initial(tensor)).requires_grad_())
    if variant.gated:
        inputs.append(torch.randn(2, HEADS, TOKENS, dtype=torch.float64, requires_grad=True))

    def output(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
        learned = others[: len(variant.learned)]
        gates = variant.gate(others[-1]) if variant.gated else None
        penalty = None
        if variant.stateful:
            penalty, _ = variant.select(q, k, selectable, SIZE**-0.5, q.new_zeros(2, TOKENS))
        tensors = dict(zip(variant.learned, learned, strict=True))
        return attend(variant, q, k, v, mask, learned=tensors, penalty=penalty, gates=gates)[0]

    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("name", variant_names())
def test_loss_of_a_model(name: str) -> None:
    """With respect to every parameter of a two-layer model, on a batch with left padding.

    The derivative along a random direction in all parameters at once, and along each attention
    parameter on its own.
    """
    torch.manual_seed(0)
    config = VariantLlamaConfig(
        attention_variant={"name": name},
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.5,
    )
    model = VariantLlamaForCausalLM(config).double()
    # Llama's own norm computes in float32 whatever its input.
    model.model.norm = torch.nn.RMSNorm(16, config.rms_norm_eps).double()
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(16, config.rms_norm_eps).double()
        layer.post_attention_layernorm = torch.nn.RMSNorm(16, config.rms_norm_eps).double()
    ids = torch.randint(17, (2, 9))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :3] = 0

    def loss() -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        return cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())

    loss().backward()
    parameters = dict(model.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    groups = [list(parameters.values())]
    groups += [[p] for key, p in parameters.items() if ".self_attn." in key]
    for group in groups:
        direction = [torch.randn_like(p) for p in group]
        exact = sum(float((p.grad * d).sum()) for p, d in zip(group, direction, strict=True))
        # Softpick's eps is in units of the row's maximum, which is held constant: hence 1e-4.
        assert finite_difference(loss, group, direction) == pytest.approx(exact, rel=1e-4, abs=1e-8)


@torch.no_grad()
def finite_difference(
    function: Callable[[], Tensor], parameters: list[Tensor], direction: list[Tensor]
) -> float:
    """Return the central difference of `function` along `direction`, to fourth order."""

    def at(distance: float) -> float:
        for p, d in zip(parameters, direction, strict=True):
            p += distance * d
        value = float(function())
        for p, d in zip(parameters, direction, strict=True):
            p -= distance * d
        return value

    step = 1e-5
    near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("name", variant_names())
def test_a_huge_masked_score_leaves_no_nan(name: str) -> None:
    """The last key is far above what any earlier query sees; gradients stay finite."""
    variant = get_variant(name)
    positions = torch.arange(TOKENS)
    torch.manual_seed(0)
    q = torch.randn(HEADS, TOKENS, SIZE, requires_grad=True)
    k = torch.randn(KV_HEADS, TOKENS, SIZE)
    k[:, -1] *= 1e4
    k.requires_grad_()
    learned = {tensor: torch.ones(HEADS) for tensor in variant.learned}
    gates = variant.gate(torch.zeros(HEADS, TOKENS)) if variant.gated else None
    mask = causal_mask(positions, positions)
    v = torch.randn(KV_HEADS, TOKENS, SIZE)
    output, _ = attend(variant, q, k, v, mask, learned=learned, gates=gates)
    output.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    assert k.grad is not None and k.grad.isfinite().all()
