"""The loss term that makes context pruning cheap (selective attention, arXiv 2410.02703)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FULLY_MASKED = 1.0
"""The penalty from which on a token counts as gone: the paper's tau."""


def memory_share(penalties: Sequence[Tensor]) -> Tensor:
    """Return the share of the tokens that the layers must keep: 1 if none ever masks another.

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
