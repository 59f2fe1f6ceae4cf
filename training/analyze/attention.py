"""Attention maps and hidden states: sinks, outliers, exact zeros, dead heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import mean_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.scorers import Scorer, load_llama
from attnserve.evaluation.texts import read_tokens, spread
from attnserve.evaluation.tiled import attend_in_tiles, is_pruned
from hf_attn import VariantLlamaForCausalLM

SINK_EPS = (0.2, 0.3)
QUIET = 0.01
"""A head is quiet at a token if its output is shorter than this share of the layer's median."""
DEAD = 0.99
"""A head is dead if it is quiet at this share of all tokens or more."""

Figures = dict[str, list[NDArray[np.float64]]]


@dataclass(frozen=True)
class Attention(Measure):
    """Figures of the attention maps and hidden states on sequences of the test text.

    - Sink rate (arXiv 2410.10781, 2504.20966): share of (layer, head) whose attention map's first
      column has a mean above eps; of each sequence, then averaged. The first token is the
      begin-of-text token.
    - Kurtosis (not excess: 3 for a normal distribution), largest |x| and largest over median |x| of
      the hidden states: the embeddings and what each layer leaves in the residual stream; of each
      sequence and layer over all tokens and channels, then averaged.
    - Zeros: share of exact zeros among the weights of keys that the query sees.
    - Dead heads: share of heads whose output (before the output projection) is shorter than 1 % of
      the median length in its layer at 99 % of all tokens or more. Silent: share of (layer, head,
      token) whose output is exactly 0.

    Args:
        sequences: of the training length, at even distances in the book.
    """

    name: ClassVar[str] = "attention"
    counts: ClassVar[tuple[str, ...]] = ("sequences",)
    needs_scores: ClassVar[bool] = False

    sequences: int = 32

    def files(self, data: Data) -> list[Path]:
        return [data.test]

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        tokens = read_tokens(self.files(data), checkpoint.tokenizer)[:-1]
        fitting = len(tokens) // checkpoint.context
        if fitting < 2:
            raise ValueError(
                f"{data.test.name} has {len(tokens)} tokens, too few for two sequences of "
                f"{checkpoint.context}: lower --context, or give more text"
            )
        model = load_llama(checkpoint.folder).to(scorer.device)
        chosen = spread(self.sequences, fitting)
        found: Figures = defaultdict(list)
        with torch.inference_mode(), watched(model) as figures:
            for index in tqdm(chosen, desc=self.name, unit="sequence"):
                start = index * checkpoint.context
                text = tokens[start : start + checkpoint.context - 1].tolist()
                figures.clear()
                ids = torch.tensor([[checkpoint.bos, *text]], device=scorer.device)
                model(input_ids=ids, use_cache=False)
                for name, layers in figures.items():
                    found[name].append(np.stack(layers))
        return summarise({name: np.stack(rows) for name, rows in found.items()})


def summarise(f: dict[str, NDArray[np.float64]]) -> Result:
    """Summarise the figures of all sequences: `first_column`, `zeros`, `quiet` and `silent`
    `[sequences, layers, heads]`, `kurtosis`, `largest` and `median` `[sequences, layers + 1]`."""
    shares = {f"sink rate at {eps}": (f["first_column"] > eps).mean((1, 2)) for eps in SINK_EPS}
    shares |= {name: f[name].mean((1, 2)) for name in ("zeros", "silent")}
    # Single sequences are short of a head's quiet tokens: only all of them tell a dead head.
    dead = f["quiet"].mean(0) >= DEAD
    ratio = f["largest"] / np.maximum(f["median"], np.finfo(np.float64).tiny)
    figures = {
        "kurtosis": f["kurtosis"].mean(1),
        "kurtosis, largest of the layers": f["kurtosis"].max(1),
        "largest |x|": f["largest"].max(1),
        "largest over median |x|": ratio.max(1),
    }
    summary = {name: mean_interval(values) for name, values in figures.items()}
    summary |= {name: mean_interval(values).within(0.0, 1.0) for name, values in shares.items()}
    units: dict[str, Any] = {
        "dead_heads": int(dead.sum()),
        "heads": int(dead.size),
        "sequence_kurtosis": f["kurtosis"].mean(1).round(4).tolist(),
        "sequence_largest": f["largest"].max(1).round(4).tolist(),
        "sequence_zeros": f["zeros"].mean((1, 2)).round(5).tolist(),
        "layer_kurtosis": f["kurtosis"].mean(0).round(4).tolist(),
        "layer_largest": f["largest"].mean(0).round(4).tolist(),
    }
    for name in ("first_column", "zeros", "quiet", "silent"):
        units[f"head_{name}"] = f[name].mean(0).round(5).tolist()
    for eps in SINK_EPS:
        rates = shares[f"sink rate at {eps}"]
        units[f"sequence_sink_rate_{eps}"] = rates.round(5).tolist()
    return Result(summary, units)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Figures]:
    """Collect a forward pass's figures, layer by layer: no map outlives its layer, and that of a
    Llama is never there as a whole, but in tiles of a few queries."""
    window = getattr(model.config, "sliding_window", None)
    figures: Figures = defaultdict(list)
    sums: dict[str, list[Tensor]] = defaultdict(list)

    def see(window: int | None, weights: Tensor) -> None:
        rows, keys = weights.shape[-2:]
        ends = torch.arange(keys - rows, keys, device=weights.device) + 1
        seen = ends.clamp(max=window or keys).sum()  # keys, of all queries
        sums["first_column"].append(weights[0, ..., 0].double().sum(-1))
        sums["zeros"].append((weights[0] == 0).sum((1, 2)).double() - (rows * keys - seen))
        sums["seen"].append(seen)

    def maps(module: Any, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is not None:
            see(getattr(module, "sliding_window", window), output[1])
        totals = {name: torch.stack(tiles).sum(0) for name, tiles in sums.items()}
        sums.clear()
        for name, count in (("first_column", output[0].shape[1]), ("zeros", totals["seen"])):
            figures[name].append((totals[name] / count).cpu().numpy())

    def heads(module: Any, args: tuple[Tensor]) -> None:
        outputs = args[0][0].unflatten(-1, (model.config.num_attention_heads, -1))
        lengths = outputs.norm(dim=-1)
        quiet = lengths < QUIET * lengths.median()
        figures["quiet"].append(quiet.double().mean(0).cpu().numpy())
        figures["silent"].append((lengths == 0).double().mean(0).cpu().numpy())

    def states(module: Any, args: Any, output: Tensor) -> None:
        x = output[0].double()
        centred = x - x.mean()
        kurtosis = centred.pow(4).mean() / centred.pow(2).mean().pow(2)
        figures["kurtosis"].append(kurtosis.cpu().numpy())
        figures["largest"].append(x.abs().max().cpu().numpy())
        figures["median"].append(x.abs().median().cpu().numpy())

    if isinstance(model, VariantLlamaForCausalLM) and not is_pruned(model):
        attend_in_tiles(model, partial(see, window))

    with ExitStack() as stack:
        hooks = [model.model.embed_tokens.register_forward_hook(states)]
        for layer in model.model.layers:
            hooks.append(layer.self_attn.register_forward_hook(maps))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(heads))
            hooks.append(layer.register_forward_hook(states))
        for hook in hooks:
            stack.callback(hook.remove)
        yield figures
