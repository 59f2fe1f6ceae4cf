"""Everything that decides what a training run computes, as one value."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from attn_kernels import VariantError, get_variant
from hf_attn import VariantLlamaConfig


def parse_variant(text: str) -> dict[str, Any]:
    """`softpick`, or JSON with parameters: `{"name": "lssar", "power": 3}`.

    Raises:
        argparse.ArgumentTypeError: no such variant or parameter.
    """
    example = '{"name": "lssar", "power": 3}'
    try:
        entry = json.loads(text) if text.lstrip().startswith("{") else {"name": text}
        parameters = dict(entry)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            raise argparse.ArgumentTypeError(f"{text} names no variant: write it as {example}")
        get_variant(name, **parameters)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): write it as {example}") from None
    except VariantError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return dict(entry)


def _option(default: Any, text: str, **kwargs: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **kwargs})


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. The same recipe on the same data and machine gives the same bits."""

    hidden_size: int = _option(256, "width of the model")
    layers: int = _option(4, "number of layers")
    heads: int = _option(4, "number of query heads")
    kv_heads: int = _option(4, "number of key and value heads")
    intermediate_size: int = _option(688, "width of the MLP")
    context: int = _option(512, "tokens a training sequence has")
    batch: int = _option(8, "sequences per step")
    steps: int = _option(1200, "optimizer steps")
    warmup: int = _option(100, "steps over which the learning rate rises")
    learning_rate: float = _option(2e-3, "peak learning rate")
    final_learning_rate: float = _option(0.1, "last learning rate as a share of the peak")
    weight_decay: float = _option(0.1, "AdamW's weight decay, on matrices only")
    beta1: float = _option(0.9, "AdamW's beta1")
    beta2: float = _option(0.95, "AdamW's beta2")
    clip: float = _option(1.0, "largest norm of the gradient")
    precision: str = _option(
        "fp32",
        "matrix products outside attention; attention is always fp32",
        choices=("fp32", "bf16"),
    )
    memory_loss: float = _option(
        0.0,
        "weight of the loss term for context pruning (0.1 in the paper); of selective attention "
        "only",
    )
    seed: int = _option(0, "seed of the initial weights and of the data order")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One option for each field, with its default."""
        group = parser.add_argument_group("recipe")
        for field in dataclasses.fields(cls):
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                type=type(field.default),
                default=field.default,
                help=f"{field.metadata['help']} (default: %(default)s)",
                choices=field.metadata.get("choices"),
            )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Recipe:
        """The recipe that `add_arguments`' options describe."""
        return cls(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(cls)})

    def config(
        self, variant: dict[str, Any], vocab_size: int, bos: int, eos: int
    ) -> VariantLlamaConfig:
        """The configuration of the model."""
        return VariantLlamaConfig(
            attention_variant=variant,
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to the final learning rate at the last step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        low = self.learning_rate * self.final_learning_rate
        return low + (self.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))
