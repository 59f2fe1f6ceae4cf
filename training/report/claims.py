"""The papers' claims, and what tests each of them here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from attnserve.reports import Range, Verdict
from training.report import figures as f
from training.report.evidence import Evidence, Missing
from training.report.rules import Finding

THETA = 50.0
"""RoPE's theta is multiplied with this in the SSMax paper's long contexts."""


@dataclass(frozen=True)
class Claim:
    """One row of the report."""

    text: str
    reported: str
    """The paper's figure."""
    test: Callable[[Evidence], Finding]

    def judge(self, evidence: Evidence) -> Finding:
        """What the evidence says; `MISSING` where there is none."""
        try:
            return self.test(evidence)
        except Missing as why:
            return Finding(str(why), "", Verdict.MISSING)


@dataclass(frozen=True)
class Paper:
    """A paper's claims."""

    title: str
    setting: str
    claims: Sequence[Claim]


SOFTPICK = Paper(
    "Softpick (arXiv 2504.20966)",
    "340M and 1.8B parameters, context 4096, fineweb-edu.",
    (
        Claim(
            "no attention sinks, eps 0.2",
            "340M: 68.28 % -> 0; 1.8B: 41.73 % -> 0",
            partial(f.sink_rate, 0.2),
        ),
        Claim(
            "no attention sinks, eps 0.3",
            "340M: 63.41 % -> 0; 1.8B: 14.96 % -> 0",
            partial(f.sink_rate, 0.3),
        ),
        Claim(
            "kurtosis of hidden states much lower",
            "340M: 33510.81 -> 340.96; 1.8B: 74456.81 -> 2193.27",
            f.kurtosis,
        ),
        Claim(
            "95 to 99 % of the maps exactly zero",
            "340M: 4.53 % -> 99.34 %; 1.8B: 4.28 % -> 95.63 %",
            f.zeros,
        ),
        Claim(
            "equal loss",
            "340M: Wikitext perplexity per word 23.85 -> 24.32",
            partial(f.held_out_loss, "softpick", f.EQUAL),
        ),
        Claim("equal LAMBADA accuracy", "340M: 36.25 % -> 36.21 %", f.lambada),
    ),
)

SSMAX = Paper(
    "Scalable softmax, SSMax (arXiv 2501.19399)",
    "162M parameters, context 1024; long contexts with RoPE's theta times 50, without training. "
    "The paper's figures are curves.",
    (
        Claim("lower training loss", "curve below softmax's", f.training_loss),
        *(
            Claim(
                f"loss stays low at {multiple}x, where softmax fails (theta x50)",
                "curves up to 20 times the training length",
                partial(f.stays_low, "ssmax", multiple, factor=THETA),
            )
            for multiple in (4, 8, 16)
        ),
        *(
            Claim(
                f"retrieves a key at {multiple}x, better than softmax (theta x50)",
                "to about 10 times the training length",
                partial(f.retrieves, "ssmax", multiple, factor=THETA),
            )
            for multiple in (2, 4, 8)
        ),
    ),
)

LSSA = Paper(
    "LSSA (arXiv 2501.13428)",
    "124M parameters, context 1024, FineWeb-10B; validation loss at 1, 2, 4 and 8 times.",
    (
        Claim("equal loss at 1x", "3.19 -> 3.19", partial(f.window_loss, "lssa", 1, f.EQUAL)),
        *(
            Claim(
                f"lower loss than softmax at {multiple}x",
                reported,
                partial(f.window_loss, "lssa", multiple, f.LOWER),
            )
            for multiple, reported in (
                (2, "4.17 -> 4.13"),
                (4, "5.45 -> 5.30"),
                (8, "6.28 -> 5.94"),
            )
        ),
    ),
)

LSSAR = Paper(
    "LSSAR, p = 15 (arXiv 2501.13428)",
    "As LSSA.",
    (
        Claim("equal loss at 1x", "3.19 -> 3.19", partial(f.window_loss, "lssar", 1, f.EQUAL)),
        *(
            Claim(
                f"lower loss than softmax at {multiple}x",
                reported,
                partial(f.window_loss, "lssar", multiple, f.LOWER),
            )
            for multiple, reported in (
                (2, "4.17 -> 3.19"),
                (4, "5.45 -> 3.23"),
                (8, "6.28 -> 3.32"),
            )
        ),
        *(
            Claim(
                f"loss stays flat at {multiple}x, where softmax fails",
                reported,
                partial(f.stays_low, "lssar", multiple),
            )
            for multiple, reported in (
                (8, "rises by 0.13, softmax by 3.09"),
                (16, "the abstract's claim, without a figure"),
            )
        ),
        *(
            Claim(
                f"retrieves a key at {multiple}x, better than softmax",
                reported,
                partial(f.retrieves, "lssar", multiple),
            )
            for multiple, reported in (
                (1, "accuracy 64 % -> 86 %"),
                (2, "accuracy at 1.5x: 0 -> 45 %"),
                (4, "accuracy 0 -> 20 %"),
            )
        ),
    ),
)

SELECTIVE = Paper(
    "Selective attention (arXiv 2410.02703)",
    "100M parameters, C4.",
    (
        Claim(
            "perplexity equal to softmax's or better",
            "equal to a standard transformer with about twice the heads and attention parameters",
            partial(f.held_out_loss, "selective", Range(high=0.05)),
        ),
        Claim(
            "less attention memory at a context of 512",
            "16 times less at the baseline's validation perplexity",
            partial(f.less_memory, "selective", 512, Range(low=16.0)),
        ),
        *(
            Claim(
                f"less attention memory at a context of {length}",
                f"{times:.0f} times less at the baseline's validation perplexity",
                partial(f.less_memory, f"selective-{length}", length, Range(low=times)),
            )
            for length, times in ((1024, 25.0), (2048, 47.0))
        ),
    ),
)

PAPERS = (SOFTPICK, SSMAX, LSSA, LSSAR, SELECTIVE)
