"""A training run of a small Llama: its model, optimizer, losses and folder."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attnserve.evaluation.texts import Tokens
from attnserve.files import write_text
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM
from training.data import Batches, fingerprint
from training.recipe import TrainingRecipe
from training.resumable import Resumable, check_masks, loss_function
from training.tokenizer import complete

LOSSES, MODEL = "loss.csv", "model"


class Run(Resumable):
    """One training run, in a folder that holds `state.pt`, `loss.csv` and at the end `model/`; the
    variant is `{"name": ..., **parameters}`."""

    def __init__(
        self,
        folder: Path,
        recipe: TrainingRecipe,
        variant: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        tokens: Tokens,
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        batches = Batches(tokens, recipe.context, recipe.batch, bos, recipe.seed)
        settings = dataclasses.asdict(recipe)
        identity = {**settings, "variant": variant, "text": fingerprint(tokens)}
        torch.manual_seed(recipe.seed)
        self.model = VariantLlamaForCausalLM(
            VariantLlamaConfig(
                attention_variant=variant,
                vocab_size=len(tokenizer),
                hidden_size=recipe.hidden_size,
                intermediate_size=recipe.intermediate_size,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.kv_heads,
                max_position_embeddings=recipe.context,
                tie_word_embeddings=True,
                bos_token_id=bos,
                eos_token_id=eos,
            )
        )
        if recipe.memory_loss:
            check_masks(self.model.config.variant)
        trained = dict(self.model.named_parameters())
        matrices = [p for p in trained.values() if p.dim() > 1]
        others = [p for p in trained.values() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )
        super().__init__(folder, identity, recipe, batches, trained, optimizer)

    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the loss, and the memory loss with its weight."""
        memory = terms.get("memory")
        return terms["loss"] + (0 if memory is None else self.recipe.memory_loss * memory)

    def save(self) -> None:
        """Write the state, then the losses."""
        super().save()
        rows = pd.DataFrame({"step": range(self.step)})
        rows["learning_rate"] = [f"{self.recipe.learning_rate_at(step):.6g}" for step in rows.step]
        rows["loss"] = [f"{loss:.5f}" for loss in self.losses]
        if memory := self.terms.get("memory"):
            rows["memory"] = [f"{share:.5f}" for share in memory]
        write_text(self.folder / LOSSES, rows.to_csv(index=False))

    def export(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a Hugging Face folder: configuration, weights in `dtype`, complete tokenizer."""
        copy.deepcopy(self.model).to(dtype).save_pretrained(folder)
        complete(self.tokenizer)
        self.tokenizer.save_pretrained(folder)

    def train(self, save_every: int, compiled: bool = False, quiet: bool = False) -> None:
        """Take the remaining steps, with a saved state after every `save_every` of them."""
        memory = self.recipe.memory_loss > 0
        loss_of = loss_function(self.model, self.recipe.precision, memory)
        if compiled:  # which fuses attention's elementwise operations
            loss_of = torch.compile(loss_of, dynamic=False)
        self.take_steps(loss_of, lambda: self.step % save_every == 0, quiet)
