"""The reference of whole models: greedy decoding of a Llama checkpoint in float64, token by token.

Written from the formulas and independent of transformers' and vLLM's model code: what those
generate is compared with this.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from attn_kernels import Rows, get_variant, variant_from_config
from attn_kernels.kv_quant import KVFormat
from attn_kernels.reference import attention


class Greedy(NamedTuple):
    """What greedy decoding gives.

    `margins` are the distances between the best and the second-best logit of each step: a token
    may differ from the reference's only where the margin is within the rounding of what is tested.
    `closest_eviction` is the least distance, over all evictions, between the accumulator of the
    token that went and of the runner-up, unless both are 0; infinite where there was none.
    """

    tokens: list[int]
    margins: list[float]
    closest_eviction: float = math.inf


@dataclass
class Stored:
    """A token that a layer with a budget keeps: its accumulator is in units of 2^-16."""

    position: int
    key: Tensor
    value: Tensor
    accumulator: int = 0


class ReferenceModel:
    """A Llama checkpoint in float64 that reads one token at a time.

    Args:
        folder: a Hugging Face folder of a `variant_llama` or a plain Llama (softmax).
        variant: what attention to use instead of the one that the configuration names.
        kv_format: how keys and values are quantized when they are cached.
    """

    def __init__(
        self,
        folder: Path,
        variant: dict[str, Any] | None = None,
        kv_format: KVFormat | None = None,
    ) -> None:
        self.kv_format = kv_format
        self.config = json.loads((folder / "config.json").read_text())
        named = {"attention_variant": variant} if variant else self.config
        self.variant = variant_from_config(named) or get_variant("softmax")
        self.budgets = self.variant.kv_budgets
        self.weights = {
            name: tensor.double()
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        layers = self.config["num_hidden_layers"]
        self.position = 0
        self.keys: list[list[Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(layers)]
        self.states: list[Tensor | None] = [None] * layers
        self.gates: list[list[Tensor]] = [[] for _ in range(layers)]
        self.stored: list[list[Stored]] = [[] for _ in range(layers)]
        self.closest_eviction = math.inf

    def read(self, token: int) -> Tensor:
        """Read the next token and return the logits `[vocab_size]` of the one after it."""
        embeddings = self.weights["model.embed_tokens.weight"]
        x = embeddings[token]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(x, name + "input_layernorm"))
            x = x + self._mlp(self._norm(x, name + "post_attention_layernorm"), name + "mlp.")
        self.position += 1
        head = self.weights.get("lm_head.weight", embeddings)
        return head @ self._norm(x, "model.norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        x = x / (x.square().mean() + self.config["rms_norm_eps"]).sqrt()
        return x * self.weights[name + ".weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = self.weights[name + ".weight"] @ x
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up = self._linear(x, name + "gate_proj"), self._linear(x, name + "up_proj")
        return self._linear(silu(gate) * up, name + "down_proj")

    def _rotate(self, x: Tensor) -> Tensor:
        """RoPE of `[heads, head_size]` at the current position: pairs are half a head apart."""
        half = x.shape[-1] // 2
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = self.position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1
        )

    def _cached(self, x: Tensor) -> Tensor:
        return x if self.kv_format is None else self.kv_format.rounded(x).double()

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.self_attn."
        heads = self.config["num_attention_heads"]
        head_size = self.config.get("head_dim") or self.config["hidden_size"] // heads
        q, k, v = (
            self._linear(x, name + projection).view(-1, head_size)
            for projection in ("q_proj", "k_proj", "v_proj")
        )
        if self.budgets:
            output = self._pruned(layer, self._rotate(q), self._rotate(k), v)
            return self._linear(output.flatten(), name + "o_proj")
        if self.variant.gated:
            self.gates[layer].append(self._linear(x, name + "f_proj").sigmoid().log())
        self.keys[layer].append(self._cached(self._rotate(k)))
        self.values[layer].append(self._cached(v))
        output, self.states[layer] = attention(
            self.variant,
            self._rotate(q)[:, None],
            torch.stack(self.keys[layer], 1),
            torch.stack(self.values[layer], 1),
            window=self.config.get("sliding_window"),
            learned={tensor: self.weights[name + tensor] for tensor in self.variant.learned},
            state=self.states[layer],
            gates=torch.stack(self.gates[layer], 1) if self.variant.gated else None,
        )
        return self._linear(output.flatten(), name + "o_proj")

    def _pruned(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute selective attention within a budget, as `attn_kernels.pruning` has the rule."""
        stored = self.stored[layer]
        if len(stored) == self.budgets[layer]:
            ranked = sorted(
                (token for token in stored if token.position),
                key=lambda token: (-token.accumulator, token.position),
            )
            stored.remove(ranked[0])
            # Two that nothing was added to tie however scores are rounded: the older one goes.
            if len(ranked) > 1 and ranked[0].accumulator > 0:
                gap = (ranked[0].accumulator - ranked[1].accumulator) / 2**16
                self.closest_eviction = min(self.closest_eviction, gap)
        stored.append(Stored(self.position, k, v))
        keys = torch.stack([token.key for token in stored], 1)
        values = torch.stack([token.value for token in stored], 1)
        group = len(q) // len(k)
        scores = (keys.repeat_interleave(group, 0) @ q[:, :, None])[..., 0] * q.shape[-1] ** -0.5
        penalties = torch.tensor([token.accumulator for token in stored]).double() / 2**16
        rows = (scores - penalties)[:, None]
        seen = torch.ones_like(rows, dtype=torch.bool)
        weights = self.variant.weights(rows, Rows.of(seen, {}, rows.dtype))
        added = self.variant.selection(scores[0])
        for token, score in zip(stored[:-1], added.tolist(), strict=False):
            if token.position:
                token.accumulator += round(score * 2**16)
        return (weights @ values.repeat_interleave(group, 0))[:, 0]


