"""What a model server says that it runs, beside what the configuration's labels say of it.

attnserve's vLLM plugin publishes one line for it (`plugins/vllm_attn/server_info.py`); a vLLM
without the plugin says nothing. What the server says is believed, a label that says something else
is an error, and a label of which the server says nothing is unconfirmed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from serving.config import ModelEntry

LINE = re.compile(rb"^attnserve:server_info\{(.*)\} ", re.MULTILINE)
VLLM_NAME = re.compile(rb'^vllm:\w+\{[^\n]*?\bmodel_name="((?:[^"\\\n]|\\.)*)"', re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
NUMBERS = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?)*")


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


NOTHING = ServerInfo()
FIELDS = tuple(field.name for field in fields(ServerInfo))
NUMERIC = ("weight_bits", "embedding_bits", "kv_budgets")


def parse_info(page: bytes) -> ServerInfo:
    """Return what a server's /metrics page says; `NOTHING` if it does not, or not clearly.

    The name is also known of a vLLM without the plugin.
    """
    lines = set(LINE.findall(page))
    if len(lines) != 1:
        named = VLLM_NAME.search(page)
        return ServerInfo(unescaped(named[1].decode(errors="replace"))) if named else NOTHING
    said = {k: unescaped(v) for k, v in LABEL.findall(lines.pop().decode(errors="replace"))}
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

    def json(self) -> dict[str, Any]:
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


def describe(entry: ModelEntry, info: ServerInfo) -> Description:
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
    """Return whether a label may stand for what the server says: of several widths, a mean may."""
    if "," not in said:
        return label == said or numbers(label) == numbers(said) != []
    return bool(numbers(label)) and min(numbers(said)) <= numbers(label)[0] <= max(numbers(said))


def together(parts: Sequence[Description]) -> Description:
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
