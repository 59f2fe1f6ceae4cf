"""What a measure is, and what it measures: a checkpoint, beside the texts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

import hf_attn  # noqa: F401  registers the configuration
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.scorer import Scorer

SETS = "lambada_test.jsonl, blimp/*.jsonl, wikitext2_test_raw.txt"
"""What a folder of evaluation sets holds."""


@dataclass(frozen=True)
class Data:
    """Folders of text.

    Attributes:
        books: what `attnserve.evaluation.books.split` splits; None: the fetched novels.
        evaluation: the sets that `SETS` names; None: there are none.
    """

    books: Path | None = None
    evaluation: Path | None = None

    @property
    def sets(self) -> Path:
        """The folder of the evaluation sets.

        Raises:
            FileNotFoundError: none is named.
        """
        if self.evaluation is None:
            raise FileNotFoundError(
                f"name the folder of the evaluation sets ({SETS}) with --eval, or leave out what "
                "needs them"
            )
        return self.evaluation


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint.

    Raises:
        ValueError: the folder holds none, or one that transformers cannot read; in one line.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: name a checkpoint's folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers lets anything through that a wrong file causes
        raise ValueError(f"{folder} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error) or repr(error)).partition("\n")[0]


class Checkpoint:
    """A Hugging Face folder.

    Args:
        folder: the folder; its name is the checkpoint's.
        context: tokens it was trained with; None: what `config.json` says.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, folder: Path, context: int | None = None) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.config = read_config(folder)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} has no tokenizer: {first_line(error)}") from None
        self.context: int = context or self.config.max_position_embeddings

    @property
    def variant(self) -> str:
        """Its attention function's name; softmax if it names none."""
        entry = getattr(self.config, "attention_variant", None) or {"name": "softmax"}
        return str(entry["name"])

    @property
    def bos(self) -> int:
        """The token that starts every text."""
        first = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if first is None else first)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @functools.cached_property
    def digest(self) -> str:
        """A hash of configuration, weights and tokenizer."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # how Python finds the model's class, not what it computes
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
        files = [self.folder / "tokenizer.json", *sorted(self.folder.glob("*.safetensors"))]
        return _digest(text.encode(), *(file.read_bytes() for file in files if file.exists()))


def digest(*files: Path) -> str:
    """A hash of the contents of files."""
    return _digest(*(file.read_bytes() for file in files))


def _digest(*contents: bytes) -> str:
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What a measure gives."""

    summary: dict[str, Estimate]
    """Figures for the table."""
    units: dict[str, Any]
    """What was measured on each text, for comparisons in pairs: lists and numbers."""


@dataclass(frozen=True)
class Measure(ABC):
    """One thing to measure. The fields of a subclass are its settings; a result is good for the
    settings, texts and checkpoint that it was measured with.

    Class attributes:
        name: of the measure, and of its results' files.
        title: one line for people.
        counts: the settings that are sample sizes, which `--limit` caps.
        needs_scores: it asks a `Scorer`, so that every engine can do it; else it reads a
            transformers model's inside.
        uses_length: it takes the model beyond its training length, so that RoPE's theta matters.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    counts: ClassVar[tuple[str, ...]]
    needs_scores: ClassVar[bool] = True
    uses_length: ClassVar[bool] = False

    @abstractmethod
    def files(self, data: Data) -> list[Path]:
        """The texts it reads."""

    @abstractmethod
    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        """Measure.

        Raises:
            ValueError: the texts are too short for the settings.
        """

    def longest(self, checkpoint: Checkpoint) -> int:
        """Tokens of its longest item, the begin-of-text token included."""
        return checkpoint.context + 1

    def limited(self, limit: int | None) -> Self:
        """The same with every sample size at most `limit`."""
        if limit is None:
            return self
        smaller: dict[str, Any] = {name: min(limit, getattr(self, name)) for name in self.counts}
        return dataclasses.replace(self, **smaller)
