"""Train a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from attnserve.command import AsJson, main
from attnserve.errors import UserError
from training.arguments import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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

    It has `vocab_size` tokens at most, among them the 256 bytes, `<s>` (put before every text) and
    `</s>`; `max_length`, in tokens, is its `model_max_length`.
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    from attnserve.evaluation.texts import read

    for file in files:
        read(file)  # refuses what is no text
    smallest = 256 + len((BOS, EOS))
    if vocab_size < smallest:
        raise UserError(f"vocab_size must be at least {smallest}, not {vocab_size}")
    trained = ByteLevelBPETokenizer()
    trained.train(
        [str(file) for file in files],
        vocab_size,
        min_frequency=0,
        show_progress=False,
        special_tokens=[BOS, EOS],
    )
    trained.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()),
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


def tokenizer(
    data: Data,
    out: Annotated[Path, Option(help="Folder to write.", show_default=False)],
    vocab_size: Annotated[int, Option(help="Tokens at most.")] = 2048,
    max_length: Annotated[int, Option(help="model_max_length, in tokens.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE tokenizer on text files."""
    made = train_tokenizer(data, vocab_size, max_length)
    out.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(out)
    if as_json:
        print(json.dumps({"out": str(out), "vocab_size": len(made)}))
    else:
        print(f"{len(made)} tokens from {len(data)} files in {out}")


if __name__ == "__main__":
    main(tokenizer, "python -m training.tokenizer")
