"""Where the thirteen novels are that the reference checkpoints are trained and measured on."""

import json
from pathlib import Path
from typing import Annotated, NamedTuple

from typer import Option

from attnserve.command import AsJson, expanded, main, needs
from attnserve.errors import UserError
from attnserve.evaluation.gutenberg import GITENBERG, clean, download, novels, sha256, url_of
from attnserve.files import write_text

VALIDATION, TEST = "emma.txt", "great_expectations.txt"
WAYS = (
    "fetch the thirteen novels with `attnserve books` (network), or name their folder "
    "with --books DIR"
)


class Split(NamedTuple):
    """Text files by what they are for."""

    train: list[Path]
    validation: Path
    test: Path


def books_folder() -> Path:
    """Return the folder in which `attnserve books` puts the novels if nothing is said."""
    from attn_kernels.cpu.build import BuildError, cache_folder

    try:
        return cache_folder() / "books"
    except BuildError as error:
        raise UserError(f"no place for the novels: {error}, or give --books DIR") from None


def are_fetched() -> bool:
    """Return whether that folder is there."""
    try:
        return books_folder().is_dir()
    except UserError:
        return False


def split(folder: Path | None = None) -> Split:
    """Return the text files of a folder (None: the fetched novels): all are for training but the
    two of `VALIDATION` and `TEST`."""
    folder = folder or books_folder()
    validation, test = folder / VALIDATION, folder / TEST
    train = sorted(set(folder.glob("*.txt")) - {validation, test})
    for path in (validation, test):
        if not path.is_file():
            raise UserError(f"{path} is not there: {WAYS}")
    if not train:
        raise UserError(f"{folder} holds no book to train on: {WAYS}")
    return Split(train, validation, test)


def fetch(folder: Path, server: str = GITENBERG) -> None:
    """Download the novels that the folder lacks; it is there with all of them or not at all.

    Meanwhile they are in `folder.part`. The server is GITenberg's, or one that has its files
    under the same paths.
    """
    from tqdm import tqdm

    folder = folder.resolve()
    wanted = novels()
    if folder.exists() and any(folder.iterdir()):
        if missing := [novel.file for novel in wanted if not (folder / novel.file).is_file()]:
            raise UserError(f"{folder} is there and has no {missing[0]}: name another --out")
        return
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for novel in tqdm(wanted, desc="novels", unit="novel"):
        path = part / novel.file
        if path.is_file() and sha256(path.read_text(encoding="utf-8")) == novel.sha256:
            continue
        url = url_of(novel, server)
        try:
            text = clean(download(url))
        except OSError as error:
            raise UserError(f"{error}; what came is kept, run the command again") from None
        if sha256(text) != novel.sha256:
            raise UserError(
                f"{url} is not the text of {novel.title} that was used: it has another SHA-256"
            )
        write_text(path, text)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


@needs("train")
def books(
    out: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Folder to write, for --books. Default: books in the cache folder, which is "
            "$ATTNSERVE_CACHE, else attnserve in $XDG_CACHE_HOME or ~/.cache.",
        ),
    ] = None,
    server: Annotated[str, Option(metavar="URL", help="A mirror of the source.")] = GITENBERG,
    as_json: AsJson = False,
) -> None:
    """Fetch the novels that the checkpoints learned from.

    The reference checkpoints were trained and measured on them. They are thirteen e-books of
    Project Gutenberg, in the public domain, 21 MB in all. Gutenberg revises its files, so the
    editions that were used come from GITenberg's copies on GitHub, which are fixed by a commit.

    An interrupted download is kept: the same command goes on from there.
    """
    folder = expanded(out) if out else books_folder()
    fetch(folder, server)
    print(json.dumps({"folder": str(folder)}) if as_json else f"The novels are in {folder}")


if __name__ == "__main__":
    main(books, "attnserve books")
