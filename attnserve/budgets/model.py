"""A model whose layers keep a budget of tokens, and its losses, each of which is measured once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

from attn_kernels import attend, get_variant, variant_from_config
from attn_kernels.pruning import FRACTION_BITS, LARGEST
from attn_kernels.variant import LEAST_BUDGET
from attn_kernels.variants.softmax import is_softmax
from attnserve.budgets.eviction import RULES, Cache, accumulate, survivors
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.scorers import load_llama
from attnserve.evaluation.texts import Text, fingerprint
from attnserve.evaluation.tiled import project
from attnserve.files import Journal
from hf_attn import VariantLlamaForCausalLM

Budgets = tuple[int, ...]  # tokens that each layer keeps
Losses = list[float]  # each sequence's mean loss in nats per token

QUIETLY: dict[str, Any] = {"leave": False, "disable": None}  # no bar for a file, or afterwards
BATCH_SCORES = 2**21  # a layer holds a few matrices of this many numbers, or of one sequence's


class Forward:
    """A Llama in float32, of a prunable variant or of softmax; `seed` is of random eviction."""

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        config = checkpoint.config
        variant = variant_from_config(config) or get_variant("softmax")
        if config.model_type not in ("llama", "variant_llama") or not (
            variant.prunable or variant.name == "softmax"
        ):
            raise UserError(
                f"{checkpoint.folder} is a {config.model_type} with {variant.name} attention: "
                "budgets are measured for a Llama with a prunable variant or softmax"
            )
        if getattr(config, "sliding_window", None):
            raise UserError(
                f"{checkpoint.folder} has a sliding window, which budgets are not measured with"
            )
        self.checkpoint = checkpoint
        self.model: VariantLlamaForCausalLM = load_llama(checkpoint.folder)
        self.seed = seed
        self.variant = variant
        self.layers = len(self.model.model.layers)

    @torch.no_grad()
    def embed(self, inputs: Tensor) -> Tensor:
        """Return what the first layer reads of token ids `[sequences, n]`: `[sequences, n,
        hidden_size]`."""
        embedded: Tensor = self.model.model.embed_tokens(inputs)
        return embedded

    @torch.no_grad()
    def layer(self, index: int, hidden: Tensor, budget: int, rule: str) -> Tensor:
        """Return what the next layer reads, `[sequences, n, hidden_size]`.

        Args:
            index: of the layer.
            hidden: what it reads of all the sequences of a text, `[sequences, n, hidden_size]`;
                random eviction depends on a sequence's number.
            budget: tokens that the layer keeps.
            rule: a key of `RULES`.
        """
        return torch.cat(
            [self._layer(index, part, start, budget, rule) for start, part in self._batches(hidden)]
        )

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Losses:
        """Return each sequence's loss, from what the last layer gives, `[sequences, n,
        hidden_size]`, and the token ids `[sequences, n]` to predict."""
        found: Losses = []
        for start, part in self._batches(hidden):
            logits = self.model.lm_head(self.model.model.norm(part))
            wanted = targets[start : start + len(part)]
            each = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            found += each.view(wanted.shape).double().mean(1).tolist()
        return found

    def __call__(self, text: Text, budgets: Sequence[int], rule: str) -> Losses:
        """Return each sequence's loss with these budgets, one a layer."""
        hidden = self.embed(text.rows[:, :-1])
        for index, budget in enumerate(tqdm(budgets, desc=rule, unit="layer", **QUIETLY)):
            hidden = self.layer(index, hidden, budget, rule)
        return self.losses(hidden, text.rows[:, 1:])

    @torch.no_grad()
    def needed(self, text: Text, thresholds: Sequence[float]) -> list[Budgets]:
        """Return, for each threshold, how many tokens each layer of a prunable variant must keep at
        most if it may evict those that are masked by at least so much, in the units of scores, and
        nothing is evicted in other layers."""
        hidden = self.embed(text.rows[:, :-1])
        limits = [round(threshold * 2**FRACTION_BITS) for threshold in thresholds]
        most = torch.zeros(len(limits), self.layers, dtype=torch.int64)
        for index in tqdm(range(self.layers), desc="thresholds", unit="layer", **QUIETLY):
            for _, part in self._batches(hidden):
                *_, accumulated = self._attended(index, part)
                assert accumulated is not None
                future = torch.ones(accumulated.shape[1:], dtype=torch.bool).triu(1)
                accumulated.masked_fill_(future, LARGEST)
                for found, limit in zip(most, limits, strict=True):
                    found[index] = max(found[index], (accumulated < limit).sum(-1).max())
            hidden = self.layer(index, hidden, hidden.shape[1], "selective")
        return [tuple(budgets) for budgets in most.clamp(min=LEAST_BUDGET).tolist()]

    @staticmethod
    def _batches(hidden: Tensor) -> list[tuple[int, Tensor]]:
        size = max(1, BATCH_SCORES // hidden.shape[1] ** 2)
        return [(size * i, part) for i, part in enumerate(hidden.split(size))]

    def _attended(
        self, index: int, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return a layer's normalised input, queries, keys, values and accumulators, if it has
        these."""
        layer = self.model.model.layers[index]
        attention = layer.self_attn
        positions = torch.arange(hidden.shape[1])[None]
        x = layer.input_layernorm(hidden)
        q, k, v = project(attention, x)
        q, k = attention.rotate(q, k, self.model.model.rotary_emb(x, positions), positions)
        accumulated = (
            accumulate(self.variant, q, k, attention.scaling) if self.variant.prunable else None
        )
        return x, q, k, v, accumulated

    def _layer(self, index: int, hidden: Tensor, start: int, budget: int, rule: str) -> Tensor:
        layer = self.model.model.layers[index]
        attention = layer.self_attn
        x, q, k, v, accumulated = self._attended(index, hidden)
        if budget < hidden.shape[1]:
            seeds = [[self.seed, index, start + i] for i in range(len(hidden))]
            mask = RULES[rule](Cache(q, k, attention.scaling, accumulated, seeds, budget))
        else:
            mask = survivors(torch.full((1, hidden.shape[1]), hidden.shape[1]))
        penalty = q.new_zeros(1, 1, 1)
        if accumulated is not None:
            penalty = accumulated.to(q.dtype) / 2**FRACTION_BITS
        variant = self.variant
        # Several times faster.
        if is_softmax(variant) and variant.plain_scores and variant.uses_scale:
            bias = torch.where(mask, -penalty[:, None], -torch.inf)
            output = scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=attention.scaling, enable_gqa=True
            )
        else:
            gates = None
            if variant.gated:
                gates = variant.gate(attention.f_proj(x)).transpose(1, 2)
            output, _ = attend(
                variant,
                q,
                k,
                v,
                mask,
                scale=attention.scaling,
                learned={name: getattr(attention, name) for name in variant.learned},
                penalty=penalty,
                gates=gates,
            )
        hidden = hidden + attention.o_proj(output.transpose(1, 2).flatten(2))
        through: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return through


class Measured:
    """A model on a text: losses by rule of eviction and budgets, each of which is kept.

    They are in a journal in `folder`, whose name tells checkpoint and text, so that others' are
    never mixed.
    """

    def __init__(self, forward: Forward, text: Text, folder: Path) -> None:
        self.forward, self.text, self.checkpoint = forward, text, forward.checkpoint
        key = {"checkpoint": self.checkpoint.digest, "text": fingerprint([text])}
        names = (self.checkpoint.name, text.title.replace(" ", "_"), *key.values())
        self.journal = Journal(folder / f"{'-'.join(names)}.jsonl", key)

    @property
    def full(self) -> Budgets:
        """Budgets that keep everything."""
        return (len(self.text.sequences[0]),) * self.forward.layers

    def losses(
        self, rule: str, budgets: Budgets, measure: Callable[[], Losses] | None = None
    ) -> Losses:
        """Return each sequence's loss with these budgets, one a layer; the rule "none" keeps
        everything. `measure` measures it where there is a shorter way than a whole forward pass."""
        seed = [self.forward.seed] if rule == "random" else []
        found: Losses = self.journal.get(
            " ".join(map(str, (rule, *seed, budgets))),
            measure or (lambda: self.forward(self.text, budgets, rule)),
        )
        return found
