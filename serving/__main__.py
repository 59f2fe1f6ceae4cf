"""attnserve-gateway (or attnserve gateway, python -m serving): run the gateway.

  attnserve-gateway                       one server; the environment variables below set it up
  attnserve-gateway --config FILE         any number of servers; FILE: see docs/GATEWAY.md
  attnserve-gateway --config FILE --check-config      whether FILE is good; runs nothing
  attnserve-gateway keys new NAME         make a client's key; FILE gets only its hash

With --json, the last two print one JSON object and nothing else.

FILE is read again when it changes or on SIGHUP; a bad one is refused and the old one stays. With
--config, the variables are not read. They are:

{settings}
"""

import argparse
import gc
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from pydantic import ValidationError

from serving.app import App
from serving.auth import digest, new_key
from serving.client import Protocol
from serving.config import Config, ConfigError, KeyEntry, Settings, load, one_line
from serving.observability.logging import configure
from serving.state import GatewayState

KEEP_ALIVE_SECONDS = 75
"""How long a client's idle connection is kept: longer than clients do (aiohttp 15 s, a load
balancer 60 s), so that it is they who close it and none sends into one just being closed."""


def help_text() -> str:
    """The module's text with every variable, its default and its meaning."""
    lines = []
    for field in Settings.model_fields.values():
        lines.append(f"  {field.alias}={field.default}\n      {field.description}")
    assert __doc__ is not None
    return __doc__.format(settings="\n".join(lines))


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML (default: none)")
    parser.add_argument("--check-config", action="store_true", help="check the file and exit")
    parser.add_argument("--json", action="store_true", help="--check-config prints one JSON object")
    commands = parser.add_subparsers(dest="command", metavar="keys new NAME")
    keys = commands.add_parser("keys", help="make a client's key")
    new = keys.add_subparsers(required=True, metavar="new").add_parser("new", help="a new one")
    new.add_argument("name", help="whose it is, for metrics and logs")
    new.add_argument(  # without a default, which would win over a --json before `keys`
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
    )
    options = parser.parse_args(arguments)
    if options.check_config and options.config is None:
        parser.error("--check-config needs --config FILE")
    if options.json and not options.check_config and options.command is None:
        parser.error("--json needs --check-config or keys new")
    return options


def print_new_key(name: str, as_json: bool) -> None:
    """A new key, for once, and the entry for the configuration."""
    key = new_key()
    hashed = digest(key)
    try:
        KeyEntry(name=name, sha256=hashed)
    except ValidationError as error:
        sys.exit(f"attnserve-gateway: {one_line(error)}")
    if as_json:
        print(json.dumps({"name": name, "key": key, "sha256": hashed}))
        return
    print(f"The key, which is shown only now: {key}\n\nUnder `keys:` in the configuration:")
    print(f"  - name: {name}\n    sha256: {hashed}")


def print_config(config: Config, path: Path, as_json: bool) -> None:
    """What a good configuration says, in short."""
    if as_json:
        counts = {"models": len(config.models), "keys": len(config.keys)}
        print(json.dumps({"config": str(path), "ok": True, **counts}))
        return
    for model in config.models:
        bits = "" if model.bits is None else f"{model.bits:g} bits"
        print(f"{model.name:24} {model.variant:12} {bits:8} {' '.join(model.replicas)}")
    print(f"{path} is good: models {len(config.models)}, keys {len(config.keys)}")


def read(path: Path | None) -> Config:
    """The configuration; raises ConfigError."""
    if path is not None:
        return load(path)
    try:
        return Settings().config()
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None


def serve(config: Config, path: Path | None) -> None:
    """Run the gateway until SIGINT or SIGTERM, then let what runs finish."""
    configure(config.logging.level)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    app = App(GatewayState(config, path))
    # What is there by now stays: a full collection that looked through it would hold up every
    # stream for some 70 ms.
    gc.collect()
    gc.freeze()
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        http=Protocol,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=config.timeouts.drain,
    )


def main(arguments: Sequence[str] | None = None, prog: str = "attnserve-gateway") -> None:
    """Exit 1 with one line on a configuration that makes no sense."""
    options = parse(sys.argv[1:] if arguments is None else arguments, prog)
    if options.command == "keys":
        print_new_key(options.name, options.json)
        return
    try:
        config = read(options.config)
    except ConfigError as error:
        sys.exit(f"attnserve-gateway: {error}")
    if options.check_config:
        print_config(config, options.config, options.json)
        return
    serve(config, options.config)


if __name__ == "__main__":
    main()
