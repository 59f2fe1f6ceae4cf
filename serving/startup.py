"""What a start is doing, for people: phases recognised in vLLM's log, shown with elapsed time.

On a terminal the present phase is one line that moves; elsewhere each phase is a line of its own.
Lines of the log itself are not shown, with one exception: what attnserve's own plugin says of the
checkpoint, or warns of.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

IMPORTING = "importing Python packages"
"""What a server does before it logs anything, for some 10 seconds."""

PHASES = (
    (r"^non-default args: ", "reading the checkpoint's configuration"),
    (r"^Using max model len", "starting the engine"),
    (r"^Initializing a V1 LLM engine", "starting the worker"),
    (r"^Starting to load model", "building the model"),
    (r"^Compiling the .* kernels", "compiling CPU kernels, once on this machine"),
    (r"^Initializing model took|^Loading safetensors", "loading the weights"),
    (r"Dynamo bytecode transform|^Compiling a graph", "compiling the model"),
    (r"^Available KV cache memory|KV cache layout|KV cache size: ", "reserving the KV cache"),
    (r"^Capturing CUDA graphs", "capturing CUDA graphs"),
    (r"^JIT kernel warmup starting|^init engine ", "warming up"),
    (r"^Supported tasks: ", "starting the API server"),
)
"""How vLLM 0.32's log says that a phase begins, and what it is."""

NOTES = re.compile(
    r"^attnserve(:| was tried)|attention, as the checkpoint's config|^Packed weights of|"
    r"^Pruned to kv_budgets|was trained with \w+ attention; serving|^prefix caching is off"
)
"""What attnserve's plugin logs and a user should read."""

LINE_SECONDS = 15.0
"""Where there is no terminal, a phase that lasts is named again after this time."""


def phase(lines: list[str]) -> str:
    """Return what a server is doing, by the lines of its log without their prefixes."""
    for line in reversed(lines):
        for pattern, text in PHASES:
            if re.search(pattern, line):
                return text
    return IMPORTING


def notes(lines: list[str]) -> list[str]:
    """Return the lines that a user should read, each once."""
    return list(dict.fromkeys(line for line in lines if NOTES.search(line)))


class Progress:
    """Prints phases with the seconds since it was made; to be closed."""

    def __init__(self, console: Console | None = None, *, aside: bool = False) -> None:
        """Print to standard output or to `console`.

        Args:
            console: of rich.
            aside: print to standard error and no line that moves, since the output is of something
                else, or several servers start at once.
        """
        from rich.console import Console  # `attnserve doctor` imports this module without it

        self._console = console or Console(
            stderr=aside, highlight=False, markup=False, soft_wrap=True
        )
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._moves = terminal and not aside
        self._began = self._said = time.monotonic()
        self._phase = self._stamp = ""
        self._notes: list[str] = []
        self._live: Status | None = None

    def say(self, text: str) -> None:
        """Print a line with the elapsed time."""
        self._print(f"{self._elapsed()} {text}")

    def now(self, text: str) -> None:
        """Name what is going on; may be called as often as one likes."""
        if text != self._phase:
            self.close()
            self._phase, self._stamp, self._said = text, self._elapsed(), time.monotonic()
            if not self._moves:
                self._print(f"{self._stamp} {text}")
        elif not self._moves and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self.say(f"{text} ...")
        if self._moves:
            self._show(f"{self._elapsed()} {text}")

    def note(self, text: str) -> None:
        """Print a line below a phase, once."""
        if text not in self._notes:
            self._notes.append(text)
            self._print(f"{'':9}{text}")

    def close(self) -> None:
        """End the present phase: on a terminal its line stays, with the time at which it began."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._print(f"{self._stamp} {self._phase}")
        self._phase = ""

    def _elapsed(self) -> str:
        return f"[{time.monotonic() - self._began:4.0f} s]"

    def _print(self, line: str) -> None:
        self._console.print(line)

    def _show(self, line: str) -> None:
        from rich.text import Text

        text = Text(line, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = self._console.status(text)
            self._live.start()
        self._live.update(text)
