"""The one question that measures ask a model: how likely is this text after that one?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from attnserve.evaluation.tiled import attend_in_tiles, is_pruned
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM
from hf_attn.files import INDEX

BATCH_TOKENS = 2048  # tokens of a batch, padding included; a longer item is a batch of its own


@dataclass(frozen=True)
class Item:
    """Token ids: a prompt (at least one token) and what comes after it (at least one token)."""

    prompt: list[int]
    continuation: list[int]

    @property
    def tokens(self) -> list[int]:
        """Prompt and continuation."""
        return self.prompt + self.continuation


@dataclass(frozen=True)
class Scored:
    """The likelihood of a continuation's tokens, each given all tokens before it."""

    logprobs: NDArray[np.float64]  # `[num_tokens]`, natural logarithms
    greedy: NDArray[np.bool_]  # `[num_tokens]`: no other token is as likely

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return float(self.logprobs.sum())


class Scorer(Protocol):
    """A model that scores items. Computes in float32, whatever the checkpoint's dtype.

    Attributes:
        device: where it computes.
    """

    device: str

    def score(self, items: Sequence[Item], label: str) -> list[Scored]:
        """Score items that are no longer than the scorer's longest, in order; the progress bar
        says `label`."""
        ...

    def close(self) -> None:
        """Give the model's memory and processes back."""
        ...


def rope_parameters(config: PreTrainedConfig, factor: float) -> dict[str, Any]:
    """Return the `rope_parameters` of a configuration with theta times `factor`.

    Raises:
        ValueError: the model has several kinds of RoPE, or none.
    """
    parameters = dict(config.rope_parameters or {})
    if "rope_theta" not in parameters:
        raise ValueError(f"a {config.model_type} has no single rope_theta to multiply")
    return parameters | {"rope_theta": parameters["rope_theta"] * factor}


def load(folder: Path, rope_theta_factor: float = 1.0, **kwargs: Any) -> PreTrainedModel:
    """Return a checkpoint in float32; `kwargs` as `from_pretrained` takes them."""
    config = AutoConfig.from_pretrained(folder)
    if (folder / INDEX).is_file():  # a model.safetensors beside it is of an earlier save
        config.transformers_weights = INDEX
    if rope_theta_factor != 1.0:
        config.rope_parameters = rope_parameters(config, rope_theta_factor)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, **kwargs
    )
    return model.eval()


def load_llama(folder: Path) -> PreTrainedModel:
    """Return a checkpoint in float32.

    A plain Llama is a `VariantLlamaForCausalLM` with softmax, which can attend in tiles; other
    foreign models give their attention maps.
    """
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, VariantLlamaConfig):
        return load(folder)
    if config.model_type != "llama":
        return load(folder, attn_implementation="softmax")
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    softmax = VariantLlamaConfig(**values, attention_variant={"name": "softmax"})
    model: PreTrainedModel = VariantLlamaForCausalLM.from_pretrained(
        folder, config=softmax, dtype=torch.float32
    )
    return model.eval()


class TransformersScorer:
    """One model, in this process.

    Args:
        model: a Hugging Face folder, or a model in float32, which is changed to attend in tiles.
        rope_theta_factor: what a folder's RoPE's theta is multiplied with.
        quiet: no progress bars.
        device: where it computes.
    """

    def __init__(
        self,
        model: Path | PreTrainedModel,
        rope_theta_factor: float = 1.0,
        quiet: bool = False,
        device: str = "cpu",
    ) -> None:
        loaded = load(model, rope_theta_factor) if isinstance(model, Path) else model
        self.model, self.device = loaded.to(device), device
        self.quiet = quiet
        if isinstance(self.model, VariantLlamaForCausalLM) and not is_pruned(self.model):
            attend_in_tiles(self.model)

    @torch.inference_mode()
    def score(self, items: Sequence[Item], label: str) -> list[Scored]:
        found: dict[int, Scored] = {}
        with tqdm(total=len(items), desc=label, unit="text", disable=self.quiet) as bar:
            for batch in _batches(items):
                for index, scored in zip(
                    batch, self._score([items[i] for i in batch]), strict=True
                ):
                    found[index] = scored
                bar.update(len(batch))
        return [found[index] for index in range(len(items))]

    def _score(self, items: Sequence[Item]) -> list[Scored]:
        """Score one batch, padded after the tokens, where no token of a causal model sees it."""
        longest = max(len(item.tokens) for item in items)
        ids = [item.tokens + [0] * (longest - len(item.tokens)) for item in items]
        inputs = torch.tensor(ids, device=self.device)[:, :-1]
        logits = self.model(input_ids=inputs, use_cache=False).logits
        found = []
        for row, item in zip(logits, items, strict=True):
            start = len(item.prompt) - 1
            logprobs = row[start : start + len(item.continuation)].float().log_softmax(-1)
            found.append(self._scored(logprobs, item))
        return found

    def _scored(self, logprobs: Tensor, item: Item) -> Scored:
        """Return the continuation's scores from `[num_tokens, vocab_size]` of its tokens."""
        continuation = torch.tensor(item.continuation, device=logprobs.device)
        own = logprobs.gather(-1, continuation[:, None])
        # In parts: of 16,384 tokens and a large vocabulary the sum alone would take gigabytes.
        parts = zip(logprobs.split(BATCH_TOKENS), own.split(BATCH_TOKENS), strict=True)
        rivals = torch.cat([(each >= right).sum(-1) for each, right in parts])
        return Scored(own[:, 0].double().cpu().numpy(), (rivals == 1).cpu().numpy())

    def close(self) -> None:
        del self.model


def _batches(items: Sequence[Item]) -> Iterator[list[int]]:
    """Yield indices of items of about the same length, longest first."""
    order = sorted(range(len(items)), key=lambda index: -len(items[index].tokens))
    while order:
        size = max(1, BATCH_TOKENS // len(items[order[0]].tokens))
        yield order[:size]
        order = order[size:]
