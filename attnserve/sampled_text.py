"""Text that a checkpoint writes itself, for calibration and evaluation where no text is at hand.

The text is sampled from the unquantized model's own distribution: temperature 1, nothing cut off,
float32. So the model's perplexity on it is the entropy of its own sampling and says nothing about
how well it models a language; divergence and agreement of a changed model mean what they mean on
any other text. An end-of-text token is kept and the text goes on after it, as training text does.
"""

import hashlib
import json
import sys
import zipfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from attn_kernels.cpu.build import BuildError, cache_folder
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.files import replacing

Use = Literal["calibration", "validation", "evaluation"]
"""The use of a text. Texts of different uses are never the same, whatever their seeds."""
USES: tuple[Use, ...] = get_args(Use)

FORMAT = 1
"""Goes up when a change of the code changes the text, so that an older one is not taken for it."""
BATCH = 32  # sequences that are written at once
SMALL = 20_000_000
"""Parameters below which a token takes so little work that threads wait for each other for most of
the time: ten times as long with two of them, on two cores that others use too."""


def sampled_text(folder: Path, use: Use, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids int64 `[sequences, length]` that a checkpoint writes: each row begins with
    the begin-of-text token.

    The text depends on nothing but the arguments and what the checkpoint computes; between
    machines, rounding may change some tokens. It is kept in the user's cache, in the folder
    `sampled-text` of `$ATTNSERVE_CACHE`, else `~/.cache/attnserve`.

    Args:
        folder: a Hugging Face folder; any variant that `hf_attn` knows, or a plain model.
        use: what the text is for.
        sequences: rows.
        length: tokens of a row, at least 2; the model reads one less.
        seed: any number.
    """
    begin = Checkpoint(folder).bos
    settings = [FORMAT, checkpoint_hash(folder), begin, use, sequences, length, seed]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    try:
        file = cache_folder() / "sampled-text" / f"{name}.npz"
    except BuildError:  # no home folder: the text is written again each time
        return _write_text(folder, begin, sequences, length, name)
    kept = _read(file, (sequences, length))
    if kept is None:
        kept = _write_text(folder, begin, sequences, length, name)
        _keep(file, kept)
    return kept


def checkpoint_hash(folder: Path) -> str:
    """Return a hash of what a model computes with: its configuration and its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("auto_map", "transformers_version"):  # these change nothing
        config.pop(name, None)
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted({*folder.glob("*.safetensors"), *folder.glob("*.bin")}):
        total.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def writers(folders: Sequence[Path], chosen: Path | None = None) -> dict[Path, Path]:
    """Return for each checkpoint the one whose text it reads, so that all checkpoints of one
    tokenizer read the same tokens.

    Of the checkpoints with one tokenizer, the first with softmax attention writes for all; where
    there is none, the first.

    Args:
        folders: checkpoints.
        chosen: writes for all in place of that rule.
    """
    checkpoints = {folder: Checkpoint(folder) for folder in folders}
    alphabets = {folder: alphabet(checkpoint) for folder, checkpoint in checkpoints.items()}
    if chosen is not None:
        wanted = alphabet(Checkpoint(chosen))
        for folder, own in alphabets.items():
            if own != wanted:
                raise UserError(
                    f"{chosen} cannot write text for {folder}, which has another tokenizer: "
                    "name a checkpoint with the same one, or leave it out"
                )
        return dict.fromkeys(folders, chosen)
    found: dict[Hashable, Path] = {}
    for folder in sorted(folders, key=lambda one: checkpoints[one].variant != "softmax"):  # stable
        found.setdefault(alphabets[folder], folder)
    return {folder: found[own] for folder, own in alphabets.items()}


def alphabet(checkpoint: Checkpoint) -> Hashable:
    """Return what tells whether two tokenizers give a token id the same meaning."""
    return checkpoint.bos, frozenset(checkpoint.tokenizer.get_vocab().items())


@torch.inference_mode()
def _write_text(folder: Path, begin: int, sequences: int, length: int, name: str) -> Tensor:
    """Sample the text whose cache entry has a name; every row begins with the token `begin`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(int(name[:15], 16))
    text = torch.full((sequences, length), begin, dtype=torch.long)
    label = f"{folder.resolve().name} writes text"
    before = torch.get_num_threads()
    torch.set_num_threads(1 if model.num_parameters() < SMALL else before)
    with tqdm(total=sequences * (length - 1), desc=label, unit=" tokens", disable=None) as bar:
        for rows in text.split(BATCH):  # views
            cache = DynamicCache(config=model.config)
            for place in range(1, length):
                last = rows[:, place - 1 : place]
                logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits
                shares = logits[:, -1].float().softmax(-1)
                rows[:, place] = shares.multinomial(1, generator=generator)[:, 0]
                bar.update(len(rows))
    torch.set_num_threads(before)
    return text


def _read(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return a cache entry; None if there is none or it is broken (zip files carry checksums)."""
    try:
        with np.load(file) as entry:
            tokens = entry["tokens"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    sound = tokens.shape == shape and tokens.dtype == np.int64
    return torch.from_numpy(tokens) if sound else None


def _keep(file: Path, text: Tensor) -> None:
    """Put a text into the cache, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, tokens=text.numpy())
    except OSError as error:
        print(
            f"the sampled text is not kept, the cache cannot be written ({error}): "
            "set ATTNSERVE_CACHE to a folder that can be written",
            file=sys.stderr,
        )
