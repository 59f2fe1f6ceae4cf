"""How far a model's probabilities of given tokens are from a reference's.

docs/GATEWAY.md, "Compare", defines each of them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving.openai.errors import UNEXPECTED

LEAST_REST = 1e-9
"""The least probability of all tokens that are not named; what is below it is rounding."""


MAX_LOGPROB = 1e39
"""No float32 is as large."""


@dataclass(frozen=True, slots=True)
class Position:
    """What a server says of one token that it has read.

    `named` has the natural logarithms of the probabilities of its most likely tokens and of the
    token itself, most likely first (of equals, the lowest id first); `texts` are their texts.
    """

    id: int
    named: dict[int, float]
    texts: dict[int, str | None]

    @property
    def logprob(self) -> float:
        """The logprob of the token that was read."""
        return self.named[self.id]

    @property
    def best(self) -> int:
        """The most likely token."""
        return next(iter(self.named))

    def top(self, k: int) -> list[dict[str, Any]]:
        """Return the `k` most likely ones, for an answer in JSON."""
        return [
            {"id": i, "token": self.texts[i], "logprob": self.named[i]}
            for i in list(self.named)[:k]
        ]


def positions(answer: bytes, ids: Sequence[int], start: int) -> list[Position]:
    """Return what a server says of `ids[start:]` in its answer to a request with `prompt_logprobs`.

    Raises:
        ValueError: it does not say it.
    """
    try:
        entries = json.loads(answer)["choices"][0]["prompt_logprobs"]
        found = [
            position(id, entry) for id, entry in zip(ids[start:], entries[start:], strict=True)
        ]
    except UNEXPECTED as error:
        raise ValueError("no logprobs of the prompt") from error
    return found


def position(id: int, entry: dict[str, dict[str, Any]]) -> Position:
    """Return one of vLLM's entries: `{"ID": {"logprob": ..., "decoded_token": ...}, ...}`."""
    named = {int(key): float(value["logprob"]) for key, value in entry.items()}
    if not all(-MAX_LOGPROB < logprob < 1 for logprob in named.values()):  # of NaN neither holds
        raise ValueError
    named = dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))
    named[id]  # KeyError: not of this token
    return Position(id, named, {int(k): v.get("decoded_token") for k, v in entry.items()})


class Drift(NamedTuple):
    """The difference of two models at one token."""

    delta: float
    """Logprob of the token, the model's less the reference's."""
    kl: float
    """KL(reference || model) over the tokens that both name and one outcome for the rest, in nats:
    at most the KL over the whole vocabulary, since outcomes are only merged."""
    coverage: float
    """The reference's probability of the tokens that both name."""
    agrees: bool
    """Whether the same token is the most likely one."""


def drift(reference: Position, model: Position) -> Drift:
    """Compare what two models say of the same token."""
    kl = p_sum = q_sum = 0.0
    for id, p_log in reference.named.items():
        q_log = model.named.get(id)
        if q_log is not None:
            p = math.exp(p_log)
            p_sum += p
            q_sum += math.exp(q_log)
            kl += p * (p_log - q_log)
    p_rest, q_rest = max(1 - p_sum, LEAST_REST), max(1 - q_sum, LEAST_REST)
    kl += p_rest * math.log(p_rest / q_rest)
    return Drift(
        model.logprob - reference.logprob,
        max(kl, 0.0),
        min(p_sum, 1.0),
        reference.best == model.best,
    )


def other_text(reference: Sequence[Position], model: Sequence[Position]) -> int | None:
    """Return the first id that both name and that has another text in each; None: there is none."""
    for one, other in zip(reference, model, strict=True):
        for id, text in one.texts.items():
            if other.texts.get(id, text) != text:
                return id
    return None


def summary(drifts: Sequence[Drift]) -> dict[str, Any]:
    """Return the figures over all tokens, of which there must be at least one."""
    count = len(drifts)
    agreeing = [d.agrees for d in drifts]
    return {
        "tokens": count,
        "delta_sum": math.fsum(d.delta for d in drifts),
        "mean_kl": math.fsum(d.kl for d in drifts) / count,
        "max_kl": max(d.kl for d in drifts),
        "mean_coverage": math.fsum(d.coverage for d in drifts) / count,
        "agreement": sum(agreeing) / count,
        "first_divergence": None if all(agreeing) else agreeing.index(False),
    }
