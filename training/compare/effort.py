"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnserve.budgets import Search


@dataclass(frozen=True)
class Effort:
    """Sample sizes and lengths of every measurement. The defaults are the full effort."""

    # Of each measure of `training.analyze`.
    limits: dict[str, int] = field(
        default_factory=lambda: {
            "perplexity": 32,
            "attention": 16,
            "lambada": 1000,
            "blimp": 200,
            "length": 6,
            "passkey": 32,
        }
    )
    sequence: int = 2048  # tokens of a sequence of perplexity and attention, at most
    max_length: int = 16384  # tokens of the longest context, 8 training lengths at most
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    schemes: tuple[str, ...] = ("hqq", "gptq")  # of the weights, as in the softpick paper
    targets: tuple[str, ...] = ("weights", "kv")
    quantized: int = 16  # sequences that a quantized model is measured and calibrated on
    quantized_length: int = 512  # tokens of such a sequence, at most
    pruning: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # tokens of a sequence
    search: Search | None = None  # of budgets; None: as `attnserve budgets` does
    # Sequences of 512 tokens to search, judge and test on; fewer, but two, of longer ones.
    pruned: tuple[int, int, int] = (4, 16, 16)
    uniform: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    serves: bool = True
    served: int = 1024  # tokens of a request, prompt and answer, at most
    requests: int = 32  # that are sent at once
    rounds: int = 3


QUICK = Effort(
    limits={
        "perplexity": 8,
        "attention": 4,
        "lambada": 100,
        "blimp": 20,
        "length": 4,
        "passkey": 4,
    },
    sequence=512,
    max_length=2048,
    bits=(2, 3, 4, 8),
    schemes=("hqq",),
    targets=("weights",),
    quantized=4,
    quantized_length=256,
    pruning=(2048,),  # or the longest that the original was trained on
    search="threshold",
    pruned=(8, 16, 16),
    uniform=(128, 512),
    serves=False,
)
"""What takes minutes on two cores for a model of 135M parameters."""

MULTIPLE = 8
"""Training lengths of the longest context."""
