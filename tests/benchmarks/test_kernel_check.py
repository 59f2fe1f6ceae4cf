"""The check before the timing: right kernels pass it, and nothing wrong is ever timed."""

from __future__ import annotations

import pytest
import torch

from attn_kernels import get_variant, variant_names
from benchmarks.kernels.candidates import CopyPool, Ours, TorchSdpa
from benchmarks.kernels.case import Case, Inputs, Paging
from benchmarks.kernels.check import LIMITS, PEER_LIMITS, Expected, complaint, error_of
from tests.benchmarks.fakes import Forgetful, NotANumber, NotQuite, TorchKernel

CASES = [
    Case("decode", "fp32", 32, 100, 3, 1, 4, 2, 32),
    Case("prefill", "fp32", 32, 40, 1, 300, 4, 2, 32),
]


def error_with(kernel: TorchKernel, case: Case) -> float:
    inputs = Inputs.make(case)
    candidate = Ours(kernel.variant, kernel.layer, inputs, Paging(case, 2), {})
    expected = Expected.of(candidate.variant, inputs, candidate.learned)
    return error_of(candidate, inputs, expected)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", variant_names())
def test_right_kernel_passes(name: str, case: Case) -> None:
    assert error_with(TorchKernel(get_variant(name)), case) <= 1e-5


@pytest.mark.parametrize(
    ("fake", "name", "case"),
    [
        *((NotQuite, "softpick", case) for case in CASES),
        *((NotANumber, "softmax", case) for case in CASES),
        # In prefill, a call's selections are used by the call itself.
        (Forgetful, "selective", CASES[0]),
    ],
)
def test_wrong_kernel_is_found(fake: type[TorchKernel], name: str, case: Case) -> None:
    assert complaint(error_with(fake(get_variant(name)), case), LIMITS["fp32"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sdpa_is_softmax(case: Case) -> None:
    inputs = Inputs.make(case)
    candidate = TorchSdpa(inputs, 2)
    expected = Expected.of(candidate.variant, inputs, {})
    assert not complaint(error_of(candidate, inputs, expected), PEER_LIMITS["fp32"])
    candidate.prepare()
    assert expected.error(candidate.run()) <= PEER_LIMITS["fp32"], "the second copy differs"


def test_copies_hold_the_same() -> None:
    """Every copy gives the answer that was checked, also for a variant that shares its pool."""
    case = CASES[0]
    inputs = Inputs.make(case)
    pools: dict[str, CopyPool] = {}
    paging = Paging(case, 3)
    ours = [
        Ours(get_variant(name), TorchKernel(get_variant(name)).layer, inputs, paging, pools)
        for name in ("softmax", "softpick")
    ]
    assert len(pools) == 1
    for candidate in ours:
        expected = Expected.of(candidate.variant, inputs, candidate.learned)
        for _ in range(4):
            candidate.prepare()
            assert expected.error(candidate.run()) <= 1e-5


def test_limits() -> None:
    assert not complaint(1e-6, 1e-6)
    assert complaint(1.1e-6, 1e-6)
    assert complaint(float("nan"), 1e-6)
