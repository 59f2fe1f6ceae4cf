"""A short fine-tuning of a whole checkpoint or of its variant's learned per-head tensors only.

The run is saved as it goes and can be killed at any moment: the same call goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attn_kernels.variants.softmax import Softmax
from attn_kernels.variants.ssmax import SSMax
from attnserve.evaluation.tokens import Tokens
from hf_attn import VariantLlamaForCausalLM
from hf_attn.modeling import VariantLlamaAttention
from training.data import Batches, fingerprint
from training.train import Loss, loss_function

STATE = "state.pt"
WARMUP = 0.1
"""Share of the steps in which the learning rate rises; it then falls to 0 in a straight line."""


class FineTuneError(ValueError):
    """A fine-tuning that cannot be, or not in this folder; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how: AdamW without weight decay, gradients clipped to norm 1."""

    steps: int
    train: str = "scale"
    """"scale": the variant's learned per-head tensors; "all": every weight."""
    learning_rate: float = 2e-3
    """The peak."""
    sequence: int = 1024
    """Tokens of a sequence."""
    batch: int = 1
    """Sequences of a step."""
    seed: int = 0
    """Of the order of the text."""
    precision: str = "fp32"
    """Of matrix products: "fp32", or "bf16"; weights are trained in float32."""

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, of which the first is 0."""
        warmup = max(1, round(WARMUP * self.steps))
        rise, fall = (step + 1) / warmup, (self.steps - step) / (self.steps + 1 - warmup)
        return self.learning_rate * min(rise, fall)


def fused_forward(
    attention: VariantLlamaAttention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the attention module computes for whole sequences without padding, by torch's fused
    softmax attention: memory in proportion to the length, and on a CPU three times as fast at
    1,024 tokens. For variants that are softmax of changed queries and keys.

    Args:
        attention: the module.
        hidden_states: `[batch, num_tokens, hidden_size]`.
        position_embeddings: cosines and sines `[batch, num_tokens, head_size]`.
        kwargs: not used.
    """
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q, k, v = (
        projection(hidden_states).view(shape).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    n = torch.arange(1, q.shape[-2] + 1, device=q.device, dtype=torch.float32)[:, None]
    learned = {name: getattr(attention, name) for name in attention.variant.learned}
    q, k = attention.variant.transform(q, k, n, learned)
    k, v = (x.repeat_interleave(attention.num_key_value_groups, 1) for x in (k, v))
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
    return attention.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


@contextmanager
def fused_attention(model: VariantLlamaForCausalLM) -> Iterator[bool]:
    """Let the model's attention run `fused_forward` meanwhile; whether its variant allows that."""
    fits = isinstance(model.config.variant, Softmax | SSMax) and not model.config.sliding_window
    modules = [layer.self_attn for layer in model.model.layers] if fits else []
    for attention in modules:
        attention.forward = fused_forward.__get__(attention)
    try:
        yield fits
    finally:
        for attention in modules:
            del attention.forward


@dataclass
class FineTune:
    """One run in a folder, which goes on from the state that the folder holds.

    Args:
        model: the model in float32; it is trained in place.
        settings: of the run.
        tokens: the text.
        bos: the begin-of-text token, which starts every sequence.
        folder: holds `state.pt`; made if missing.
        origin: whatever else a continued run must have in common with the first.
        save_seconds: shortest time between two saved states.
        compiled: use torch.compile.

    Raises:
        FineTuneError: nothing to train, too little text, or another run's state.
    """

    model: VariantLlamaForCausalLM
    settings: Settings
    tokens: Tokens
    bos: int
    folder: Path
    origin: dict[str, Any] = field(default_factory=dict)
    save_seconds: float = 60.0
    compiled: bool = False
    losses: list[float] = field(default_factory=list)
    """Mean cross entropy of every step so far, in nats per token."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        settings = self.settings
        self.trained = dict(trainable(self.model, settings.train))
        try:
            self.batches = Batches(
                self.tokens, settings.sequence, settings.batch, self.bos, settings.seed
            )
        except ValueError as error:
            raise FineTuneError(f"{error}: name more --data or a shorter --sequence") from None
        self.optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=0.0)
        self.identity = self.origin | asdict(settings) | {"text": fingerprint(self.tokens)}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / STATE).exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.folder / STATE, weights_only=True)
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise FineTuneError(
                    f"{self.folder} holds an unfinished run with {name} = "
                    f"{state['identity'].get(name)}, not {value}: finish that or delete it"
                )
        for name, parameter in self.trained.items():
            parameter.data.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]

    def save(self) -> None:
        """Write the state; the file is either the old or the new one, never half."""
        state = {
            "identity": self.identity,
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        temporary = self.folder / (STATE + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / STATE)

    def run(self, quiet: bool = False) -> None:
        """Take the remaining steps.

        Args:
            quiet: no progress bar.
        """
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        loss_of = loss_function(self.model.train(), self.settings.precision, self.compiled)
        progress = tqdm(
            initial=len(self.losses), total=self.settings.steps, unit="step", disable=quiet
        )
        with progress, fused_attention(self.model) as fused:
            if not fused and not self.compiled:
                self.model.gradient_checkpointing_enable()  # dense scores of one layer at a time
            self._take_steps(loss_of, progress)
        self.model.eval()

    def _take_steps(self, loss_of: Loss, progress: Any) -> None:
        started = saved = time.monotonic()
        started -= self.seconds
        while len(self.losses) < self.settings.steps:
            self.losses.append(self._take_step(loss_of))
            now = time.monotonic()
            self.seconds = now - started
            progress.update()
            progress.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
            if len(self.losses) == self.settings.steps or now - saved > self.save_seconds:
                self.save()
                saved = now

    def _take_step(self, loss_of: Loss) -> float:
        step = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        loss, _ = loss_of(*self.batches(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def trainable(model: VariantLlamaForCausalLM, train: str) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters to train, by name.

    Raises:
        FineTuneError: "scale", and the variant learns no tensors.
    """
    variant = model.config.variant
    if train == "scale" and not variant.learned:
        raise FineTuneError(f"{variant.name} learns no per-head tensors: use --train all")
    for name, parameter in model.named_parameters():
        if train == "all" or name.rpartition(".")[2] in variant.learned:
            yield name, parameter
