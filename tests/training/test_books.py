"""The command that fetches the novels, against a server on this machine."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attnserve.evaluation import books, gutenberg
from attnserve.evaluation.gutenberg import Novel, clean, sha256
from attnserve.files import CHECKOUT
from tests.conftest import Commands

BODY = [
    "EMMA",
    "By Nobody",
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, "
    "when it was checked by a violent gust of wind.",
    "“Naïve,” said the cat—and slept.",
]
CLEANED = "\n\n".join(BODY) + "\n"
Change = Callable[[str], bytes | None]


def edition(*body: str, encoding: str = "utf-8-sig") -> bytes:
    """Return an e-book's file as Project Gutenberg has it: wrapped, with notes, licence, CRLF."""
    lines = ["The Project Gutenberg EBook of Emma, by Nobody", "", "Title: Emma", ""]
    lines += ["*** START OF THIS PROJECT GUTENBERG", "EBOOK EMMA ***", "", "Produced by A. Person"]
    for paragraph in body:
        lines += ["", ""]
        words = paragraph.split(" ")
        lines += ["  " + " ".join(words[i : i + 9]) for i in range(0, len(words), 9)]
    lines += ["", "[Illustration: the cat]", "", "A note on this etext.", ""]
    lines += ["End of the Project Gutenberg EBook of Emma", "", "***END OF THE PROJECT GUTENBERG"]
    lines += ["EBOOK EMMA***", "", "Section 1. General Terms of Use"]
    return "\r\n".join(lines).encode(encoding)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Novel]:
    """Three novels of the same text in place of the thirteen, and no pauses between tries."""
    rows = [
        Novel(f"{name}.txt", 7 + i, "Nobody", name, name, "abc", f"{7 + i}-0.txt", sha256(CLEANED))
        for i, name in enumerate(("emma", "great_expectations", "first"))
    ]
    file = tmp_path / "novels.tsv"
    lines = [Novel._fields, *rows]
    file.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    monkeypatch.setattr(gutenberg, "TABLE", file)
    monkeypatch.setattr(gutenberg, "PAUSE_S", 0.0)
    return rows


class Server:
    """Serves files by path; `asked` has the paths in order."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.failures: list[str] = []
        """How the next requests fail: "503", or "short" for fewer bytes than were promised."""


@pytest.fixture
def server(table: list[Novel]) -> Iterator[tuple[Server, str]]:
    """Run a server that has all novels; yield it and its URL."""
    state = Server()
    for novel in table:
        state.files[gutenberg.url_of(novel, "")] = edition(*BODY)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            failure = state.failures.pop(0) if state.failures else ""
            content = state.files.get(self.path)
            self.send_response(503 if failure == "503" else 404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if content and failure != "503":
                self.wfile.write(content[:-9] if failure == "short" else content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield state, f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_table_names_the_novels_of_the_checkpoints() -> None:
    rows = gutenberg.novels()
    assert len(rows) == 13 == len({novel.id for novel in rows})
    card = (CHECKOUT / "checkpoints" / "softmax" / "README.md").read_text()
    for novel in rows:
        held_out = novel.file in (books.VALIDATION, books.TEST)
        assert (f"`{novel.file}`" in card) != held_out
        assert len(novel.sha256) == 64 and len(novel.commit) == 40


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "latin-1"])
def test_only_the_novel_is_left(encoding: str) -> None:
    plain = [text.translate(str.maketrans("“”—", '""-')) for text in BODY]
    body = plain if encoding == "latin-1" else BODY
    assert clean(edition(*body, encoding=encoding)) == "\n\n".join(body) + "\n"


def test_fetched_whole_and_found(
    server: tuple[Server, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    state, url = server
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    state.failures = ["503", "short", "short"]
    commands.run(books.books, "--server", url)
    assert len(state.asked) == 3 + 3
    assert [path.name for path in books.split().train] == ["first.txt"]
    assert books.split().test.read_text() == CLEANED
    commands.run(books.books, "--server", url)
    assert len(state.asked) == 6, "what is there is not asked for again"


def test_broken_off_and_gone_on(
    server: tuple[Server, str], table: list[Novel], tmp_path: Path, commands: Commands
) -> None:
    state, url = server
    last = gutenberg.url_of(table[-1], "")
    content = state.files.pop(last)
    out = tmp_path / "novels"
    command = ["--server", url, "--out", str(out)]
    message = commands.refused(books.books, *command)
    assert f"{last}: Not Found; what came is kept, run the command again" in message
    assert not out.exists(), "a part of the novels is never taken for all"
    state.files[last], state.asked = content, []
    commands.run(books.books, *command)
    assert state.asked == [last]
    assert sorted(path.name for path in out.iterdir()) == sorted(novel.file for novel in table)


def test_changed_edition_is_refused(
    server: tuple[Server, str], table: list[Novel], tmp_path: Path, commands: Commands
) -> None:
    state, url = server
    state.files[gutenberg.url_of(table[1], "")] = edition(*BODY, "A revised ending.")
    message = commands.refused(books.books, "--server", url, "--out", tmp_path / "novels")
    assert "another SHA-256" in message
    assert not (tmp_path / "novels").exists()


def test_other_folder_is_left_alone(
    server: tuple[Server, str], tmp_path: Path, commands: Commands
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    message = commands.refused(books.books, "--server", server[1], "--out", tmp_path)
    assert "has no emma.txt: name another --out" in message
    assert server[0].asked == []
