"""The model card of a reference checkpoint."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from training.evaluate import Score, table
from training.train import Run


def machine() -> str:
    """The processor, its cores and the versions that results depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def card(run: Run, scores: Sequence[Score], train_files: Sequence[Path]) -> str:
    """The text of `README.md`.

    Args:
        run: a finished run.
        scores: what `training.evaluate.evaluate` gives.
        train_files: what it was trained on.
    """
    recipe, variant = run.recipe, run.model.config.variant
    parameters = sum(p.numel() for p in run.model.parameters())
    tokens = recipe.steps * recipe.batch * recipe.context
    tail = run.losses[-100:]
    settings = "\n".join(
        f"| {name.replace('_', ' ')} | {value} |"
        for name, value in dataclasses.asdict(recipe).items()
    )
    books = ", ".join(f"`{file.name}`" for file in train_files)
    return f"""---
language: en
license: apache-2.0
pipeline_tag: text-generation
library_name: transformers
---
# {variant.name}, {parameters / 1e6:.1f}M parameters

A small Llama with {variant.name} attention ({variant.paper}), trained from scratch on nineteenth-century
novels. It is here to serve and test {variant.name} with real, trained weights. It writes
period-flavoured sentences and knows nothing; do not use it for anything else.

```sh
vllm serve checkpoints/{variant.name} --attention-backend {variant.name}
```

```python
import hf_attn  # registers the model class
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("checkpoints/{variant.name}")
tokenizer = AutoTokenizer.from_pretrained("checkpoints/{variant.name}")
```

## Perplexity

{table(scores)}

Validation is *Emma*, test *Great Expectations*; neither was trained on. Every model predicts the
same tokens. The trained model reads sequences of {recipe.context} tokens that each start anew; the baselines
(add-one unigram, interpolated Kneser-Ney trigram) are counted on the training text.

## Training

{recipe.steps} steps of {recipe.batch} x {recipe.context} tokens: {tokens / 1e6:.1f}M tokens, {tokens / len(run.batches.tokens):.2f} epochs of
{len(run.batches.tokens) / 1e6:.2f}M. Loss {run.losses[0]:.3f} at the first step, {sum(tail) / len(tail):.3f} over the last {len(tail)}
(`loss.csv`, nats per token). {run.seconds / 60:.0f} minutes on a shared machine: {machine()}.

Every variant's checkpoint is trained on the same tokens in the same order, from the same seed and
with the same recipe:

| setting | value |
|---|---|
{settings}

AdamW with a cosine schedule and linear warm-up, in the stated precision; attention always in
float32. The weights are stored in bfloat16 and were measured as stored. The tokenizer is a
byte-level BPE trained on the training text.

Text: {books}; all in the public domain.

Made by `python -m training.checkpoints {variant.name}`.
"""
