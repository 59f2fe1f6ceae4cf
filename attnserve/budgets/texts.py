"""The text that budgets are searched, judged and compared on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnserve.evaluation.books import Split
from attnserve.evaluation.checkpoint import Checkpoint, digest
from attnserve.evaluation.texts import Text, evenly, fingerprint, read, read_tokens, written
from attnserve.sampled_text import USES


@dataclass(frozen=True)
class Parts:
    """Texts by what they are for."""

    # The two held-out novels, a user's files, or what the checkpoint writes itself.
    kind: Literal["novels", "files", "own"]
    source: str  # the same for people
    digests: dict[str, str]  # a hash of each text
    search: Text  # by which layers to shrink are chosen
    judge: Text  # by which a target counts as reached
    test: Text  # for the table


def parts_of(
    checkpoint: Checkpoint,
    counts: tuple[int, int, int],
    length: int,
    files: Sequence[Path] = (),
    books: Split | None = None,
) -> Parts:
    """Return the texts, with `counts` sequences to search, judge and test: of a user's files the
    first half is for search and judgement and the second for the test, of the novels one each;
    without either the checkpoint writes all three."""
    if files:
        tokens = read_tokens(files, checkpoint.tokenizer)[:-1].tolist()
        middle = len(tokens) // 2
        first = (f"first half of {files[0].name}", tokens[:middle])
        second = (f"second half of {files[0].name}", tokens[middle:])
    elif books is not None:
        files = (books.validation, books.test)
        first, second = ((file.stem, checkpoint.encode(read(file))) for file in files)
    else:
        own = [
            written(f"sampled for {use}", checkpoint, use, count, length)
            for use, count in zip(USES, counts, strict=True)
        ]
        digests = {text.title: fingerprint([text]) for text in own}
        return Parts("own", f"what {checkpoint.name} writes itself", digests, *own)
    found = [
        evenly(title, checkpoint.bos, [tokens], count, length, last=False)
        for (title, tokens), count in zip((first, first, second), counts, strict=True)
    ]
    source = ", ".join(file.name for file in files)
    digests = {file.name: digest(file) for file in files}
    return Parts("novels" if books else "files", source, digests, *found)
