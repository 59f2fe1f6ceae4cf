"""List the commands of this package."""

from __future__ import annotations

import sys

from attnserve.commands import command_list

COMMANDS = ("quant.sweep", "quant.quantize", "quant.sensitivity", "quant.report")


def main() -> None:
    """Print the list; arguments are refused, since this is no command itself."""
    print("What 2 to 8 bits cost each attention variant. Commands, each with --help:")
    print(command_list(COMMANDS))
    if sys.argv[1:] not in ([], ["--help"], ["-h"]):
        print(f"python -m quant: {sys.argv[1]!r} is no command: use one of these", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
