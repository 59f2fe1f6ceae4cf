"""A short fine-tuning of a whole checkpoint or of its variant's learned per-head tensors only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnserve.errors import UserError
from attnserve.evaluation.texts import Tokens
from hf_attn import VariantLlamaForCausalLM
from training.data import Batches, fingerprint
from training.fused import Forward, attends, attention_forward, blended, fused
from training.recipe import LEARNING_RATES, FineTuning
from training.resumable import Resumable, check_masks, loss_function


@contextmanager
def compiled_layers(*models: Any) -> Iterator[None]:
    """Let models run compiled layers meanwhile. All of a model's layers are one compiled function,
    which takes seconds to make where a compiled model would take minutes."""
    layers = [layer for model in models for layer in model.model.layers]
    for layer in layers:
        layer.forward = _with_own_penalties(torch.compile(layer.forward, dynamic=False))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _with_own_penalties(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer's forward that begins a list of penalties of its own: one that has those of
    the layers before it would be compiled anew at each length."""

    def called(*args: Any, penalties: list[Tensor] | None = None, **kwargs: Any) -> Any:
        if penalties is None:
            return forward(*args, **kwargs)
        own: list[Tensor] = []
        output = forward(*args, penalties=own, **kwargs)
        penalties += own
        return output

    return called


class FineTune(Resumable):
    """One fine-tuning, in place and on its device, of a model in float32.

    `folder` holds `state.pt`, which is written after `save_seconds` at the earliest, and after 30
    times what writing it takes. `origin` is
    what else a continued run must have in common with the first. `teacher`, on the same device, is
    the model whose predictions are followed, if the settings have a weight for that.
    """

    def __init__(
        self,
        model: VariantLlamaForCausalLM,
        settings: FineTuning,
        tokens: Tokens,
        bos: int,
        folder: Path,
        origin: Mapping[str, Any] | None = None,
        save_seconds: float = 60.0,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.settings, self.save_seconds = model, settings, save_seconds
        if bool(settings.distill) != (teacher is not None):
            raise ValueError("a teacher and a weight for what it teaches go together")
        self.teacher = teacher
        if settings.memory_loss:
            check_masks(model.config.variant)
        own = model.config.variant.tensors
        if settings.train == "scale" and not own:
            raise UserError(
                f"{model.config.variant.name} learns no per-head tensors: use --train all"
            )
        learned, trained = {}, {}
        for name, parameter in model.named_parameters():
            if name.partition(".self_attn.")[2] in own:
                learned[name] = parameter
            elif settings.train == "all":
                trained[name] = parameter
        batches = Batches(tokens, settings.sequence, settings.batch, bos, settings.seed)
        identity = {**(origin or {}), **asdict(settings), "text": fingerprint(tokens)}
        faster = max(1.0, LEARNING_RATES["scale"] / settings.learning_rate) if trained else 1.0
        groups = [
            {"params": list(each.values()), "faster": times}
            for each, times in ((trained, 1.0), (learned, faster))
            if each
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self._saved = time.monotonic()
        super().__init__(folder, identity, settings, batches, trained | learned, optimizer)

    def save(self) -> None:
        """Write the state."""
        started = time.monotonic()
        super().save()
        self._saved = time.monotonic()
        self.save_seconds = max(self.save_seconds, 30 * (self._saved - started))

    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the loss, the divergence from the teacher and the memory loss, with their
        weights."""
        loss, settings = terms["loss"], self.settings
        if "divergence" in terms:
            loss = torch.lerp(loss, terms["divergence"], settings.distill)
        return loss + settings.memory_loss * terms["memory"] if "memory" in terms else loss

    @property
    def progress(self) -> float:
        """Which share is done, of the steps or of the time."""
        return self.settings.progress(self.step, self.seconds)

    @property
    def learning_rate(self) -> float:
        """The next step's."""
        return self.settings.learning_rate_at(self.step, self.seconds)

    def run(self, compiled: bool = False, quiet: bool = False) -> None:
        """Take the remaining steps."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.model.train()
        share = torch.zeros((), device=self.model.device)
        memory = self.settings.memory_loss > 0
        between = blended(self.model, share, memory)
        self._take(between, compiled, quiet, self.settings.blend, share)
        self._take(fused(self.model, memory), compiled, quiet)
        self.model.eval()

    def _take(
        self,
        forward: Forward | None,
        compiled: bool,
        quiet: bool,
        until: float = 1.0,
        share: Tensor | None = None,
    ) -> None:
        """Take the steps before the progress `until` with an attention, of which `share` grows
        to 1."""
        if self.progress >= until:
            return
        memory = self.settings.memory_loss > 0
        if attends(self.model, memory) is None and not compiled:
            self.model.gradient_checkpointing_enable()  # scores of one layer at a time
        step = 1 / self.settings.steps if self.settings.steps else 1e-3
        inner = loss_function(self.model, self.settings.precision, memory, self.teacher, compiled)
        models = [self.model] if self.teacher is None else [self.model, self.teacher]

        def loss_of(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
            if share is not None:
                share.fill_((self.progress + step) / (until + step))
            return inner(inputs, targets)

        with attention_forward(self.model, forward), compiled_layers(*models if compiled else []):
            self.take_steps(
                loss_of, lambda: time.monotonic() - self._saved > self.save_seconds, quiet, until
            )
