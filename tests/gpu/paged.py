"""Random requests on a paged cache, step by step against the float64 reference.

The reference is computed on the CPU; only the kernels under test run on the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, get_variant, reference
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KVFormat
from attn_kernels.paged import content_bytes

ON_GPU = (pytest.mark.gpu, pytest.mark.timeout(90, method="thread"))
"""Of a test of kernels on a GPU. One that hangs ends its process, which xdist replaces."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TOLERANCES = {
    # Scores and sums are float32; a GPU's exp2, log2 and division are off by two units in the last
    # place, which lssar raises to the 15th power.
    "fp32": 1e-5,
    # Weights and outputs are rounded to 8 bits, 2^-9 each at worst, and errors of a row's weights
    # do not always cancel.
    "bf16": 1e-2,
    # The same with 11 bits.
    "fp16": 2e-3,
}
"""Largest error by the queries' dtype, relative to a request's largest output. A float8 cache has
none of its own: the reference sees the keys and values as the cache holds them."""

INPUT_ROUNDING = 2.0**-20
"""Where the reference itself moves by more than the tolerance if its queries do by so much, no
kernel that sums up float32 can do better: 64 products that are each off by 2^-20, up or down, move
a score as much as one that is off by 2^-23 of |q||k|."""

PADDING = 2
"""Rows behind the last query of each step, whose outputs nobody may touch."""

KEY_SCALE, VALUE_SCALE = 0.05, 0.04
"""Scales of a float8 cache. Keys above 448 times the first are clamped; there are none."""


