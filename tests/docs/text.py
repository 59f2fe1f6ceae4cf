"""The commands and code blocks that the project's texts ask people to type."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TEXTS = sorted(
    path.relative_to(ROOT)
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/*.md",
        "checkpoints/*/README.md",
        "models/*/README.md",
    )
    for path in ROOT.glob(pattern)
    if path.name != "LOG.md"  # a diary: what was once typed, on machines of that day
)
MAKEFILE = Path("Makefile")

PROGRAMS = {
    *("apt-get", "attnserve", "attnserve-gateway", "curl", "docker", "docker-compose", "helm"),
    *("kubectl", "make", "pip", "pytest", "python", "python3", "source", "vllm"),
}
PACKAGES = ("benchmarks", "quant", "serving", "training")

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_ITEM = re.compile(r"\s*(?:[-|]|\d+\.) ")
_PASSAGE = re.compile(r"\n\s*\n|\n(?=\s*(?:[-|]|\d+\.) )")
_INLINE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced code block: the text it is in, its language and its content."""

    text: Path
    language: str
    content: str


@dataclass(frozen=True)
class Command:
    """A command as it is typed, on one line and without a comment, and the text it is in."""

    text: Path
    line: str
    inline: bool
    """In a sentence or a table, not in a shell block."""


def read(text: Path) -> str:
    """Return the whole text."""
    return (ROOT / text).read_text(encoding="utf-8")


def blocks(text: Path, part: str | None = None) -> list[Block]:
    """Return the fenced code blocks of a text, or of a part of it."""
    return [
        Block(text, language, "".join(x.removeprefix(indent) for x in content.splitlines(True)))
        for indent, language, content in _FENCE.findall(read(text) if part is None else part)
    ]


def passages(text: Path) -> list[tuple[str, str]]:
    """Return every code block, paragraph, list item and table row, each with the paragraph or block
    that is before it in its section: before the whole list or table. A heading belongs to the first
    of its section."""
    parts: list[str] = []
    end = 0
    for fence in _FENCE.finditer(read(text)):
        parts += [*_PASSAGE.split(read(text)[end : fence.start()]), fence[0]]
        end = fence.end()
    parts += _PASSAGE.split(read(text)[end:])
    found, before, heading = [], "", ""
    for part in filter(str.strip, parts):
        if re.match(r"\s*#+ ", part):
            before, heading = "", f"{part}\n"
            continue
        found.append((heading + part, before))
        heading = ""
        if not _ITEM.match(part):
            before = part
    return found


def script_lines(script: str) -> list[str]:
    """Return the commands of a shell script, each on one line, without comments."""
    commands, pending = [], ""
    for line in script.splitlines():
        pending += line.removesuffix("\\") if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open: the command goes on in the next line
            pending += "\n"
            continue
        if words:
            commands.append(re.sub(r"\s#\s.*$", "", pending).strip())
        pending = ""
    assert not pending, f"a quote is left open in {pending!r}"
    return [re.sub(r"[ \t]{2,}", " ", command) for command in commands]


def is_module(words: list[str]) -> bool:
    """Return whether this is the name of one of the project's commands, as in `quant.sweep`."""
    head, *rest = words
    parts = head.split(".")
    if parts[0] not in PACKAGES or len(parts) < 2 or not all(parts):
        return False
    file = ROOT.joinpath(*parts)
    runs = file.with_suffix(".py").exists() and "__main__" in file.with_suffix(".py").read_text()
    return (runs or (file / "__main__.py").exists()) and (not rest or rest[0].startswith("--"))


def inline_command(span: str) -> str | None:
    """Return the command that an inline code span is, or None if it is something else."""
    span = " ".join(span.split())
    words = span.split(" ")
    if is_module(words):
        return f"python -m {span}"
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    if len(words) < 2 or words[0].removeprefix(".venv/bin/") not in PROGRAMS:
        return None
    return span


def commands(text: Path, part: str | None = None) -> list[Command]:
    """Return every command of a text or of a part of it: of shell blocks, then the inline ones."""
    if text == MAKEFILE:
        targets = re.findall(r"^#   (make [\w-]+)", read(text), re.M)
        return [Command(text, target, inline=True) for target in targets]
    found = [
        Command(text, line, inline=False)
        for block in blocks(text, part)
        if block.language in ("sh", "bash", "console")
        for line in script_lines(block.content)
    ]
    prose = _FENCE.sub("", read(text) if part is None else part)
    spans = filter(None, map(inline_command, _INLINE.findall(prose)))
    return found + [Command(text, span, inline=True) for span in spans]


def all_commands() -> list[Command]:
    """Return the commands of all texts, and of the Makefile's list of targets."""
    return [command for text in (*TEXTS, MAKEFILE) for command in commands(text)]


def all_blocks(*languages: str) -> list[Block]:
    """Return the code blocks in these languages of all texts."""
    return [b for text in TEXTS for b in blocks(text) if b.language in languages]


def normal(line: str) -> str:
    """Return a command without the path to the environment's programs."""
    return re.sub(r"(^|(?<= ))\.venv/bin/(?!activate)", "", line)
