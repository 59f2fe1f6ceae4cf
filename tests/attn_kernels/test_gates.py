"""The sums of gates in the cache: exact in contexts of any length, continued from the slot before
however tokens come, and read nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import attend, get_variant, reference
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KV_FORMATS, KVFormat
from attn_kernels.paged import Layer, TorchLayer
from tests.attn_kernels import test_paged as paged
from tests.attn_kernels import test_triton as triton
from tests.attn_kernels.cases import causal
from tests.attn_kernels.test_triton import interpreter

__all__ = ["interpreter"]

FORGETTING = get_variant("forgetting")
HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 32, 16
GPU = "1"
"""Triton's path, of one processor: parts of a context would take the interpreter long."""
PATHS = (*paged.PATHS[:2], GPU)


class Request:
    """One request's tokens, its cache, and the reference."""

    def __init__(
        self,
        path: str,
        n: int,
        window: int | None = None,
        kv_format: KVFormat | None = None,
    ) -> None:
        torch.manual_seed(n)
        self.q, self.k, self.v = (
            torch.randn(n, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        gates = paged.gates_of(FORGETTING, n, HEADS)
        assert gates is not None
        self.gates, self.window, self.kv_format = gates, window, kv_format
        group = HEADS // KV_HEADS
        self.cache = paged.Cache.make(
            FORGETTING, [n], KV_HEADS, SIZE, BLOCK, torch.float32, kv_format, group
        )
        make = triton.make_layer if path == GPU else paged.Cache.layer
        options: dict[str, Any] = {"window": window, "kv_format": kv_format}
        self.layer: Layer = make(self.cache, path, FORGETTING, HEADS, scale=0.2, **options)

    def step(self, first: int, end: int) -> Tensor:
        """Read tokens; return the outputs `[end - first, HEADS, SIZE]`."""
        batch = Batch(
            self.cache.block_table,
            torch.tensor([0, end - first]),
            torch.tensor([end]),
            self.cache.slots(0, first, end),
            max_query_len=end - first,
        )
        out = torch.full((end - first, HEADS, SIZE), float("nan"))
        self.layer.write_gates(self.gates[first:end], batch)
        q, k, v = (x[first:end] for x in (self.q, self.k, self.v))
        self.layer.step(q, k, v, batch, out)
        return out

    def check(self, out: Tensor, first: int, end: int) -> None:
        k, v = self.k, self.v
        if self.kv_format:
            k, v = self.kv_format.rounded(k), self.kv_format.rounded(v)
        expected, _ = reference.attention(
            FORGETTING,
            *(x[:end].double().transpose(0, 1) for x in (self.q, k, v)),
            gates=self.gates[:end].mT,
            window=self.window,
            scale=0.2,
        )
        expected = expected[:, first:].transpose(0, 1)
        assert paged.relative_error(out, expected) <= paged.TORCH_TOLERANCE


@pytest.mark.parametrize(
    ("path", "kv_format"),
    [
        *((path, None) for path in PATHS),
        *((path, kv_format) for path in PATHS[:2] for kv_format in KV_FORMATS.values()),
    ],
    ids=str,
)
def test_sums_of_a_long_context(path: str, kv_format: KVFormat | None) -> None:
    """Sums of -3e6, where float32 goes in steps of a quarter, and gates of -1e-4."""
    request = Request(path, 63, kv_format=kv_format)
    request.gates[0] = -3e6
    request.gates[5:, 1] = -1e-4
    request.check(request.step(0, 60), 0, 60)
    for i in range(60, 63):
        out = request.step(i, i + 1)
    request.check(out, 62, 63)


def test_an_odd_head_size_in_16_bits() -> None:
    """One KV head, whose sums lie where no 64-bit number may begin."""
    cache = torch.zeros(3, 1, BLOCK, 2 * 33 + 4, dtype=torch.bfloat16)
    layer = TorchLayer(FORGETTING, cache, num_heads=1, scale=0.2)
    x, gates, out = torch.randn(9, 1, 33).bfloat16(), -torch.rand(9, 1), torch.zeros(9, 1, 33)
    for first, end in ((0, 5), (5, 9)):
        lengths = torch.tensor([0, end - first]), torch.tensor([end])
        batch = Batch(torch.tensor([[2]]), *lengths, 2 * BLOCK + torch.arange(first, end))
        layer.write_gates(gates[first:end], batch)
        layer.step(x[first:end], x[first:end], x[first:end], batch, out[first:end])
    heads = x.double().transpose(0, 1)
    wanted, _ = reference.attention(FORGETTING, heads, heads, heads, gates=gates.mT, scale=0.2)
    torch.testing.assert_close(out, wanted.transpose(0, 1).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_gates_that_forget_all_within_a_prompt(path: str) -> None:
    """Differences of sums after one that is large count as much as those before it."""
    request = Request(path, 100)
    request.gates[1:] *= 30
    request.gates[50] = -3e6
    request.check(request.step(0, 100), 0, 100)


@pytest.mark.parametrize("path", PATHS[:2])
def test_rejected_drafts(path: str) -> None:
    """Tokens of speculative decoding that are taken back, over the end of a block."""
    request = Request(path, 40)
    request.step(0, 29)
    drafts = request.k.clone(), request.v.clone(), request.gates.clone()
    request.k[30:], request.v[30:], request.gates[30:] = 7.0, -7.0, -5.0
    request.step(29, 36)  # 29 is right, what follows is not
    request.k, request.v, request.gates = drafts
    request.check(request.step(30, 34), 30, 34)
    request.check(request.step(34, 40), 34, 40)


@pytest.mark.parametrize(
    ("path", "window"),
    [*((path, window) for path in PATHS[:2] for window in (1, 2, 17)), (GPU, 1)],
)
def test_blocks_before_the_window_are_not_read(path: str, window: int) -> None:
    """They may be another request's by now, also when sums are continued."""
    request = Request(path, 49, window)
    request.step(0, 48)
    gone = (48 - window + 1) // BLOCK
    # GPU kernels multiply what a tile holds of them by weights of 0.
    junk = 1e4 if path == GPU else float("nan")
    request.cache.kv[request.cache.block_table[0, :gone].long()] = junk
    request.check(request.step(48, 49), 48, 49)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (None, r"forgetting attention needs gates: pass gates=a tensor \[..., 4, 6\]"),
        (torch.zeros(4, 5), r"gates must be .* = \[..., 4, 6\], not \[4, 5\]"),
        (torch.zeros(2, 6), r"gates must be .* = \[..., 4, 6\], not \[2, 6\]"),
    ],
)
def test_one_clear_line(gates: Any, message: str) -> None:
    x = torch.zeros(4, 6, 8)
    with pytest.raises(ValueError, match=message):
        attend(FORGETTING, x, x, x, causal(6), gates=gates)


def test_gates_that_do_not_fit_are_refused() -> None:
    request = Request(PATHS[1], 20)
    request.gates = request.gates[:, :3]
    with pytest.raises(ValueError, match=r"gates is \[20, 3\], not \[at least 20, 4\]"):
        request.step(0, 20)
