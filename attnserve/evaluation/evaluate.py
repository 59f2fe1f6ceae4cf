"""Measure the perplexity of a checkpoint.

On --text FILE, or on the beginnings of the two held-out novels, which --books names or
`attnserve books` has fetched. Where there are neither, on text that the checkpoint writes
itself; its perplexity there is the entropy of its own sampling, not a measure of its English.

--ngrams adds an add-one unigram and an interpolated Kneser-Ney trigram over the same tokens,
counted on the novels that the reference checkpoints train on. --whole --ngrams gives the figures of
the model cards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from attn_kernels import VariantError
from attnserve.evaluation.books import Split, add_books_option, are_fetched, split
from attnserve.evaluation.checkpoint import Checkpoint, first_line
from attnserve.evaluation.ngram import Trigram, Unigram, log_likelihood
from attnserve.evaluation.tokens import Tokens, read_tokens, sequence, text_file
from attnserve.options import positive
from attnserve.sampled_text import sampled_text

TOKENS = 2**15
"""Of each text that are read by default."""
OWN_SEQUENCES, OWN_LENGTH = 16, 512
"""How much a checkpoint writes where no text is at hand, in sequences and tokens of each."""


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


@dataclass(frozen=True)
class Text:
    """What a checkpoint reads.

    Attributes:
        name: for the table.
        tokens: `[num_tokens]`.
        content: the same as characters.
        context: tokens of a sequence.
    """

    name: str
    tokens: Tokens
    content: str
    context: int


def file_text(checkpoint: Checkpoint, name: str, file: Path, sequences: int | None = None) -> Text:
    """Return a file's text, or its first sequences of the training length.

    Raises:
        ValueError: it is empty.
    """
    tokens = read_tokens([file], checkpoint.tokenizer)[:-1]
    content = file.read_text(encoding="utf-8")
    most = None if sequences is None else sequences * checkpoint.context
    if not content.split():
        raise ValueError(f"{file} has no words")
    if most is not None and len(tokens) > most:
        tokens = tokens[:most]
        content = checkpoint.tokenizer.decode(tokens)
    return Text(name, tokens, content, checkpoint.context)


def held_out(checkpoint: Checkpoint, books: Split, sequences: int | None = None) -> list[Text]:
    """Return the validation and the test novel, or their first sequences."""
    files = {"validation": books.validation, "test": books.test}
    return [file_text(checkpoint, name, file, sequences) for name, file in files.items()]


def own_text(checkpoint: Checkpoint, sequences: int | None = None) -> Text:
    """Return text that the checkpoint writes itself."""
    context = min(checkpoint.context, OWN_LENGTH)
    count = min(sequences or OWN_SEQUENCES, OWN_SEQUENCES)
    rows = sampled_text(checkpoint.folder, "evaluation", count, context + 1)
    tokens = rows[:, 1:].flatten().numpy()
    return Text("own text", tokens, checkpoint.tokenizer.decode(tokens), context)


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


def evaluate(
    checkpoint: Checkpoint, texts: Sequence[Text], train: Sequence[Path] = (), quiet: bool = False
) -> list[Score]:
    """Return the scores of a checkpoint, run in float32, and of the two baselines on each text.

    Args:
        checkpoint: what is measured.
        texts: what it reads.
        train: the files that the baselines are counted on; without them there are none.
        quiet: no progress bars.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    tokenizer = checkpoint.tokenizer
    baselines: dict[str, Trigram | Unigram] = {}
    if train:
        counted = read_tokens(train, tokenizer)
        baselines["trigram"] = Trigram(counted, len(tokenizer))
        baselines["unigram"] = Unigram(counted, len(tokenizer))
    scores = []
    for text in texts:
        units = (len(text.tokens), len(text.content.split()), len(text.content.encode()))
        total = model_log_likelihood(model, text.tokens, text.context, checkpoint.bos, quiet)
        scores.append(Score("model", text.name, total, *units))
        for name, baseline in baselines.items():
            total = log_likelihood(baseline, text.tokens, tokenizer.eos_token_id)
            scores.append(Score(name, text.name, total, *units))
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


def texts_of(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Text]:
    """Return the texts that the command line asks for.

    Raises:
        FileNotFoundError, ValueError: the novels are not there, or a text has no words.
    """
    most = options.sequences or max(1, TOKENS // checkpoint.context)
    most = None if options.whole else most
    if options.text:
        return [file_text(checkpoint, file.name, file, most) for file in options.text]
    if options.books or are_fetched():
        return held_out(checkpoint, split(options.books), most)
    return [own_text(checkpoint, most)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="attnserve.evaluation.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument(
        "--text", nargs="+", type=text_file, metavar="FILE", help="UTF-8 text files"
    )
    add_books_option(parser)
    parser.add_argument(
        "--sequences",
        type=positive,
        help="of the training length, from the beginning of each text (default: as many as have "
        f"{TOKENS} tokens)",
    )
    parser.add_argument("--whole", action="store_true", help="read whole texts: minutes for novels")
    parser.add_argument(
        "--ngrams", action="store_true", help="add the two baselines; needs the novels"
    )
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        train = split(options.books).train if options.ngrams else []
        checkpoint = Checkpoint(options.checkpoint)
        texts = texts_of(checkpoint, options)
        scores = evaluate(checkpoint, texts, train)
    except (OSError, ValueError, VariantError) as error:
        print(f"attnserve.evaluation.evaluate: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(table(scores))
    if texts[0].name == "own text":
        print(
            "The checkpoint wrote this text itself: the perplexity is the entropy of its own "
            "sampling and says\nnothing about its English. For a real text: --text FILE, or the "
            "novels (attnserve books)."
        )
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
