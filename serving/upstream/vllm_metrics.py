"""What a vLLM server says in its /metrics: what it runs, how busy it is, how large its KV cache is.

attnserve's vLLM plugin publishes one line for what runs (`plugins/vllm_attn/server_info.py`); a
vLLM without the plugin says nothing. What the server says is believed, a label of the configuration
that says something else is an error, and a label of which the server says nothing is unconfirmed.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from serving.config import ModelEntry
from serving.openai.errors import UNEXPECTED

SERVER_INFO = re.compile(rb"^attnserve:server_info\{(.*)\} ", re.MULTILINE)
VLLM_NAME = re.compile(rb'^vllm:\w+\{[^\n]*?\bmodel_name="((?:[^"\\\n]|\\.)*)"', re.MULTILINE)
GAUGES = re.compile(
    rb"^vllm:(kv_cache_usage_perc|num_requests_waiting|num_requests_running)(?:\{[^}\n]*\})? (\S+)",
    re.MULTILINE,
)
CACHE_CONFIG = re.compile(rb"^vllm:cache_config_info\{([^}\n]*)\}", re.MULTILINE)
CACHE_NUMBER = re.compile(rb'(\w+)="(\d{1,18}(?:\.\d{1,18})?)"')
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
NUMBERS = re.compile(r"\d{1,9}(\.\d{1,9})?(,\d{1,9}(\.\d{1,9})?)*")

MAX_NAMES = 1000
"""Most names of models that are taken from a server."""

MAX_NAME = 256
"""Longest name, or other text, that is taken from a server, in characters."""


class LoadGauges(NamedTuple):
    """How busy a server is, over all its engines; None is what it does not say."""

    kv_usage: float | None
    """Part of the KV cache in use, of the engine whose is fullest."""
    waiting: float | None
    running: float | None


def load_gauges(page: bytes) -> LoadGauges:
    """Return vLLM's own gauges; a value that cannot be one (NaN, -1) is left out."""
    found: dict[bytes, list[float]] = {}
    for name, text in GAUGES.findall(page):
        with contextlib.suppress(ValueError):
            value = float(text)
            if 0 <= value <= (1 if name == b"kv_cache_usage_perc" else 10**9):
                found.setdefault(name, []).append(value)
    waiting, running = found.get(b"num_requests_waiting"), found.get(b"num_requests_running")
    return LoadGauges(
        max(found.get(b"kv_cache_usage_perc", ()), default=None),
        sum(waiting) if waiting else None,
        sum(running) if running else None,
    )


def kv_cache_sizes(page: bytes) -> dict[str, Any]:
    """Return the size of the KV cache in bytes and in tokens, and the bytes that a token and the
    longest request take; None is what the server (a worker of it, where several share a model) does
    not say."""
    found = CACHE_CONFIG.search(page)
    said = {k: float(v) for k, v in CACHE_NUMBER.findall(found[1])} if found else {}
    size = said.get(b"kv_cache_memory_bytes")
    tokens = said.get(b"kv_cache_size_tokens")
    requests = said.get(b"kv_cache_max_concurrency")
    return {
        "bytes_per_token": size / tokens if size and tokens else None,
        "bytes_per_request": size / requests if size and requests else None,
        "cache_bytes": None if size is None else int(size),
        "cache_tokens": None if tokens is None else int(tokens),
    }


def context_lengths(listed: bytes) -> dict[str, int] | None:
    """Return the names in an answer of /v1/models with the lengths of their contexts in tokens, 0
    where one is not known; None if it is no such list."""
    try:
        found = {}
        for entry in json.loads(listed)["data"][:MAX_NAMES]:
            name, length = entry["id"], entry.get("max_model_len")
            if len(name) <= MAX_NAME and name.encode():
                found[name] = length if type(length) is int and 0 < length < 2**31 else 0
        return found
    except UNEXPECTED:
        return None


@dataclass(frozen=True)
class ServerInfo:
    """What one server runs; an empty field is not known. Several numbers are joined by commas."""

    model_name: str = ""
    variant: str = ""
    weight_bits: str = ""
    embedding_bits: str = ""
    weight_method: str = ""
    kv_cache_dtype: str = ""
    kv_budgets: str = ""


UNKNOWN = ServerInfo()
FIELDS = tuple(field.name for field in fields(ServerInfo))
NUMERIC = ("weight_bits", "embedding_bits", "kv_budgets")


