"""Training steps that can be interrupted at any moment and go on from the last saved state."""

from __future__ import annotations

import ctypes
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attn_kernels import Variant
from attnserve.errors import UserError
from attnserve.files import replacing
from hf_attn import VariantLlamaForCausalLM
from training.data import Batches
from training.recipe import FineTuning, TrainingRecipe

STATE = "state.pt"
Loss = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""A function of inputs and targets that gives the terms of what is minimised, by name."""


FULLY_MASKED = 1.0
"""The penalty from which on a token counts as gone: the paper's tau."""


def memory_share(penalties: Sequence[Tensor]) -> Tensor:
    """Return the share of the tokens that the layers must keep: 1 if none ever masks another. As a
    loss term it makes context pruning cheap (selective attention, arXiv 2410.02703).

    `sum over layers l of max over i of M_i^l / (L n)`, `M_i^l = i - sum over k of min(F_ik^l, 1)`:
    a token that the penalty F has half masked counts as half a token, and a layer needs as much
    memory as at its worst moment. The mean over the sequences of a batch.

    Args:
        penalties: what each layer subtracts from its scores, `[batch, num_tokens, num_tokens]`
            each, for sequences without padding.
    """
    needed = []
    for penalty in penalties:
        seen = torch.arange(1, penalty.shape[-1] + 1, device=penalty.device)
        kept = seen - penalty.clamp(max=FULLY_MASKED).sum(-1)
        needed.append(kept.amax(-1) / penalty.shape[-1])
    return torch.stack(needed).mean()


def check_masks(variant: Variant) -> None:
    """Refuse a memory loss for a variant whose tokens do not mask others."""
    if not variant.stateful:
        raise UserError(f"{variant.name} attention masks no tokens: leave out --memory-loss")


LOGITS = 2**28
"""Logits that are in memory at once: 1 GiB in float32, of which a loss holds a few."""