def reference_greedy(
    folder: Path, prompt: list[int], num_tokens: int, variant: dict[str, Any] | None = None
) -> Greedy:
    """Return the `num_tokens` most likely tokens after the token ids of `prompt`, one by one.

    The end-of-text token is a token like any other (`ignore_eos`). `folder` and `variant` are
    those of `ReferenceModel`.
    """
    return decode_greedily(ReferenceModel(folder, variant), prompt, num_tokens)


@torch.no_grad()
def decode_greedily(model: ReferenceModel, prompt: list[int], num_tokens: int) -> Greedy:
    """Return the `num_tokens` most likely tokens after the token ids of `prompt`, one by one."""
    for token in prompt[:-1]:
        model.read(token)
    token, tokens, margins = prompt[-1], [], []
    for _ in range(num_tokens):
        best = model.read(token).topk(2)
        token = int(best.indices[0])
        tokens.append(token)
        margins.append(float(best.values[0] - best.values[1]))
    return Greedy(tokens, margins, model.closest_eviction)


def clear_greedy(folder: Path, num_prompt_tokens: int, num_tokens: int) -> tuple[list[int], Greedy]:
    """Return a random prompt of byte tokens, and the reference's greedy tokens after it.

    A prompt with a near tie among its answers, or among the tokens to evict, is passed over:
    float32 moves the logits of `tests.tiny.tiny_checkpoint` by less than 1e-4 and may decide a tie
    either way.
    """
    for seed in range(100):
        generator = torch.Generator().manual_seed(1000 * num_prompt_tokens + seed)
        prompt = torch.randint(2, 256, (num_prompt_tokens,), generator=generator).tolist()
        expected = reference_greedy(folder, prompt, num_tokens)
        if min(*expected.margins, expected.closest_eviction) > 1e-3:
            return prompt, expected
    raise AssertionError(f"100 prompts of {num_prompt_tokens} tokens have near ties")