def parse_info(page: bytes) -> ServerInfo:
    """Return what a server's /metrics page says; `UNKNOWN` if it does not, or not clearly.

    The name is also known of a vLLM without the plugin.
    """
    lines = set(SERVER_INFO.findall(page))
    if len(lines) != 1:
        named = VLLM_NAME.search(page)
        name = unescaped(named[1].decode(errors="replace")) if named else ""
        return ServerInfo(name) if len(name) <= MAX_NAME else UNKNOWN
    labels = LABEL.findall(lines.pop().decode(errors="replace"))
    said = {k: unescaped(v) for k, v in labels if len(v) <= MAX_NAME}
    for name in NUMERIC:
        if not NUMBERS.fullmatch(said.get(name, "")):
            said[name] = ""
    return ServerInfo(**{name: said.get(name, "") for name in FIELDS})


def unescaped(value: str) -> str:
    """Return a label's value as it was before Prometheus' text format."""
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value)


@dataclass(frozen=True)
class Description:
    """What is known of a server, or of all servers of a model.

    Attributes:
        variant: the attention variant, "" if nobody says.
        bits: of a weight, like "4", "2,4" or "".
        info: what the server says.
        unconfirmed: which of variant and bits only the configuration says.
        errors: labels that say something else than the server.
    """

    variant: str
    bits: str
    info: ServerInfo
    unconfirmed: tuple[str, ...]
    errors: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the fields for an answer of the gateway's; None is what is not known."""
        return {
            "variant": self.variant,
            "bits": one_or_all(numbers(self.bits)),
            "embedding_bits": one_or_all(numbers(self.info.embedding_bits)),
            "weight_method": self.info.weight_method or None,
            "kv_cache_dtype": self.info.kv_cache_dtype or None,
            "kv_budgets": numbers(self.info.kv_budgets) or None,
            "unconfirmed": list(self.unconfirmed),
            "errors": list(self.errors),
        }


def describe_server(entry: ModelEntry, info: ServerInfo) -> Description:
    """Return what is known of one server of a model of the configuration."""
    label = "" if entry.bits is None else f"{entry.bits:g}"
    pairs = {"variant": (entry.variant, info.variant), "bits": (label, info.weight_bits)}
    return Description(
        variant=info.variant or entry.variant,
        bits=info.weight_bits or label,
        info=info,
        unconfirmed=tuple(n for n, (labelled, said) in pairs.items() if labelled and not said),
        errors=tuple(
            f"the label says {name} {labelled}, the server {said}"
            for name, (labelled, said) in pairs.items()
            if labelled and said and not agrees(labelled, said)
        ),
    )


def agrees(label: str, said: str) -> bool:
    """Return whether a label may stand for what the server says: of mixed bits, a mean may."""
    if "," not in said:
        return label == said or numbers(label) == numbers(said) != []
    return bool(numbers(label)) and min(numbers(said)) <= numbers(label)[0] <= max(numbers(said))


def describe_model(parts: Sequence[Description]) -> Description:
    """Return what is known of a model by its servers; that they differ is an error."""
    said = {name: distinct(getattr(p.info, name) for p in parts) for name in FIELDS}
    differ = tuple(
        f"the servers differ in {name}: {' and '.join(values)}"
        for name, values in said.items()
        if len(values) > 1 and name != "model_name"  # of several names the first
    )
    return Description(
        variant=",".join(distinct(p.variant for p in parts)),
        bits=",".join(distinct(p.bits for p in parts)),
        info=ServerInfo(**{n: values[0] for n, values in said.items() if len(values) == 1}),
        unconfirmed=tuple(distinct(n for p in parts for n in p.unconfirmed)),
        errors=(*distinct(e for p in parts for e in p.errors), *differ),
    )


def distinct(values: Iterable[str]) -> list[str]:
    """Return each value once, in order, without empty ones."""
    return [value for value in dict.fromkeys(values) if value]


def numbers(text: str) -> list[float]:
    """Return the numbers of a field, whole ones as int."""
    if not NUMBERS.fullmatch(text):
        return []
    return [int(n) if n.isdigit() else float(n) for n in text.split(",")]


def one_or_all(values: list[float]) -> float | list[float] | None:
    """Return a single number as itself."""
    return values[0] if len(values) == 1 else values or None
