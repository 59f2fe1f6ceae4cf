"""The ways in which the tests run a command of the texts."""

from __future__ import annotations

from dataclasses import dataclass

from tests.docs.text import ROOT

CHECKPOINTS = {
    folder.name: "selective" if folder.name == "selective_prunable" else folder.name
    for folder in sorted((ROOT / "checkpoints").iterdir())
    if (folder / "config.json").exists()
}
"""The bundled checkpoints' folders, and the variant of each."""


@dataclass(frozen=True)
class Run:
    """Run it in the clone and look at the exit code and at what it printed.

    Args:
        command: what is run in its place, with the smallest arguments; empty: as it stands.
        prints: a regular expression that the output must have in it.
        code: the exit code.
        slow: leave it to `make test-slow`.
        long: as it stands it takes minutes, and the text that has it must say so.
    """

    command: str = ""
    prints: str = ""
    code: int = 0
    slow: bool = False
    long: bool = False


@dataclass(frozen=True)
class Serve:
    """Start it, wait until `path` answers, ask what the text asks, and stop it.

    Args:
        command: what is started in its place; `{vllm}` and `{gateway}` are free ports.
        setup: a command that is run before.
        path: of the answer that says that it is ready.
        slow: leave it to `make test-slow`.
    """

    command: str
    setup: str = ""
    path: str = "/v1/models"
    slow: bool = True


@dataclass(frozen=True)
class Asked:
    """Asked of a server that `test_servers.py` starts."""


@dataclass(frozen=True)
class Elsewhere:
    """Run by this other test file, in the way that its setting needs."""

    file: str


@dataclass(frozen=True)
class NotHere:
    """Cannot be run by tests: what is missing."""

    missing: str


@dataclass(frozen=True)
class Printed:
    """Not typed: a line that a program prints."""


Rule = Run | Serve | Asked | Elsewhere | NotHere | Printed


def make_serve(ckpt: str) -> str:
    """Return `make serve` with this checkpoint on free ports."""
    return f"make serve CKPT={ckpt} VLLM_PORT={{vllm}} GATEWAY_PORT={{gateway}}"


def attnserve_serve(ckpt: str) -> str:
    """Return `attnserve serve` of this checkpoint on free ports."""
    return f"attnserve serve {ckpt} --vllm-port {{vllm}} --gateway-port {{gateway}}"
