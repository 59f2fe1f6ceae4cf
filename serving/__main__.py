"""The commands of the gateway: `attnserve-gateway` (`attnserve gateway`, `python -m serving`) and
`attnserve keys`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnserve import command
from attnserve.command import AsJson
from attnserve.errors import UserError

if TYPE_CHECKING:
    from serving.config import Config

keys = command.application("Make keys for clients of the gateway.")


@keys.callback()
def make_group() -> None:
    """Have `new` be a command of a group, though it is the only one."""


def gateway(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML; docs/GATEWAY.md describes it.", show_default=False
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            envvar="GATEWAY_WORKERS",
            help="Processes that share the port; each has connections, queues and circuits of its "
            "own, so a limit of one replica or queue holds for each of them.",
        ),
    ] = 1,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Say whether FILE is good, and run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the gateway alone, in front of servers that run.

    With --config FILE there may be any number of servers. FILE is read again when it changes or on
    SIGHUP; a bad one is refused and the old one stays. --json goes with --check-config.

    Without, there is one server, and these environment variables set the gateway up:

      GATEWAY_HOST=127.0.0.1              The address to listen on.
      GATEWAY_PORT=8080                   The port to listen on.
      GATEWAY_ALLOWED_HOSTS=              Names that clients may call it by, beside localhost.
      UPSTREAM_URL=http://127.0.0.1:8000  The vLLM server; a /v1 at the end is taken off.
      UPSTREAM_CONNECT_SECONDS=5.0        Longest wait for a connection to the server.
      UPSTREAM_READ_SECONDS=600.0         Longest wait for the next byte of an answer.
      UPSTREAM_HEALTH_SECONDS=2.0         Longest wait for the server's own /health.
      GATEWAY_MAX_BODY_BYTES=4194304      Largest request body; larger ones get 413.
      GATEWAY_DRAIN_SECONDS=10            How long running requests may go on after SIGTERM.
    """
    from serving.config_file import from_environment, load
    from serving.run import run

    if check_config and config is None:
        raise UserError("--check-config needs --config FILE")
    if as_json and not check_config:
        raise UserError("--json needs --check-config")
    found = from_environment(os.environ) if config is None else load(config)
    if check_config:
        print_config(found, str(config), as_json)
    else:
        run(found, config, workers)


def print_config(config: Config, path: str, as_json: bool) -> None:
    """Print what a good configuration says, in short."""
    if as_json:
        counts = {"models": len(config.models), "keys": len(config.keys)}
        print(json.dumps({"config": path, "ok": True, **counts}))
        return
    for model in config.models:
        bits = "" if model.bits is None else f"{model.bits:g} bits"
        print(f"{model.name:24} {model.variant:12} {bits:8} {' '.join(model.replicas)}")
    print(f"{path} is good: models {len(config.models)}, keys {len(config.keys)}")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, for metrics and logs.")],
    as_json: AsJson = False,
) -> None:
    """Make a client's key. It is shown once; the configuration gets only its hash."""
    from pydantic import ValidationError

    from serving.auth import digest, new_key
    from serving.config import KeyEntry
    from serving.config_file import one_line

    key = new_key()
    try:
        entry = KeyEntry(name=name, sha256=digest(key))
    except ValidationError as error:
        raise UserError(one_line(error)) from None
    if as_json:
        print(json.dumps({"name": name, "key": key, "sha256": entry.sha256}))
        return
    print(f"The key, which is shown only now: {key}\n\nUnder `keys:` in the configuration:")
    print(f"  - name: {name}\n    sha256: {entry.sha256}")


command.add(keys, "new", new)


def main() -> None:
    """Run `attnserve-gateway [keys new NAME]`."""
    if sys.argv[1:2] == ["keys"]:
        command.run(keys, "attnserve-gateway keys", sys.argv[2:])
    command.main(gateway, "attnserve-gateway")


if __name__ == "__main__":
    main()
