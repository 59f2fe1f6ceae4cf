"""How far a changed model is from what it was."""

import torch
from torch import Tensor, nn

from attnserve.evaluation.texts import Text


class Divergence:
    """KL divergence of a changed model from what it was, on a text."""

    def __init__(self, model: nn.Module, text: Text) -> None:
        self.model, self.rows = model, text.rows
        self.reference = [self._logprobs(row) for row in self.rows]

    def __call__(self) -> list[float]:
        """Return the mean over tokens of each sequence, in nats."""
        found = []
        for row, reference in zip(self.rows, self.reference, strict=True):
            each = reference.exp() * (reference - self._logprobs(row))
            found.append(float(each.sum(-1).mean()))
        return found

    @torch.inference_mode()
    def _logprobs(self, row: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=row[None], use_cache=False).logits[0]
        return logits.float().log_softmax(-1)
