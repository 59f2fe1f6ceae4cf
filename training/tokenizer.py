"""Train a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from attnserve.evaluation.tokens import text_file

BOS, EOS = "<s>", "</s>"

PARAGRAPHS = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- (message['content'] or '') | trim }}
    {%- if not loop.last or add_generation_prompt %}
        {{- '\n\n' }}
    {%- endif %}
{%- endfor %}
""".strip()
"""A chat template for models of plain text: each message is a paragraph, the model writes the next.

Roles are left out: a novel has none, and the model was never told to follow instructions.
"""


def train_tokenizer(
    files: Sequence[Path], vocab_size: int = 2048, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Train a tokenizer that can encode any text: every byte is a token, so none is unknown.

    Args:
        files: UTF-8 text.
        vocab_size: tokens at most, among them the 256 bytes, `<s>` (put before every text) and
            `</s>`.
        max_length: `model_max_length` of the tokenizer, in tokens.

    Raises:
        ValueError: `vocab_size` is too small to hold every byte.
    """
    smallest = 256 + len((BOS, EOS))
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    complete(made)
    return made


def complete(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the chat template and the pad token that it lacks.

    No token is added: texts are padded with the end-of-text token, on the left, so that
    `generate` goes on where each text ends.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PARAGRAPHS
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs["padding_side"] = "left"  # `save_pretrained` writes only these


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="training.tokenizer", description=__doc__)
    parser.add_argument("--data", nargs="+", type=text_file, required=True, help="UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="tokens at most (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=512, help="model_max_length (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        tokenizer = train_tokenizer(arguments.data, arguments.vocab_size, arguments.max_length)
        arguments.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(arguments.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(tokenizer)} tokens from {len(arguments.data)} files in {arguments.out}")
    print(json.dumps({"out": str(arguments.out), "vocab_size": len(tokenizer)}))


if __name__ == "__main__":
    main()