def loss_function(
    model: VariantLlamaForCausalLM,
    precision: str,
    memory: bool = False,
    teacher: Any = None,
    compiled: bool = False,
) -> Loss:
    """Return a function of inputs and targets, `[batch, context]` each, that gives "loss", the mean
    cross entropy in nats, with a teacher "divergence", the mean one from its predictions on the
    same tokens in nats, and if asked for "memory", `memory_share` of a stateful variant.

    "bf16" runs matrix products outside attention in bfloat16. Of many tokens and a large
    vocabulary the logits are computed in pieces, and again in the backward. `compiled` compiles
    what is computed of a piece, not the models.
    """
    prediction = torch.compile(prediction_losses, dynamic=False) if compiled else prediction_losses

    def loss(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        penalties: list[Tensor] = []
        wanted = {"penalties": penalties} if memory else {}
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
            hidden = [model.model(input_ids=inputs, use_cache=False, **wanted).last_hidden_state]
            heads = [model.lm_head]
            if teacher is not None:
                with torch.no_grad():
                    hidden.append(teacher.model(inputs, use_cache=False).last_hidden_state)
                heads.append(teacher.lm_head)
            rows = [targets.flatten(), *(x.flatten(0, 1) for x in hidden)]
            count = 2 ** max(
                0, math.ceil(math.log2(len(rows[0]) * model.config.vocab_size / LOGITS))
            )
            if count == 1:
                sums = prediction(heads, *rows)
            else:
                pieces = zip(*(x.chunk(count) for x in rows), strict=True)
                sums = sum(
                    checkpoint(
                        prediction, heads, *piece, use_reentrant=False, preserve_rng_state=False
                    )
                    for piece in pieces
                )
        names = ["loss"] if teacher is None else ["loss", "divergence"]
        terms = dict(zip(names, (sums / targets.numel()).unbind(), strict=True))
        return terms | {"memory": memory_share(penalties)} if memory else terms

    return loss


def prediction_losses(heads: Sequence[nn.Module], targets: Tensor, *hidden: Tensor) -> Tensor:
    """Return sums over tokens, `[1 or 2]`: the cross entropy of a model's predictions, and their
    divergence from a teacher's.

    Args:
        heads: of the model, and of the teacher if there is one.
        targets: `[num_tokens]`.
        hidden: `[num_tokens, hidden_size]` of each.
    """
    logprobs, *wished = (
        head(x).float().log_softmax(-1) for head, x in zip(heads, hidden, strict=True)
    )
    sums = [nll_loss(logprobs, targets, reduction="sum")]
    sums += [kl_div(logprobs, each, reduction="sum", log_target=True) for each in wished]
    return torch.stack(sums)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is allocated next: given back to the system, each page
    would be cleared again, a fifth of a step on a CPU. Nothing happens with another library."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


class Resumable(ABC):
    """A training in a folder: it goes on from the state, `state.pt`, if there is one.

    Args:
        identity: what a continued training must have in common with the first.
        trained: the parameters to train, by name.

    Attributes:
        terms: what is minimised at every step so far, by the names that `Loss` gives.
        seconds: time of the steps.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        schedule: TrainingRecipe | FineTuning,
        batches: Batches,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.folder, self.identity, self.schedule = folder, dict(identity), schedule
        self.batches, self.trained, self.optimizer = batches, dict(trained), optimizer
        self.terms: dict[str, list[float]] = {"loss": []}
        self._unread: list[dict[str, Tensor]] = []
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            self._load()

    @property
    def losses(self) -> list[float]:
        """Mean cross entropy of every step so far, in nats per token."""
        return self.terms["loss"]

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses) + len(self._unread)

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return next(iter(self.trained.values())).device

    @property
    def progress(self) -> float:
        """Which share of the training is done; 1: all."""
        return self.step / self.schedule.steps

    @property
    def learning_rate(self) -> float:
        """The next step's."""
        return self.schedule.learning_rate_at(self.step)

    @abstractmethod
    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return what is minimised, of its terms."""

    def _load(self) -> None:
        state = torch.load(self.folder / STATE, weights_only=True, map_location="cpu")
        for name, value in self.identity.items():
            if (found := state["identity"].get(name)) != value:
                raise UserError(
                    f"{self.folder} holds an unfinished run with {name} = {found}, not {value}: "
                    "finish that, choose another folder or delete it"
                )
        for name, parameter in self.trained.items():
            parameter.data.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if "terms" not in state:
            raise UserError(f"{self.folder} holds an older version's unfinished run: delete it")
        self.terms, self.seconds = state["terms"], state["seconds"]

    def save(self) -> None:
        """Write the state."""
        self._read()
        state = {
            "identity": self.identity,
            "trained": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "terms": self.terms,
            "seconds": self.seconds,
        }
        with replacing(self.folder / STATE) as temporary:
            torch.save(state, temporary)

    def take_steps(
        self,
        loss_of: Loss,
        is_due: Callable[[], bool],
        quiet: bool = False,
        until: float = 1.0,
    ) -> None:
        """Take the remaining steps, or those before the progress `until`; save the state where it
        `is_due`, and after the last."""
        if self.device.type == "cpu":
            keep_freed_memory()
        started = time.monotonic() - self.seconds
        with tqdm(
            initial=self.step,
            total=self.schedule.steps or None,
            unit="step",
            disable=quiet,
            smoothing=0.05,
        ) as progress:
            while self.progress < until:
                self._take_step(loss_of)
                self._read(but=1)  # or the device would wait for the next step to be launched
                self.seconds = time.monotonic() - started
                progress.update()
                shown = {name: f"{term[-1]:.3f}" for name, term in self.terms.items() if term}
                progress.set_postfix(shown, refresh=False)
                if is_due() or self.progress >= 1:
                    self.save()

    def _take_step(self, loss_of: Loss) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("faster", 1.0)
        device, parts = self.device, self.batches(self.step)
        if device.type == "cuda":  # other memory is copied when the device has nothing else to do
            parts = parts[0].pin_memory(), parts[1].pin_memory()
        terms = loss_of(*(part.to(device, non_blocking=True) for part in parts))
        self.objective(terms).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._unread.append({name: term.detach() for name, term in terms.items()})

    def _read(self, but: int = 0) -> None:
        """Read the losses of the steps, but for the last ones, from the device."""
        while len(self._unread) > but:
            for name, term in self._unread.pop(0).items():
                self.terms.setdefault(name, []).append(term.item())
