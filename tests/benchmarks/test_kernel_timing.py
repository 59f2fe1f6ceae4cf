"""The benchmark's arithmetic: what is counted, in which order, and what a ratio is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_kernels import causal_mask, get_variant
from attn_kernels.kv_quant import KVFormat
from benchmarks.kernels.case import FULL, Case, Inputs, Paging, cases_of, copies_needed
from benchmarks.kernels.measure import MachineRate, interleave, row
from benchmarks.results import spread

DECODE = Case("decode", "bf16", 64, 300, 3, 1, 4, 2, 32)
PREFILL = Case("prefill", "fp32", 32, 100, 2, 70, 4, 2, 32)
WRITE = Case("write", "bf16", 64, 300, 3, 20, 4, 2, 32)
GOOD = {"softpick": "", "vllm": "", "sdpa": "error"}


def test_grid_is_the_issue_s() -> None:
    cases = list(cases_of(FULL, 8, 2, 128))
    assert len(cases) == len(set(cases)) == (3 * 3 + 2 * 2) * 2 * 2
    decode = {(case.ctx, case.batch) for case in cases if case.phase == "decode"}
    assert decode == {(ctx, batch) for ctx in (512, 4096, 16384) for batch in (1, 8, 32)}
    prefill = {(case.ctx, case.new_tokens) for case in cases if case.phase == "prefill"}
    assert prefill == {(0, 512), (0, 2048), (4096, 512), (4096, 2048)}


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=str)
def test_bytes_and_operations_are_those_of_the_tensors(case: Case) -> None:
    inputs = Inputs.make(case)
    assert case.kv_bytes == inputs.key.nbytes + inputs.value.nbytes
    positions = torch.arange(case.seq_len)
    mask = causal_mask(positions[-case.new_tokens :], positions)
    pairs = int(mask.sum()) * case.batch * case.num_heads
    # A multiplication and an addition for each element, in q k and in w v.
    assert case.flops == pairs * case.head_dim * 2 * 2


def test_what_is_written_are_the_new_tokens() -> None:
    inputs, times = Inputs.make(WRITE), {"softpick": np.array([2e-3])}
    new = inputs.key[:, -20:].nbytes + inputs.value[:, -20:].nbytes
    plain, quantized = (
        row("softpick", WRITE, times, GOOD, "GB/s", 1.0, kv_format)
        for kv_format in (None, KVFormat(4))
    )
    assert plain["rate"] == pytest.approx(new / 2e-3 / 1e9)
    assert quantized["rate"] == pytest.approx(plain["rate"] * 36 / 128)  # of 64 elements


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=str)
def test_copies_share_no_slot(case: Case) -> None:
    paging = Paging(case, 3)
    slots = torch.cat([paging.slots(copy, 0) for copy in range(3)])
    assert len(slots.unique()) == len(slots) == 3 * case.batch * case.seq_len
    assert slots.max() < paging.num_blocks * case.block_size
    new = paging.slots(1, case.seq_len - 1)
    assert torch.equal(new, paging.slots(1, 0).view(case.batch, -1)[:, -1])


def test_small_cases_are_copied_until_they_are_cold() -> None:
    copies = copies_needed(DECODE, 10 * DECODE.kv_bytes + 1)
    assert copies == 11
    assert copies_needed(DECODE, 0) == copies_needed(PREFILL, 2**30) == 1


class Scripted:
    """A candidate that writes down what happens to it."""

    variant, learned = get_variant("softmax"), dict[str, Tensor]()

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def prepare(self) -> None:
        self.log.append(f"prepare {self.name}")

    def run(self) -> Tensor:
        self.log.append(self.name)
        return torch.empty(0)


def test_candidates_alternate() -> None:
    log: list[str] = []
    times = interleave(
        [Scripted(name, log) for name in "ABC"], seconds=60.0, min_rounds=1, max_rounds=4
    )
    assert times.shape == (4, 3)
    assert log == ["prepare A", "A", "prepare B", "B", "prepare C", "C"] * 4


def test_least_rounds_are_run_whatever_they_take() -> None:
    times = interleave([Scripted("A", [])], seconds=0.0, min_rounds=3, max_rounds=100)
    assert times.shape == (3, 1)


def test_spread() -> None:
    samples = np.arange(11, dtype=np.float64)[::-1]
    assert spread("ms", samples) == {"ms_p20": 2.0, "ms_median": 5.0, "ms_p80": 8.0}
    assert spread("ms", []) == {"ms_p20": None, "ms_median": None, "ms_p80": None}


def test_a_ratio_is_free_of_the_machine_s_drift() -> None:
    drift = np.array([1.0, 3.0, 9.0, 2.0, 5.0])
    peer = drift * 4.0
    ours = drift * np.array([1.0, 1.0, 2.0, 1.0, 1.0])
    found = row("softpick", PREFILL, {"softpick": ours, "vllm": peer}, GOOD, "GFLOP/s", 100.0)
    assert found["ratio_vllm"] == 0.25 and found["ratio_sdpa"] is None
    achieved = pytest.approx(PREFILL.flops / found["ms_median"] / 1e6)
    assert found["rate"] == achieved and found["fraction_of_limit"] * 100 == achieved
    assert found["note"] == "SDPA: error"


def test_limit_is_the_best_method(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds: float) -> None:
        clock[0] += seconds

    limit = MachineRate("GB/s", 8e9, {"slow": lambda: takes(4.0), "fast": lambda: takes(2.0)})
    limit.probe()
    limit.amount = 4e9
    limit.probe()
    limit.probe()
    assert limit.best(probes=1) == ("fast", 2.0)
    assert limit.best() == ("fast", 2.0)
    limit.rates["fast"][:4] = [8.0] * 4
    assert limit.best(probes=2) == ("fast", 5.0)
    assert limit.best() == ("fast", 8.0)
