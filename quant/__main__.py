"""List the commands of this package."""

from __future__ import annotations

from attnserve.commands import list_commands

COMMANDS = ("quant.sweep", "quant.quantize", "quant.sensitivity", "quant.report")

if __name__ == "__main__":
    list_commands("quant", "What 2 to 8 bits cost each attention variant.", COMMANDS)
