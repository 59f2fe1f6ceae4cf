"""What has been measured, in a file that a kill at any moment leaves whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Losses = list[float]
"""Each sequence's mean loss in nats per token."""


class Evaluations:
    """Losses by rule of eviction and budgets, of one checkpoint on one text: one line each.

    Args:
        folder: of the file; its name has a hash of `about`, so that others' are never mixed.
        name: the beginning of the file's name.
        about: what the losses depend on besides.
    """

    def __init__(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        text = json.dumps(about, sort_keys=True)
        self.path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        self._found: dict[tuple[str, tuple[int, ...]], Losses] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # killed while writing the last line
                os.truncate(self.path, len(whole))
            for line in whole.splitlines():
                entry = json.loads(line)
                self._found[entry["rule"], tuple(entry["budgets"])] = entry["losses"]

    def __call__(self, rule: str, budgets: Sequence[int], measure: Callable[[], Losses]) -> Losses:
        """The losses; `measure` is called if they are not there."""
        key = rule, tuple(budgets)
        if key not in self._found:
            losses = measure()
            entry = {"rule": rule, "budgets": list(budgets), "losses": losses}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._found[key] = losses
        return self._found[key]
