"""A configuration of the gateway, read from a YAML file or from environment variables."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serving.config import EVERY, Config, ConfigError


def signature(path: Path | None) -> tuple[int, ...] | None:
    """Return what changes when a file does; None if it is not there."""
    if path is None:
        return None
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def load(path: Path) -> Config:
    """Return the configuration in a file.

    Raises:
        ConfigError: with the file and what is wrong in it, in one line.
    """
    found = signature(path)
    try:
        data = yaml.load(path.read_bytes(), StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {without_quotes(error.problem or '')}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {without_quotes(' '.join(str(error).split()))}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must have `models:` at its top; docs/GATEWAY.md has an example")
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
    config._signature = found
    return config


class StrictLoader(yaml.SafeLoader):
    """YAML in which a name that stands twice in one place is an error, not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return one mapping."""
        names = []
        for key, _ in node.value:
            if key.value in names:
                problem = f"{setting_name(key.value)} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)


def one_line(error: ValidationError, variables: Mapping[str, str] | None = None) -> str:
    """Return a validation error in one line: each name, and what is wrong with it.

    What was given is only shown of numbers that are out of range: any other value may be a secret
    that stands in the wrong place. `variables` has the environment variables that some names come
    from.
    """
    lines = []
    errors = error.errors()
    places = [e["loc"] for e in errors]
    for e in errors:
        if e["type"] == "too_short" and any(
            len(p) > len(e["loc"]) and p[: len(e["loc"])] == e["loc"] for p in places
        ):
            continue  # only because what is wrong inside does not count
        name = ".".join(map(setting_name, e["loc"]))
        whole = name.rpartition(".")[0]  # a list is one variable
        name = (variables or {}).get(name) or (variables or {}).get(whole, name)
        value = f"={e['input']}" if e["type"].startswith(("greater_", "less_")) else ""
        message = MESSAGES.get(e["type"], e["msg"].removeprefix("Value error, "))
        lines.append(f"{name}{value}: {message}".lstrip(": "))
    return re.sub(r"\s+", " ", "; ".join(lines))


MESSAGES = {
    "extra_forbidden": "there is no such setting here",
    "missing": "is missing",
    "tuple_type": "must be a list, each item behind a dash or all of them in brackets",
    "too_short": "must not be empty",
    "model_type": "must be settings, each with its name",
}
"""What pydantic says in Python's words, by its names for errors."""


def setting_name(name: Any) -> str:
    """Return what can be a setting's name as it is, and anything else, which may be a secret,
    masked."""
    return str(name) if re.fullmatch(r"[a-z_]{1,32}|sha256|\d{1,6}", str(name)) else "***"


def without_quotes(message: str) -> str:
    """Return an error of YAML's with what it quotes from the file masked, as it may be secret."""
    return re.sub(r"(['\"])[^<].+?\1", r"\1***\1", message)


ENVIRONMENT = {
    "GATEWAY_HOST": "host",
    "GATEWAY_PORT": "port",
    "GATEWAY_ALLOWED_HOSTS": "allowed_hosts",
    "UPSTREAM_URL": "models.0.replicas.0",
    "UPSTREAM_CONNECT_SECONDS": "timeouts.connect",
    "UPSTREAM_SILENCE_SECONDS": "timeouts.read",
    "UPSTREAM_READ_SECONDS": "timeouts.read",
    "UPSTREAM_HEALTH_SECONDS": "health.timeout",
    "GATEWAY_MAX_BODY_BYTES": "limits.max_body_bytes",
    "GATEWAY_DRAIN_SECONDS": "timeouts.drain",
}
"""The variables that set up a gateway without a file, and what each of them sets.
UPSTREAM_SILENCE_SECONDS is a former name."""


def from_environment(environment: Mapping[str, str]) -> Config:
    """Return the configuration of one vLLM server, which serves every model.

    Raises:
        ConfigError: with the variable and what is wrong with it, in one line.
    """
    url = environment.get("UPSTREAM_URL", "http://127.0.0.1:8000")
    data: dict[str, Any] = {
        "models": [{"name": EVERY, "replicas": [url]}],
        "timeouts": {"drain": 10},
    }
    for variable, place in ENVIRONMENT.items():
        section, _, field = place.rpartition(".")
        if variable in environment and variable != "UPSTREAM_URL":
            value = environment[variable]
            part = data.setdefault(section, {}) if section else data
            part[field] = re.findall(r"[^\s,]+", value) if field == "allowed_hosts" else value
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        variables = {place: variable for variable, place in ENVIRONMENT.items()}
        raise ConfigError(one_line(error, variables)) from None
