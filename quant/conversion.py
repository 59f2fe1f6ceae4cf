"""From one quantized format to another, with the same values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import first_line
from quant.checkpoint import FORMATS, GGUF
from quant.checks import check_no_experts
from quant.contents import blockwise, dequantized, read_checkpoint, servable
from quant.gguf_file import check_model, read_gguf, write_gguf
from quant.model import empty_model
from quant.write import (
    TOKENIZER,
    check_out,
    quantization_config,
    replacing_checkpoint,
    write_folder,
)


def convert_checkpoint(source: Path, out: Path, format: str, overwrite: bool) -> dict[str, int]:
    """Write a checkpoint in another format.

    Args:
        source: a GGUF file, or a folder.
        out: a folder, or for the format gguf a file.
        format: one of `FORMATS`.
        overwrite: whether to replace a quantized checkpoint at `out`.

    Returns:
        The number of layers that stay integers and of those that are dequantized, and the bytes.

    Raises:
        UserError, ValueError: with one line; nothing is written.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: use {' or '.join(FORMATS)}")
    check_out(source, out, overwrite)
    with tempfile.TemporaryDirectory() as made:
        if source.is_file():
            folder, contents = Path(made), read_gguf(source)
            (folder / "config.json").write_text(json.dumps(dict(contents.config)), encoding="utf-8")
            model = empty_model(folder)
            write_tokenizer(source, folder)
        else:
            folder, model = source, empty_model(source)
            check_no_experts(folder, model)
            contents = read_checkpoint(folder, model)
        contents.check(source, model)
        read, config = len(contents.weights), model.config
        if format == GGUF:
            check_model(config, folder / TOKENIZER)
            contents = dequantized(contents, blockwise(contents))
        else:
            contents = servable(contents)
        with replacing_checkpoint(out) as new:
            if format == GGUF:
                sizes = write_gguf(contents, config, folder / TOKENIZER, new)
            else:
                entry = quantization_config(contents.weights, model)
                command = "`python -m quant.convert`"
                sizes = write_folder(contents, new, entry, folder, command)
    packed = len(contents.weights)
    return {"packed": packed, "dequantized": read - packed, "bytes": sum(sizes.values())}


def write_tokenizer(file: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file.

    Raises:
        UserError: with one line: it has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers lets anything through that a wrong file causes
        why = first_line(error)
        raise UserError(f"{file} has no tokenizer that can be read: {why}") from None
    tokenizer.save_pretrained(folder)
