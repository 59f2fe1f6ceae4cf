"""Write texts and chats as one file of tokens, to train on where they are not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs
from attnserve.errors import UserError
from attnserve.files import replacing


@needs("train")
def tokens(
    source: Annotated[
        Path, Argument(metavar="SRC", help="Folder with the tokenizer.", show_default=False)
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="File to write: *.npy.", show_default=False)],
    data: Annotated[
        list[Path], Option(metavar="FILE", help="As for training.convert.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Write texts and chats as one file of tokens.

    The file, two bytes a token where the tokenizer has at most 65,536, is --data of
    training.convert on any machine: tokenizing is done, and texts compress to less than half.
    """
    import numpy as np

    from attnserve.evaluation.checkpoint import Checkpoint
    from training.data import data_tokens

    if out.suffix != ".npy":
        raise UserError(f"{out} must be named *.npy: training.convert knows it by that")
    tokenizer = Checkpoint(source).tokenizer
    found = data_tokens(data, tokenizer)
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.save(file, found.astype(kind))
    record = {"file": str(out), "tokens": len(found), "bytes": out.stat().st_size}
    print(json.dumps(record) if as_json else f"{out}: {len(found):,} tokens")


if __name__ == "__main__":
    main(tokens, "python -m training.tokens")
