"""Everything that decides what a training run computes, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from typer import Option

from attnserve.evaluation.arguments import positive

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainingRecipe:
    """The settings of one run. The same recipe on the same data and machine gives the same bits."""

    hidden_size: Annotated[int, Option(help="Width of the model.")] = 256
    layers: Annotated[int, Option(help="Number of layers.")] = 4
    heads: Annotated[int, Option(help="Number of query heads.")] = 4
    kv_heads: Annotated[int, Option(help="Number of key and value heads.")] = 4
    intermediate_size: Annotated[int, Option(help="Width of the MLP.")] = 688
    context: Annotated[int, Option(min=1, help="Tokens of a training sequence.")] = 512
    batch: Annotated[int, Option(min=1, help="Sequences of a step.")] = 8
    steps: Annotated[int, Option(min=1, help="Optimizer steps.")] = 1200
    warmup: Annotated[int, Option(help="Steps over which the learning rate rises.")] = 100
    learning_rate: Annotated[float, Option(help="Peak learning rate.")] = 2e-3
    final_learning_rate: Annotated[float, Option(help="The last one, by the peak.")] = 0.1
    weight_decay: Annotated[float, Option(help="AdamW's weight decay, on matrices only.")] = 0.1
    beta1: Annotated[float, Option(help="AdamW's beta1.")] = 0.9
    beta2: Annotated[float, Option(help="AdamW's beta2.")] = 0.95
    clip: Annotated[float, Option(help="Largest norm of the gradient.")] = 1.0
    precision: Annotated[Precision, Option(help="Of matrix products outside attention.")] = "fp32"
    memory_loss: Annotated[
        float, Option(help="Weight of selective attention's loss for pruning; 0.1 in the paper.")
    ] = 0.0
    seed: Annotated[int, Option(help="Seed of the initial weights and of the data order.")] = 0

    def learning_rate_at(self, step: int) -> float:
        """Return a step's learning rate: linear warm-up, then half a cosine down to the final rate
        at the last step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        low = self.learning_rate * self.final_learning_rate
        return low + (self.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))


LEARNING_RATES = {"scale": 2e-3, "all": 2e-5}
RATES_TEXT = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
WARMUP = 0.1
"""Share of a fine-tuning's steps in which the learning rate rises."""


@dataclass(frozen=True)
class FineTuning:
    """A short training of a checkpoint: AdamW without weight decay, gradients clipped to norm 1,
    weights in float32."""

    steps: Annotated[int, Option(min=0, help="Steps of fine-tuning; 0: none.")] = 0
    minutes: Annotated[
        float,
        Option(
            min=0.0,
            help="Fine-tune for this long, instead of --steps; the schedule goes by time.",
        ),
    ] = 0.0
    train: Annotated[
        Literal["scale", "all"], Option(help="The variant's learned tensors, or every weight.")
    ] = "scale"
    learning_rate: Annotated[
        float,
        Option(
            min=0.0,
            help=f"The peak. 0: {RATES_TEXT}. With all, the variant's learned tensors still have "
            f"{LEARNING_RATES['scale']:g} at least: they begin far from where they belong.",
            show_default=False,
        ),
    ] = 0.0
    sequence: Annotated[int, Option(min=1, help="Tokens of a sequence.")] = 1024
    batch: Annotated[int, Option(min=1, help="Sequences of a step.")] = 1
    seed: Annotated[int, Option(help="Seed of the text's order.")] = 0
    precision: Annotated[Precision, Option(help="Of matrix products.")] = "fp32"
    distill: Annotated[
        float,
        Option(
            min=0.0,
            max=1.0,
            help="Weight of the divergence from SRC's own predictions; the rest is the text's.",
        ),
    ] = 0.0
    blend: Annotated[
        float,
        Option(
            min=0.0,
            max=1.0,
            help="Share of the steps in which attention goes over from softmax to the variant.",
        ),
    ] = 0.0
    memory_loss: Annotated[
        float,
        Option(
            min=0.0,
            help="Weight of selective attention's loss for pruning, beside the text's and the "
            "divergence; 0.1 in the paper.",
        ),
    ] = 0.0
    clip: ClassVar[float] = 1.0
    """Largest norm of the gradient."""

    @property
    def tunes(self) -> bool:
        """Whether there is any fine-tuning."""
        return bool(self.steps or self.minutes)

    def progress(self, step: int, seconds: float) -> float:
        """Return which share is done after so many steps and seconds; 1: all."""
        return seconds / (60 * self.minutes) if self.minutes else step / self.steps

    def learning_rate_at(self, step: int, seconds: float = 0.0) -> float:
        """Return a step's learning rate: a straight rise, then a straight fall to 0."""
        if self.minutes:
            progress = self.progress(step, seconds)
            rise, fall = (progress + 1e-3) / WARMUP, max(0.0, 1 - progress) / (1 - WARMUP)
        else:
            warmup = max(1, round(WARMUP * self.steps))
            rise, fall = (step + 1) / warmup, (self.steps - step) / (self.steps + 1 - warmup)
        return self.learning_rate * min(rise, fall, 1.0)


@dataclass(frozen=True)
class Conversion:
    """What a conversion says or changes beside the attention variant."""

    train_length: Annotated[
        int | None,
        Option(min=1, help="SRC's length in training. Default: its max_position_embeddings."),
    ] = None
    rope_theta: Annotated[
        float | None, Option(parser=positive, help="Base of the rotary embedding. Default: SRC's.")
    ] = None
    rope_theta_factor: Annotated[
        float, Option(parser=positive, help="Multiplies it; the SSMax paper has 50.")
    ] = 1.0
    positions: Annotated[
        int | None,
        Option(min=1, help="OUT's max_position_embeddings, vLLM's limit. Default: SRC's."),
    ] = None
