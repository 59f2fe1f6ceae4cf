"""A checkpoint whose layers keep a budget of tokens, layer by layer on batches of sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from attn_kernels import attend, get_variant, variant_from_config
from attn_kernels.pruning import FRACTION_BITS
from attn_kernels.variants.softmax import Softmax
from attnserve.budgets.eviction import RULES, Cache, accumulate, survivors
from attnserve.budgets.texts import Texts
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from hf_attn import VariantLlamaForCausalLM

BATCH = 8
"""Sequences that a layer takes at once: a few matrices of `BATCH * length ** 2` numbers."""


class Forward:
    """A model in float32.

    Args:
        checkpoint: of a prunable variant, or of softmax.
        seed: of random eviction.

    Raises:
        UserError: the checkpoint is another model.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        config = checkpoint.config
        variant = variant_from_config(config) or get_variant("softmax")
        if config.model_type != "variant_llama" or not (
            variant.prunable or variant.name == "softmax"
        ):
            raise UserError(
                f"{checkpoint.folder} is a {config.model_type} with {variant.name} attention: "
                "budgets are measured for a variant_llama with a prunable variant or softmax"
            )
        self.checkpoint = checkpoint
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
        self.model: VariantLlamaForCausalLM = model.eval()
        self.seed = seed
        self.variant = variant
        self.layers = len(model.model.layers)

    @torch.no_grad()
    def embed(self, inputs: Tensor) -> Tensor:
        """Of `inputs [sequences, n]` what the first layer reads, `[sequences, n, hidden_size]`."""
        embedded: Tensor = self.model.model.embed_tokens(inputs)
        return embedded

    @torch.no_grad()
    def layer(self, index: int, hidden: Tensor, budget: int, rule: str) -> Tensor:
        """Of `hidden [sequences, n, hidden_size]` what the next layer reads.

        Args:
            index: of the layer.
            hidden: of all the sequences of a text: random eviction depends on a sequence's number.
            budget: tokens that the layer keeps.
            rule: a key of `RULES`.
        """
        return torch.cat(
            [self._layer(index, part, start, budget, rule) for start, part in self._batches(hidden)]
        )

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> list[float]:
        """Of what the last layer gives, each sequence's mean loss in nats per token."""
        found: list[float] = []
        for start, part in self._batches(hidden):
            logits = self.model.lm_head(self.model.model.norm(part))
            wanted = targets[start : start + BATCH]
            each = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            found += each.view(wanted.shape).double().mean(1).tolist()
        return found

    def __call__(self, text: Texts, budgets: Sequence[int], rule: str) -> list[float]:
        """Each sequence's mean loss in nats per token with these budgets, one a layer."""
        hidden = self.embed(text.inputs)
        for index, budget in enumerate(budgets):
            hidden = self.layer(index, hidden, budget, rule)
        return self.losses(hidden, text.targets)

    @staticmethod
    def _batches(hidden: Tensor) -> list[tuple[int, Tensor]]:
        return [(BATCH * i, part) for i, part in enumerate(hidden.split(BATCH))]

    def _layer(self, index: int, hidden: Tensor, start: int, budget: int, rule: str) -> Tensor:
        layer = self.model.model.layers[index]
        attention = layer.self_attn
        positions = torch.arange(hidden.shape[1])[None]
        x = layer.input_layernorm(hidden)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        q, k, v = (
            projection(x).view(shape).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = attention.rotate(q, k, self.model.model.rotary_emb(x, positions), positions)
        accumulated = (
            accumulate(self.variant, q, k, attention.scaling) if self.variant.prunable else None
        )
        if budget < hidden.shape[1]:
            seeds = [[self.seed, index, start + i] for i in range(len(hidden))]
            mask = RULES[rule](Cache(q, k, attention.scaling, accumulated, seeds, budget))
        else:
            mask = survivors(torch.full((1, hidden.shape[1]), hidden.shape[1]))
        penalty = q.new_zeros(1, 1, 1)
        if accumulated is not None:
            penalty = accumulated.to(q.dtype) / 2**FRACTION_BITS
        if isinstance(self.variant, Softmax):  # several times faster
            bias = (-penalty[:, None]).expand(mask.shape).masked_fill(~mask, -torch.inf)
            output = scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=attention.scaling, enable_gqa=True
            )
        else:
            output, _ = attend(
                self.variant, q, k, v, mask, scale=attention.scaling, penalty=penalty
            )
        hidden = hidden + attention.o_proj(output.transpose(1, 2).flatten(2))
        through: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return through
