"""Train a small Llama with an attention variant on text files.

The run can be killed at any moment and started again with the same command: it goes on from its
last saved state and ends in the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnserve.evaluation.tokens import Tokens, read_tokens, text_file
from hf_attn import VariantLlamaForCausalLM
from training.data import Batches, fingerprint
from training.memory_loss import memory_share
from training.recipe import Recipe, parse_variant
from training.tokenizer import complete

STATE, LOSSES, MODEL = "state.pt", "loss.csv", "model"
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def loss_function(
    model: VariantLlamaForCausalLM, precision: str, compiled: bool = False, memory: bool = False
) -> Loss:
    """A function of inputs and targets, `[batch, context]` each: the mean cross entropy in nats,
    and `memory_share` or None.

    Args:
        model: a causal language model.
        precision: "fp32", or "bf16" to run matrix products outside attention in bfloat16.
        compiled: compile it, which fuses attention's elementwise operations.
        memory: give the share of memory too; for a stateful variant.
    """

    def loss(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        penalties: list[Tensor] = []
        wanted = {"penalties": penalties} if memory else {}
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=inputs, use_cache=False, **wanted).logits
        share = memory_share(penalties) if memory else None
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten()), share

    return torch.compile(loss, dynamic=False) if compiled else loss


class Run:
    """One training run in a folder: its model, optimizer, step and losses.

    Args:
        folder: holds `state.pt`, `loss.csv` and at the end `model/`; made if absent. If it holds a
            state, the run goes on from it.
        recipe: the settings.
        variant: `{"name": ..., **parameters}`.
        tokenizer: of the text; saved with the model.
        tokens: the text.

    Raises:
        ValueError: the folder holds a run with other settings or other text, or the recipe's
            `memory_loss` is of no use to the variant.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        variant: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        tokens: Tokens,
    ) -> None:
        self.folder, self.recipe, self.tokenizer = folder, recipe, tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.batches = Batches(tokens, recipe.context, recipe.batch, bos, recipe.seed)
        self.identity = {
            **dataclasses.asdict(recipe),
            "variant": variant,
            "text": fingerprint(tokens),
        }
        torch.manual_seed(recipe.seed)
        self.model = VariantLlamaForCausalLM(recipe.config(variant, len(tokenizer), bos, eos))
        if recipe.memory_loss and not self.model.config.variant.stateful:
            raise ValueError(f"{variant['name']} attention masks no tokens: leave out memory_loss")
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.memory: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.folder / STATE, weights_only=True)
        # A state that is older than a setting was made with its default.
        found = dataclasses.asdict(Recipe()) | state["identity"]
        for name, value in self.identity.items():
            if found[name] != value:
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {found[name]}, not "
                    f"{value}: choose another --out or delete it"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.memory = state.get("memory", [])

    def save(self) -> None:
        """Write the state and the losses; a file is either the old or the new one, never half."""
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "memory": self.memory,
        }
        temporary = self.folder / (STATE + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / STATE)
        temporary = self.folder / (LOSSES + ".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            # `memory` only of a run with the memory loss, of which `loss` is no part.
            writer.writerow(["step", "learning_rate", "loss", *["memory"] * bool(self.memory)])
            for step, loss in enumerate(self.losses):
                memory = [f"{share:.5f}" for share in self.memory[step : step + 1]]
                rate = f"{self.recipe.learning_rate_at(step):.6g}"
                writer.writerow([step, rate, f"{loss:.5f}", *memory])
        temporary.replace(self.folder / LOSSES)

    def export(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a Hugging Face folder: configuration, weights in `dtype`, complete tokenizer."""
        copy.deepcopy(self.model).to(dtype).save_pretrained(folder)
        complete(self.tokenizer)
        self.tokenizer.save_pretrained(folder)

    def train(self, save_every: int, compiled: bool = False, quiet: bool = False) -> None:
        """Take the remaining steps.

        Args:
            save_every: steps between saved states.
            compiled: use `torch.compile`.
            quiet: no progress bar.
        """
        memory = self.recipe.memory_loss > 0
        loss_of = loss_function(self.model, self.recipe.precision, compiled, memory)
        progress = tqdm(
            initial=self.step, total=self.recipe.steps, unit="step", disable=quiet, smoothing=0.05
        )
        started = time.monotonic() - self.seconds
        while self.step < self.recipe.steps:
            self._take_step(loss_of)
            self.step += 1
            self.seconds = time.monotonic() - started
            progress.update()
            progress.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.save()
        progress.close()

    def _take_step(self, loss_of: Loss) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step)
        loss, memory = loss_of(*self.batches(self.step))
        objective = loss if memory is None else loss + self.recipe.memory_loss * memory
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if memory is not None:
            self.memory.append(memory.item())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--variant",
        type=parse_variant,
        required=True,
        help='a name, or JSON with parameters: \'{"name": "lssar", "power": 3}\'',
    )
    parser.add_argument("--data", nargs="+", type=text_file, required=True, help="UTF-8 text files")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder written by training.tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--save-every", type=int, default=100, help="steps between states (default: %(default)s)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="use torch.compile: a minute or two to start, then many times faster on CPU",
    )
    Recipe.add_arguments(parser)
    arguments = parser.parse_args(argv)
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        parser.error(f"--tokenizer {arguments.tokenizer} has no tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    recipe = Recipe.from_arguments(arguments)
    try:
        tokens = read_tokens(arguments.data, tokenizer)
        run = Run(arguments.out, recipe, arguments.variant, tokenizer, tokens)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run.train(arguments.save_every, arguments.compile)
    run.export(arguments.out / MODEL)
    last = sum(run.losses[-100:]) / len(run.losses[-100:])
    print(f"{run.step} steps in {run.seconds / 60:.1f} min, mean loss of the last 100: {last:.4f}")
    print(
        json.dumps(
            {
                "model": str(arguments.out / MODEL),
                "steps": run.step,
                "seconds": round(run.seconds, 1),
                "tokens": run.step * recipe.batch * recipe.context,
                "loss_last_100": round(last, 5),
            }
        )
    )


if __name__ == "__main__":
    main()