@dataclass(frozen=True)
class Setup:
    """One layer and its requests.

    Attributes:
        variant: its name.
        dtype: of queries and outputs, a key of DTYPES.
        head_dim: elements of a head.
        group: query heads of a KV head.
        window: sliding window in tokens.
        device: where the kernels run: "cuda", or "cpu" for Triton's interpreter.
        longest: tokens of the longest request.
        fp8: the cache is float8_e4m3fn.
        bits: of codes in the cache; 0: none.
    """

    variant: str
    dtype: str
    head_dim: int
    group: int
    window: int | None = None
    device: str = "cuda"
    longest: int = 150
    fp8: bool = False
    bits: int = 0
    num_kv_heads: int = 2
    block_size: int = 16

    def __str__(self) -> str:
        cache = " fp8 cache" if self.fp8 else f" int{self.bits} cache" if self.bits else ""
        window = f" window {self.window}" if self.window else ""
        shape = f"D{self.head_dim} G{self.group}{window}"
        return f"{self.device} {self.variant} {self.dtype}{cache} {shape}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each request."""
        return (8, max(9, self.longest // 4), self.longest)

    @property
    def kv_format(self) -> KVFormat | None:
        """How the cache is quantized, token by token."""
        return KVFormat(self.bits) if self.bits else None

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.group * self.num_kv_heads


class PagedRequests:
    """Random sequences, and their outputs by the reference.

    Attributes:
        q, k, v: by request, `[n, heads, head_dim]` in the setup's dtype, on the CPU.
        expected: by request, float64 `[n, num_heads, head_dim]`.
        learned: the variant's per-head tensors.
        gates: by request, `[n, num_heads]` float32, of a gated variant.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.variant: Variant = get_variant(setup.variant)
        self.generator = torch.Generator().manual_seed(zlib.crc32(str(setup).encode()))
        dtype = DTYPES[setup.dtype]

        def normal(n: int, heads: int, size: float) -> Tensor:
            return (self._randn(n, heads, setup.head_dim) * size).to(dtype)

        # Logits of up to 15: a float32 score of 80 is itself known to 4e-6 only.
        self.q = [normal(n, setup.num_heads, 2.0) for n in setup.lengths]
        self.k = [normal(n, setup.num_kv_heads, 1.0) for n in setup.lengths]
        self.v = [normal(n, setup.num_kv_heads, 1.0) for n in setup.lengths]
        self.learned = {
            name: torch.rand(setup.num_heads, generator=self.generator) * 0.3 + 0.1
            for name in self.variant.learned
        }
        self.gates: list[torch.Tensor] | None = None
        if self.variant.gated:
            spread = torch.linspace(-1, 6, setup.num_heads)
            self.gates = [
                self.variant.gate(self._randn(n, setup.num_heads) * 2 + spread)
                for n in setup.lengths
            ]
        self.expected = [self.reference(r, self.q[r]) for r in range(len(setup.lengths))]

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def reference(self, request: int, q: Tensor) -> Tensor:
        """Return the reference's outputs of a request with these queries."""
        k, v = self.k[request].double(), self.v[request].double()
        if self.setup.fp8:
            k, v = stored(k, KEY_SCALE), stored(v, VALUE_SCALE)
        if self.setup.kv_format:
            k, v = (self.setup.kv_format.rounded(x).double() for x in (k, v))
        output, _ = reference.attention(
            self.variant,
            *(x.double().transpose(0, 1) for x in (q, k, v)),
            window=self.setup.window,
            scale=self.setup.head_dim**-0.5,
            learned=self.learned,
            gates=None if self.gates is None else self.gates[request].mT,
        )
        return output.transpose(0, 1)

    def limit(self, request: int) -> float:
        """Return the largest error allowed: the tolerance, or what rounded inputs change."""
        q, expected = self.q[request].double(), self.expected[request]
        moved = 0.0
        for _ in range(2):
            signs = torch.randint(0, 2, q.shape, generator=self.generator) * 2 - 1
            other = self.reference(request, q * (1 + INPUT_ROUNDING * signs))
            moved = max(moved, float((other - expected).abs().max() / expected.abs().max()))
        return max(TOLERANCES[self.setup.dtype], moved)


def stored(x: Tensor, scale: float) -> Tensor:
    """Return `x` as a float8 cache gives it back."""
    held = (x.float() / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return held.double() * float(torch.tensor(scale))


class Paged:
    """A cache with NaN in every slot, requests whose blocks are scattered over it, and the layer.

    Twice as many blocks as are needed: `move` puts the requests elsewhere.
    """

    def __init__(self, requests: PagedRequests) -> None:
        from attn_kernels.triton import TritonLayer  # by the test: interpreted or compiled

        self.requests = requests
        setup = requests.setup
        self.device = torch.device(setup.device)
        self.size = setup.block_size
        self.blocks_each = [-(-n // self.size) for n in setup.lengths]
        dtype = torch.float8_e4m3fn if setup.fp8 else DTYPES[setup.dtype]
        dtype = torch.uint8 if setup.bits else dtype
        group = setup.num_heads // setup.num_kv_heads
        content = content_bytes(
            requests.variant, setup.head_dim, dtype, setup.kv_format, group=group
        )
        shape = (2 * sum(self.blocks_each) + 1, setup.num_kv_heads, self.size, content)
        # All bits set is NaN in all of these formats.
        bits = torch.full(shape, 255, dtype=torch.uint8)
        self.kv = bits.to(self.device).view(dtype)
        scales: dict[str, Any] = {}
        if setup.fp8:
            scales["key_scale"] = torch.tensor([KEY_SCALE], device=self.device)
            scales["value_scale"] = torch.tensor([VALUE_SCALE], device=self.device)
        self.layer = TritonLayer(
            requests.variant,
            self.kv,
            num_heads=setup.num_heads,
            scale=setup.head_dim**-0.5,
            window=setup.window,
            learned={name: t.to(self.device) for name, t in requests.learned.items()},
            kv_format=setup.kv_format,
            **scales,
        )
        self.order = torch.randperm(shape[0], generator=requests.generator)
        self.table = self._table()

    def _table(self) -> Tensor:
        """Return the block table `[requests, most blocks + 1]` on the CPU: entries behind a
        request's last block name one that holds NaN."""
        *parts, rest = self.order.split(
            [*self.blocks_each, len(self.order) - sum(self.blocks_each)]
        )
        table = torch.full((len(parts), max(self.blocks_each) + 1), int(rest[-1]))
        for row, blocks in zip(table, parts, strict=True):
            row[: len(blocks)] = blocks
        return table.int()

    def move(self) -> None:
        """Put every request into other blocks; the old ones hold NaN afterwards."""
        count = sum(self.blocks_each)
        old, new = self.order[:count], self.order[count : 2 * count]
        bits = self.kv.view(torch.uint8)
        bits[new.to(self.device)] = bits[old.to(self.device)]
        bits[old.to(self.device)] = 255
        self.order = torch.cat([new, old, self.order[2 * count :]])
        self.table = self._table()

    def slots(self, request: int, start: int, end: int) -> Tensor:
        """Return the slots of a request's tokens, int64."""
        positions = torch.arange(start, end)
        blocks = self.table[request].long()[positions // self.size]
        return blocks * self.size + positions % self.size

    def step(self, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Write and attend tokens `start` to `end` of some requests; return their outputs.

        Args:
            spans: `(request, start, end)` each.

        Raises:
            AssertionError: rows behind the last query were written.
        """
        setup, own = self.requests.setup, self.requests
        q, k, v = (
            torch.cat([*(x[r][a:b] for r, a, b in spans), nothing(x[0])]).to(self.device)
            for x in (own.q, own.k, own.v)
        )
        lens = [b - a for _, a, b in spans]
        batch = Batch(
            self.table[[r for r, _, _ in spans]].to(self.device),
            torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()]).int().to(self.device),
            torch.tensor([b for _, _, b in spans]).int().to(self.device),
            torch.cat([*(self.slots(*span) for span in spans), torch.full((PADDING,), -1)]).to(
                self.device
            ),
            max_query_len=max(lens),
            max_seq_len=max(b for _, _, b in spans),
        )
        out = torch.full((sum(lens) + PADDING, setup.num_heads, setup.head_dim), torch.nan)
        out = out.to(self.device, DTYPES[setup.dtype])
        self.layer.write_cache(k, v, batch.slot_mapping)
        if own.gates is not None:
            gates = torch.cat([own.gates[r][a:b] for r, a, b in spans])
            self.layer.write_gates(gates.to(self.device), batch)
        self.layer.attend(q, batch, out)
        host = out.cpu()
        assert bool(host[-PADDING:].isnan().all()), "wrote behind the last query"
        return list(host[:-PADDING].split(lens))

    def error(self, spans: Sequence[tuple[int, int, int]], outputs: Sequence[Tensor]) -> float:
        """Return the largest error relative to the request's largest output; NaN if one is."""
        worst = 0.0
        for (r, a, b), output in zip(spans, outputs, strict=True):
            expected = self.requests.expected[r]
            difference = (output.double() - expected[a:b]).abs().max()
            error = float(difference / expected.abs().max())
            worst = worse(error, worst)
        return worst


def worse(a: float, b: float) -> float:
    """Return the larger error; NaN if one is."""
    return a if a != a or a > b else b


def nothing(x: Tensor) -> Tensor:
    """Return PADDING rows of NaN like those of `x`."""
    return torch.full((PADDING, *x.shape[1:]), torch.nan, dtype=x.dtype)


def check(errors: Mapping[str, float], requests: PagedRequests) -> None:
    """Compare errors, each of one phase, with the limit of the requests.

    Raises:
        AssertionError: one is above it, or is NaN.
    """
    limit = TOLERANCES[requests.setup.dtype]
    if requests.setup.dtype == "fp32" and not all(error <= limit for error in errors.values()):
        limit = max(requests.limit(r) for r in range(len(requests.expected)))
    wrong = {phase: error for phase, error in errors.items() if not error <= limit}
    assert not wrong, f"errors above {limit:.0e}: {wrong}"
