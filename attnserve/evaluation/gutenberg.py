"""The novels as Project Gutenberg's e-books: where they are, and their text without the rest."""

import csv
import hashlib
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("novels.tsv")
GITENBERG = "https://raw.githubusercontent.com/GITenberg"
TIMEOUT_S = 60.0
TRIES = 4
PAUSE_S = 2.0  # pause before the second try, in seconds; it doubles before each further one

STARTS = re.compile(r"\*\*\* ?START OF .*?\*\*\*", re.DOTALL)
ENDS = re.compile(r"\*\*\* ?END OF ")
BY_THE_EDITORS = re.compile(r"gutenberg|etext|^produced by|^e-text prepared|^\[illustration", re.I)
"""Paragraphs that are left out. "etext" has taken along those with "pretext": the reference
checkpoints were trained without them."""


class Novel(NamedTuple):
    """One row of novels.tsv."""

    file: str  # name of the cleaned text
    id: int  # Project Gutenberg's number of the e-book
    # author, title: of the novel.
    author: str
    title: str
    # repository, commit, path: the edition that was used, as GITenberg keeps it on GitHub.
    repository: str
    commit: str
    path: str
    sha256: str  # of the cleaned text


def novels() -> list[Novel]:
    """Return the thirteen novels of the recipe."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [Novel(id=int(row.pop("id")), **row) for row in rows]


def url_of(novel: Novel, server: str = GITENBERG) -> str:
    """Return the URL of the very bytes that the reference checkpoints' text was made of."""
    return f"{server}/{novel.repository}_{novel.id}/{novel.commit}/{novel.path}"


def download(url: str) -> bytes:
    """Return what a server sends, whole, after `TRIES` tries at most.

    Raises:
        OSError: it did not come; the message says why.
    """
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read()
                return content
        except (OSError, HTTPException) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code in (403, 404, 410)
            if final or not left:
                raise OSError(f"{url}: {getattr(error, 'reason', None) or error}") from None
            time.sleep(PAUSE_S * 2 ** (TRIES - left - 1))
    raise AssertionError("unreachable")


def clean(edition: bytes) -> str:
    """Return the text of an e-book's plain text file, UTF-8 or, as old ones, Latin-1: a
    paragraph a line with a blank line between, without the licence, the editors' notes and the
    line breaks inside paragraphs."""
    try:
        text = edition.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = edition.decode("latin-1")
    text = text.replace("\r\n", "\n")
    if found := STARTS.search(text):
        text = text[found.end() :]
    if found := ENDS.search(text):
        text = text[: found.start()]
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    kept = (block for block in paragraphs if block and not BY_THE_EDITORS.search(block))
    return "\n\n".join(kept) + "\n"


def sha256(text: str) -> str:
    """Return the hash that novels.tsv has of a cleaned text."""
    return hashlib.sha256(text.encode()).hexdigest()
