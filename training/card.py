"""The model card of a reference checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from attnserve import machine
from attnserve.evaluation.perplexity import Score, table
from training.run import Run


def memory(run: Run) -> str:
    """Return the lines about the memory loss; empty for a run without it."""
    if not run.memory:
        return ""
    last = run.memory[-100:]
    return f"""\
- The loss that is minimised is that plus {run.recipe.memory_loss:g} times the share of the tokens \
that the layers must keep
  (arXiv 2410.02703; `training/memory_loss.py`): {run.memory[0]:.3f} at the first step, \
{sum(last) / len(last):.3f} over the last {len(last)}.
  So a KV cache can drop more tokens.
"""


def card(name: str, run: Run, scores: Sequence[Score], train_files: Sequence[Path]) -> str:
    """Return the text of `README.md`.

    Args:
        name: the checkpoint's.
        run: a finished run.
        scores: what `attnserve.evaluation.perplexity.evaluate` gives.
        train_files: what it was trained on.
    """
    recipe, variant = run.recipe, run.model.config.variant
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    text, seen = len(run.batches.tokens), recipe.steps * recipe.batch * recipe.context
    first, last = run.losses[0], run.losses[-100:]
    settings = "\n".join(
        f"| {setting.replace('_', ' ')} | {value} |"
        for setting, value in dataclasses.asdict(recipe).items()
    )
    books = ", ".join(f"`{file.name}`" for file in train_files)
    return f"""---
language: en
license: apache-2.0
pipeline_tag: text-generation
library_name: transformers
---
# {name}, {size:.1f}M parameters

A small Llama with {variant.name} attention ({variant.paper}), trained from scratch on
nineteenth-century novels. It is here to serve and test {variant.name} with real, trained weights.
It writes sentences in the manner of those novels and knows nothing; use it for nothing else.

In a checkout of attnserve, after `make install`:

```sh
source .venv/bin/activate
vllm serve checkpoints/{name} --attention-backend {variant.name}
```

```python
import hf_attn  # registers the model class
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("checkpoints/{name}")
tokenizer = AutoTokenizer.from_pretrained("checkpoints/{name}")
```

## Chat

The chat template writes each message as a paragraph, whatever its role, and the model writes the
next ones. It was not trained to answer or to stop: give `max_tokens`, or `"stop": ["\\n\\n"]` for
one paragraph.

## Perplexity

{table(scores)}

Validation is *Emma*, test *Great Expectations*; neither was trained on. Every model predicts the
same tokens. The trained model reads sequences of {recipe.context} tokens that each start anew; the
baselines (add-one unigram, interpolated Kneser-Ney trigram) are counted on the training text.
`attnserve evaluate checkpoints/{name} --whole --ngrams` measures it again, once
`attnserve books` has fetched the novels.

## Training

- {recipe.steps} steps of {recipe.batch} x {recipe.context} tokens: {seen / 1e6:.2f}M tokens, \
{seen / text:.2f} epochs of {text / 1e6:.2f}M.
- Loss {first:.3f} at the first step, {sum(last) / len(last):.3f} over the last {len(last)} \
(`loss.csv`, nats per token).
{memory(run)}\
- {run.seconds / 60:.0f} minutes on a machine shared with other work: {machine.summary()}.
- Text: {books}; all in the public domain.
- Tokenizer: byte-level BPE trained on the same text.
- Weights are stored in bfloat16 and were measured as stored.

Every variant's checkpoint is trained on the same tokens in the same order, from the same seed and
with the same recipe: AdamW, linear warm-up and half a cosine, attention always in float32.

| setting | value |
|---|---|
{settings}

Made by `python -m training.checkpoints {name}`, which takes about an hour and needs the
novels (docs/TRAINING.md).
"""
