"""The vLLM versions this plugin was tried on."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

TRIED = ("0.32", "0.33")
"""First and last minor version. 0.32 is tested; 0.33 was read: its methods are the same."""


def warn_if_untried() -> None:
    """Say so, once, when vLLM is outside the tried range."""
    installed = version("vllm")
    minor = ".".join(installed.split(".")[:2])
    if not Version(TRIED[0]) <= Version(minor) <= Version(TRIED[1]):
        logger.warning(
            "attnserve was tried on vLLM %s to %s, not on %s: if start-up fails below, install "
            "one of those",
            *TRIED,
            installed,
        )
