"""Every command of the texts is run, or says why not; nothing else is in the table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.rules import Elsewhere, NotHere, Run
from tests.docs.table import RULES, is_covered
from tests.docs.text import (
    MAKEFILE,
    ROOT,
    TEXTS,
    all_commands,
    blocks,
    commands,
    normal,
    passages,
    read,
)

ACTIVATE = "source .venv/bin/activate"


def test_every_command_has_a_rule() -> None:
    missing = {c.line: str(c.text) for c in all_commands() if not is_covered(c)}
    assert not missing, f"not in tests/docs/table.py: {missing}"


def test_every_rule_has_a_command() -> None:
    typed = {normal(command.line) for command in all_commands()}
    gone = set(RULES) - typed
    assert not gone, f"no text has these any more: {gone}"


def test_every_run_looks_at_what_is_printed() -> None:
    silent = [line for line, rule in RULES.items() if isinstance(rule, Run) and not rule.prints]
    assert not silent, f"in tests/docs/table.py without `prints`: {silent}"


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_minutes_are_announced(text: Path) -> None:
    """A command that takes minutes is said to: in its block, its sentence, or just before it."""
    announced: dict[str, bool] = {}
    for passage, before in passages(text):
        said = bool(re.search(r"(?<!-m )\bslow\b|\bminutes?\b|\bhours?\b", f"{before} {passage}"))
        for line in {normal(command.line) for command in commands(text, passage)}:
            if isinstance(rule := RULES.get(line), Run) and rule.long:
                announced[line] = announced.get(line, False) or said
    silent = [line for line, said in announced.items() if not said]
    assert not silent, f"{text} does not say that these take minutes: {silent}"


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_bare_programs_are_found(text: Path) -> None:
    """Whoever is told to type `python` or `vllm` is told to activate the environment before."""
    content = read(text)
    bare = [
        line
        for block in blocks(text)
        if block.language == "sh"
        for line in block.content.splitlines()
        if re.match(r"(\w+=\S+ )*(python|vllm|attnserve|attnserve-gateway|pip|pytest) ", line)
    ]
    if bare:
        said = re.search(rf"^ *{ACTIVATE}", content, re.M)
        typed = re.search(rf"^ *{re.escape(bare[0])}", content, re.M)
        told = said and typed and said.start() < typed.start()
        assert told, f"{text} does not say `{ACTIVATE}` before {bare[0]!r}"


@pytest.mark.parametrize("command", [x for x, r in RULES.items() if isinstance(r, NotHere)])
def test_what_cannot_be_run_names_what_is_there(command: str) -> None:
    for word in shlex.split(command):
        if "/" in word.strip("/") and word[0] != "/" and (ROOT / word.split("/")[0]).is_dir():
            assert (ROOT / word).exists(), f"{command}: there is no {word}"


def test_other_test_files_are_there() -> None:
    for command, rule in RULES.items():
        if isinstance(rule, Elsewhere):
            assert (ROOT / rule.file).exists(), f"{command}: {rule.file} is gone"


def test_the_makefile_lists_its_targets() -> None:
    listed = {command.line.split()[1] for command in commands(MAKEFILE)}
    (phony,) = re.findall(r"^\.PHONY: (.*)$", read(MAKEFILE), re.M)
    assert listed == set(phony.split())
    assert listed <= set(re.findall(r"^([a-z][\w-]*):", read(MAKEFILE), re.M))
