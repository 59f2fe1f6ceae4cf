"""Show what the start of a server is doing: its phases, with the elapsed time.

On a terminal the present phase is one line that moves; elsewhere each phase is a line of its own.
"""

import time

from rich.console import Console
from rich.status import Status
from rich.text import Text

LINE_SECONDS = 15.0  # where there is no terminal, a phase that lasts is named again after this time


class Progress:
    """Prints phases with the seconds since it was made; to be closed."""

    def __init__(self, console: Console | None = None, *, aside: bool = False) -> None:
        """Print to standard output or to `console`.

        Args:
            console: of rich.
            aside: print to standard error and no line that moves, since the output is of something
                else, or several servers start at once.
        """
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
        text = Text(line, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = self._console.status(text)
            self._live.start()
        self._live.update(text)
