"""A Hugging Face folder: its configuration, tokenizer and digest."""

import functools
import hashlib
import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

import hf_attn  # noqa: F401  registers the configuration
from attnserve.errors import UserError


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: name a checkpoint's folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers lets anything through that a wrong file causes
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return (str(error) or repr(error)).partition("\n")[0]


class Checkpoint:
    """A Hugging Face folder.

    Args:
        folder: the folder; its name is the checkpoint's.
        context: tokens it was trained with; None: what `config.json` says.
        longest: tokens of a sequence that it reads, if these are fewer; `context` is that then.
    """

    def __init__(
        self, folder: Path, context: int | None = None, longest: int | None = None
    ) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.config = read_config(folder)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} has no tokenizer: {first_line(error)}") from None
        trained: int = context or self.config.max_position_embeddings
        self.longest = longest
        self.context = min(trained, longest or trained)

    @property
    def variant(self) -> str:
        """Name of its attention variant; softmax if it names none."""
        entry = getattr(self.config, "attention_variant", None) or {"name": "softmax"}
        return str(entry["name"])

    @property
    def bos(self) -> int:
        """The id of the token that begins every text: begin-of-text, else end-of-text."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError(
            f"the tokenizer of {self.folder} has no begin-of-text token: set its bos_token"
        )

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @functools.cached_property
    def digest(self) -> str:
        """A hash of configuration, weights and tokenizer."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # how Python finds the model's class, not what it computes
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
        names = ("*.safetensors", "pytorch_model*.bin")
        weights = (file for name in names for file in sorted(self.folder.glob(name)))
        files = [self.folder / "tokenizer.json", *weights]
        return _digest(text.encode(), *(file.read_bytes() for file in files if file.exists()))


def digest(*files: Path) -> str:
    """Return a hash of the contents of files."""
    return _digest(*(file.read_bytes() for file in files))


def _digest(*contents: bytes) -> str:
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()[:16]
