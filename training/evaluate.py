"""Perplexity of a checkpoint on the held-out books: `python -m training.evaluate CKPT`.

Beside it stand an add-one unigram and an interpolated Kneser-Ney trigram over the same tokens,
counted on the books that the reference checkpoints train on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_attn  # noqa: F401  registers the model class
from training.books import add_books_option, split
from training.data import Tokens, read_tokens, sequence
from training.ngram import Trigram, Unigram, log_likelihood


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text. Perplexities are `exp(-log likelihood / units)`."""

    model: str
    text: str
    log_likelihood: float
    tokens: int
    words: int
    bytes: int

    @property
    def per_token(self) -> float:
        """Perplexity per token; comparable between models of the same tokenizer."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def per_word(self) -> float:
        """Perplexity per word (as split by white space); comparable between tokenizers."""
        return math.exp(-self.log_likelihood / self.words)

    @property
    def per_byte(self) -> float:
        """Perplexity per UTF-8 byte; comparable between tokenizers."""
        return math.exp(-self.log_likelihood / self.bytes)


@torch.no_grad()
def model_log_likelihood(
    model: PreTrainedModel, tokens: Tokens, context: int, bos: int, quiet: bool = False
) -> float:
    """Sum of natural log probabilities of `tokens`, as training sees them: in sequences of
    `context` tokens that each start anew after the begin-of-text token."""
    total = 0.0
    for start in tqdm(range(0, len(tokens), context), unit="sequence", disable=quiet):
        inputs, targets = map(torch.from_numpy, sequence(tokens, start, context, bos))
        logits: Tensor = model(input_ids=inputs[None], use_cache=False).logits[0]
        total -= float(cross_entropy(logits.float(), targets, reduction="sum"))
    return total


def evaluate(checkpoint: Path, books: Path | None = None, quiet: bool = False) -> list[Score]:
    """Scores of a checkpoint and of the two baselines on the validation and the test book.

    Args:
        checkpoint: a Hugging Face folder; it is run in float32.
        books: what `training.books.split` splits.
        quiet: no progress bars.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    files = split(books)
    train = read_tokens(files.train, tokenizer)
    baselines: dict[str, Trigram | Unigram] = {
        "trigram": Trigram(train, len(tokenizer)),
        "unigram": Unigram(train, len(tokenizer)),
    }
    context = model.config.max_position_embeddings
    scores = []
    for text, file in (("validation", files.validation), ("test", files.test)):
        tokens = read_tokens([file], tokenizer)[:-1]
        content = file.read_text(encoding="utf-8")
        units = (len(tokens), len(content.split()), len(content.encode()))
        total = model_log_likelihood(model, tokens, context, tokenizer.bos_token_id, quiet)
        scores.append(Score("model", text, total, *units))
        for name, baseline in baselines.items():
            total = log_likelihood(baseline, tokens, tokenizer.eos_token_id)
            scores.append(Score(name, text, total, *units))
    return scores


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| text | model | per token | per word | per byte |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {s.text} | {s.model} | {s.per_token:.2f} | {s.per_word:.1f} | {s.per_byte:.3f} |"
        for s in scores
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    add_books_option(parser)
    arguments = parser.parse_args(argv)
    try:
        split(arguments.books)
    except FileNotFoundError as error:
        parser.error(str(error))
    scores = evaluate(arguments.checkpoint, arguments.books)
    print(table(scores))
    print(
        json.dumps(
            [
                dataclasses.asdict(score)
                | {
                    "per_token": score.per_token,
                    "per_word": score.per_word,
                    "per_byte": score.per_byte,
                }
                for score in scores
            ]
        )
    )


if __name__ == "__main__":
    main()
