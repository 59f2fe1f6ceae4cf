"""Paged attention against the float64 reference: odd shapes, random paging, NaN in unused slots.

Every way to compute it that this machine has: torch operations and each instruction set's kernels.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Rows, Variant, causal_mask, cpu, get_variant, reference, variant_names
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KV_FORMATS, KVFormat
from attn_kernels.paged import Layer, TorchLayer, content_bytes
from tests.attn_kernels.cases import CPU_KERNELS

ISAS = cpu.usable_isas()
PATHS = ("torch", *ISAS)


def paths(name: str) -> tuple[str, ...]:
    """Where a variant is tested. An instruction set differs in simd.hpp and matmul.hpp, which all
    variants share: all of them with selective, which does all that there is, the best two with one
    variant of each other kind. Torch operations only, if it has no C++ kernel."""
    if name not in CPU_KERNELS:
        return PATHS[:1]
    return {"selective": PATHS, "softpick": PATHS[:3], "lssar": PATHS[:3]}.get(name, PATHS[:2])


def paths_of_format(name: str, dtype: torch.dtype, window: int | None) -> tuple[str, ...]:
    """Masks are the same code everywhere: the other instruction sets see each dtype once."""
    thorough = (dtype, window) in ((torch.float32, None), (torch.bfloat16, 19))
    return paths(name) if thorough or dtype == torch.float16 else paths(name)[:2]


TOLERANCE = 2e-6
"""Relative to the largest output, in every cache dtype: the reference sees the same rounded inputs,
and scores and sums are float32."""

AMX_TOLERANCE = 1e-2
"""Of bfloat16 on AMX, whose tiles take the weights rounded to bfloat16 (seen: 4e-3), and on
AVX512-BF16, which does so too."""

SCORE_ROUNDING = 2**-22
"""Error of a float32 score in units of |q||k|: four roundings of half a unit in the last place.

Where the reference itself moves by more than TOLERANCE if its scores do by so much (lssar's 15th
power of nearly equal scores; softpick of a single score near 0), no float32 kernel can do better,
and that is the limit."""

TORCH_TOLERANCE = 1e-5
"""Of the torch operations, whose scores carry the rounding of one long sum: 3e-6 was seen where
lssar takes the 15th power of a score."""


def tolerance(path: str, dtype: torch.dtype) -> float:
    if path in ("amx", "avx512_bf16") and dtype == torch.bfloat16:
        return AMX_TOLERANCE
    return TORCH_TOLERANCE if path == "torch" else TOLERANCE


@dataclass(frozen=True)
class Shape:
    """A batch: its requests' lengths, and how many tokens each step prefills."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    longest: int
    chunk: int

    def __str__(self) -> str:
        return (
            f"H{self.num_heads}-Hkv{self.num_kv_heads}-D{self.head_size}"
            f"-block{self.block_size}-n{self.longest}-chunk{self.chunk}"
        )


SHAPES = (
    Shape(4, 2, 32, 16, 83, 7),
    Shape(3, 3, 48, 32, 131, 64),
    Shape(6, 1, 64, 16, 270, 263),  # more than one tile of the torch operations
    Shape(9, 3, 80, 128, 300, 290),  # more than one tile of the kernels, more rows than registers
    Shape(26, 2, 256, 48, 150, 77),  # more heads to a KV head than registers, spans across blocks
    Shape(8, 2, 64, 32, 333, 200),  # AMX tiles: blocks and head sizes in multiples of 32
    Shape(5, 5, 128, 128, 290, 150),
)


@dataclass
class Cache:
    """One layer's paged cache with NaN in it, and requests whose blocks are scattered over it."""

    kv: Tensor
    block_table: Tensor

    @classmethod
    def make(
        cls,
        variant: Variant,
        seq_lens: list[int],
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
        kv_format: KVFormat | None = None,
        group: int = 1,
    ) -> Cache:
        """`group`: query heads of a KV head, which a gated variant's slots depend on."""
        blocks_each = [-(-n // block_size) for n in seq_lens]
        num_blocks = sum(blocks_each) + 3
        content = content_bytes(variant, head_size, dtype, kv_format, group=group)
        # NaN in every format, and as parameters of 8 and 4 bits.
        kv = torch.full((num_blocks, num_kv_heads, block_size, content), 255, dtype=torch.uint8)
        kv = kv if kv_format else kv.view(dtype)
        order = torch.randperm(num_blocks).split([*blocks_each, 3])
        # Entries behind a request's last block name a block of NaN.
        table = torch.full((len(seq_lens), max(blocks_each) + 1), int(order[-1][0]))
        for row, ids in zip(table, order, strict=False):
            row[: len(ids)] = ids
        return cls(kv, table.int())

    def slots(self, request: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        block_size = self.kv.shape[2]
        blocks = self.block_table[request][positions // block_size]
        return (blocks * block_size + positions % block_size).long()

    def layer(self, path: str, variant: Variant, num_heads: int, **options: Any) -> Layer:
        if path == "torch":
            return TorchLayer(variant, self.kv, num_heads=num_heads, **options)
        kernel = cpu.load(variant, path, quantized=options.get("kv_format") is not None)
        assert kernel is not None, f"{variant.name} has no kernels for {path}"
        return kernel.layer(self.kv, num_heads=num_heads, **options)


@dataclass
class Case:
    """Return requests of odd lengths, and what the reference makes of each, of keys and values as
    they are cached."""

    variant: Variant
    seq_lens: list[int]
    learned: Mapping[str, Tensor]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    gates: list[Tensor | None]
    """Of each request, `[num_tokens, num_heads]` float32, of a gated variant."""
    kv_format: KVFormat | None
    modifiers: dict[str, Any]
    references: list[Tensor]

    def cached(self, x: Tensor) -> Tensor:
        return self.kv_format.rounded(x) if self.kv_format else x


def gates_of(variant: Variant, num_tokens: int, num_heads: int) -> Tensor | None:
    """Return gates `[num_tokens, num_heads]` of a gated variant, of heads that remember much and
    heads that forget fast."""
    if not variant.gated:
        return None
    return variant.gate(torch.randn(num_tokens, num_heads) * 2 + torch.linspace(-1, 6, num_heads))


def write_gates(layer: Layer, batch: Batch, gates: list[Tensor | None]) -> None:
    """Store the gates of a batch's new tokens, of a gated variant."""
    if given := [x for x in gates if x is not None]:
        layer.write_gates(torch.cat(given), batch)


@functools.lru_cache(maxsize=2)  # the paths take turns at one case
def make_case(
    name: str,
    shape: Shape,
    window: int | None,
    dtype: torch.dtype,
    kv_format: KVFormat | None = None,
    modified: bool = False,
) -> Case:
    torch.manual_seed(zlib.crc32(f"{name} {shape} {window} {dtype}".encode()))
    variant = get_variant(name)
    seq_lens = [1, 5, 33, shape.longest]
    # Logits of up to 15: a float32 score of 80 is itself known to 4e-6 only.
    learned = {tensor: torch.rand(shape.num_heads) * 0.3 + 0.1 for tensor in variant.learned}
    q, k, v = (
        [(torch.randn(n, heads, shape.head_size) * size).to(dtype) for n in seq_lens]
        for heads, size in ((shape.num_heads, 2), (shape.num_kv_heads, 1), (shape.num_kv_heads, 1))
    )
    modifiers: dict[str, Any] = {}
    if modified:
        modifiers = {"soft_cap": 5.0, "alibi_slopes": torch.rand(shape.num_heads) * 0.3}
    gates = [gates_of(variant, n, shape.num_heads) for n in seq_lens]
    case = Case(variant, seq_lens, learned, q, k, v, gates, kv_format, modifiers, [])
    for *request, gate in zip(q, map(case.cached, k), map(case.cached, v), gates, strict=True):
        expected, _ = reference.attention(
            variant,
            *(x.double().transpose(0, 1) for x in request),
            gates=None if gate is None else gate.mT,
            window=window,
            scale=shape.head_size**-0.5,
            learned=learned,
            **modifiers,
        )
        case.references.append(expected)
    return case


def error_against_reference(
    path: str,
    name: str,
    shape: Shape,
    window: int | None,
    dtype: torch.dtype,
    threads: int,
    kv_format: KVFormat | None = None,
    modified: bool = False,
) -> float:
    """Run requests of odd lengths, prefilled in chunks and decoded in one mixed batch; return the
    largest error relative to its request's largest output (and to what rounded scores allow)."""
    case = make_case(name, shape, window, dtype, kv_format, modified)
    variant, seq_lens, learned = case.variant, case.seq_lens, case.learned
    q, k, v = case.q, case.k, case.v
    torch.set_num_threads(threads)
    num_heads, num_kv_heads, head_size = shape.num_heads, shape.num_kv_heads, shape.head_size
    scale = head_size**-0.5
    cache = Cache.make(
        variant,
        seq_lens,
        num_kv_heads,
        head_size,
        shape.block_size,
        dtype,
        kv_format,
        num_heads // num_kv_heads,
    )
    options = {"window": window, "learned": learned, "kv_format": kv_format, **case.modifiers}
    layer = cache.layer(path, variant, num_heads, scale=scale, **options)
    outputs = [torch.zeros(n, num_heads, head_size) for n in seq_lens]

    done = [0] * len(seq_lens)
    step = 0
    while done != seq_lens:
        # The longest request decodes its last tokens one by one while others are prefilled.
        ends = [
            min(n, start + (1 if n - start <= 3 else shape.chunk))
            for n, start in zip(seq_lens, done, strict=True)
        ]
        active = [r for r, end in enumerate(ends) if end > done[r]]
        spans = [slice(done[r], ends[r]) for r in active]
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + span.stop - span.start)
        step_q, step_k, step_v = (
            torch.cat([x[r][s] for r, s in zip(active, spans, strict=True)]) for x in (q, k, v)
        )
        slots = [cache.slots(r, s.start, s.stop) for r, s in zip(active, spans, strict=True)]
        # Two tokens of padding, which must not be written anywhere.
        padding = torch.full((2,), -1)
        garbage = torch.full((2, num_kv_heads, head_size), float("nan"), dtype=dtype)
        layer.write_cache(
            torch.cat([step_k, garbage]), torch.cat([step_v, garbage]), torch.cat([*slots, padding])
        )
        out = torch.full((starts[-1] + 2, num_heads, head_size), float("nan"))
        batch = Batch(
            cache.block_table[active],
            torch.tensor(starts),
            torch.tensor([ends[r] for r in active]),
        )
        gates = [case.gates[r] for r in active]
        write_gates(
            layer,
            batch,
            [x if x is None else x[s] for x, s in zip(gates, spans, strict=True)],
        )
        layer.attend(step_q, batch, out)
        assert out[starts[-1] :].isnan().all(), "wrote behind the last query"
        for r, s, start in zip(active, spans, starts, strict=False):
            outputs[r][s] = out[start : start + s.stop - s.start]
        done, step = ends, step + 1
    assert step > 1, "nothing was decoded against the cache"

    worst = 0.0
    for output, expected, gate, *request in zip(
        outputs, case.references, case.gates, q, k, v, strict=True
    ):
        error = relative_error(output.transpose(0, 1), expected)
        if error > TOLERANCE and not variant.stateful:
            rounded = reference_of_rounded_scores(case, request, gate, window, scale)
            moved = max(relative_error(next(rounded), expected) for _ in range(4))
            error *= TOLERANCE / max(TOLERANCE, moved)
        if error > worst or math.isnan(error):  # of which nothing is larger afterwards
            worst = error
    return worst


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Where the reference is 0 (softpick of a single negative score), only 0 is right."""
    error, size = float((output - expected).abs().max()), float(expected.abs().max())
    return error / size if size else error and math.inf


def reference_of_rounded_scores(
    case: Case, request: list[Tensor], gates: Tensor | None, window: int | None, scale: float
) -> Iterator[Tensor]:
    """Return the reference's outputs where each score is off by SCORE_ROUNDING, up or down."""
    variant = case.variant
    q, k, v = request[0], *map(case.cached, request[1:])
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    positions = torch.arange(q.shape[1])
    mask = causal_mask(positions, positions, window)[None]
    rows = Rows.of(mask, case.learned, q.dtype, gates=None if gates is None else gates.mT)
    q, k = variant.transform(q, k, rows)
    if variant.uses_scale:
        q = q * scale
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    size = q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None, :]
    exact = q @ k.mT
    if case.modifiers:
        cap, slopes = case.modifiers["soft_cap"], case.modifiers["alibi_slopes"].double()
        exact = cap * (exact / cap).tanh() - slopes[:, None, None] * rows.distance
    bias = variant.score_bias(rows)
    exact = exact if bias is None else exact + bias
    while True:
        signs = torch.randint(0, 2, size.shape) * 2 - 1
        yield variant.weights(exact + SCORE_ROUNDING * size * signs, rows) @ v


FORMATS = (
    *((torch.float32, window) for window in (None, 19, 140)),
    *((torch.bfloat16, window) for window in (None, 19)),
    (torch.float16, None),
)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "window", "path"),
    # The paths take turns at one case, so that its reference is computed once.
    [
        (name, shape, *format, path)
        for name in variant_names()
        for shape in SHAPES
        for format in FORMATS
        for path in paths_of_format(name, *format)
    ],
    ids=str,
)
def test_equals_reference(
    name: str, shape: Shape, dtype: torch.dtype, window: int | None, path: str
) -> None:
    error = error_against_reference(path, name, shape, window, dtype, threads=1)
    assert error <= tolerance(path, dtype)


def quantized_cases() -> Iterator[tuple[str, Shape, KVFormat, int | None, str]]:
    """Every variant; where it matters how few bits are read, every instruction set, with one that
    reads them in every way."""
    for name in variant_names():
        for place, shape in enumerate((SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4])):
            for kv_format in KV_FORMATS.values():
                window = 19 if (place + kv_format.bits) % 8 == 0 else None
                for path in PATHS if name == "selective" else paths(name)[:2]:
                    yield name, shape, kv_format, window, path


@pytest.mark.parametrize(
    ("name", "shape", "kv_format", "window", "path"), [*quantized_cases()], ids=str
)
def test_quantized_caches_equal_reference(
    name: str, shape: Shape, kv_format: KVFormat, window: int | None, path: str
) -> None:
    """The reference sees the keys and values that `kv_quant` says the cache holds, to the bit."""
    dtype = torch.bfloat16 if shape == SHAPES[2] else torch.float32
    error = error_against_reference(path, name, shape, window, dtype, 1, kv_format)
    assert error <= tolerance(path, torch.float32)


@pytest.mark.parametrize("kv_format", KV_FORMATS.values(), ids=str)
def test_threads_write_and_read_a_quantized_cache(kv_format: KVFormat) -> None:
    """Tokens side by side share bytes; contexts are cut into parts."""
    shape = Shape(4, 2, 64, 32, 1100, 1097)
    for name in ("softmax", "lssar", "selective"):
        error = error_against_reference(PATHS[1], name, shape, 700, torch.float32, 3, kv_format)
        assert error <= TOLERANCE, name


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_split_contexts_equal_reference(name: str) -> None:
    """Long contexts are cut into parts for the threads, and the parts' results merged."""
    shape = Shape(4, 2, 32, 32, 1100, 1097)
    for dtype, window in ((torch.float32, None), (torch.float32, 700), (torch.bfloat16, None)):
        for path in paths(name)[1:]:
            for threads in (2, 5):
                error = error_against_reference(path, name, shape, window, dtype, threads)
                assert error <= tolerance(path, dtype), (path, threads, dtype, window)


@pytest.mark.parametrize(
    "name", [name for name in variant_names() if get_variant(name).takes_modifiers]
)
def test_soft_cap_and_alibi(name: str) -> None:
    """What a model asks of its layers' scores, whatever the variant makes of them."""
    for path in paths(name):
        for window, dtype in ((None, torch.float32), (19, torch.bfloat16)):
            error = error_against_reference(
                path, name, SHAPES[3], window, dtype, threads=1, modified=True
            )
            assert error <= tolerance(path, dtype), (path, window, dtype)


@pytest.mark.parametrize("path", paths("lssar")[1:])
def test_small_weights_of_many_keys(path: str) -> None:
    """lssar's kernels leave out weights that are small together, and only those: here half of
    the keys have a weight of 6e-8 each."""
    n, size = 4096, 32
    k = torch.zeros(n, 1, size)
    k[::2, 0, 0], k[1::2, 0, 0] = -1.0, 1.0
    k[1::2, 0, 1] = 1.75  # between the others, whose s is 0 and 29
    k[n // 2, 0, 0] = 1.0
    v = torch.zeros(n, 1, size)
    v[1::2, 0, 0] = 1.0
    v[n // 2, 0, 1] = 1.0
    q = torch.zeros(1, 1, size)
    q[..., 0] = 1.0
    variant = get_variant("lssar")
    dense = (x.double().transpose(0, 1) for x in (q, k, v))
    expected, _ = reference.attention(variant, *dense, scale=1.0)
    assert 1e-4 < expected[0, 0, 0] < 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        cache = Cache.make(variant, [n], 1, size, 32, dtype)
        layer = cache.layer(path, variant, 1, scale=1.0, window=None, learned={})
        layer.write_cache(k.to(dtype), v.to(dtype), cache.slots(0, 0, n))
        out = torch.zeros(1, 1, size)
        layer.attend(q, Batch(cache.block_table, torch.tensor([0, 1]), torch.tensor([n])), out)
        assert relative_error(out[0], expected[0]) <= tolerance(path, dtype)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_single_visible_key(name: str) -> None:
    for path in paths(name)[1:]:
        error = error_against_reference(path, name, SHAPES[0], 1, torch.float32, threads=1)
        assert error <= TOLERANCE, path


@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_nan_and_infinity_are_not_hidden(name: str) -> None:
    """Rows that see such a key, or have such a query, are NaN, also where the work is split; other
    rows are numbers."""
    torch.manual_seed(0)
    variant, n, size = get_variant(name), 300, 32
    options: dict[str, Any] = {"scale": 0.2, "window": None, "learned": {}}
    for path in paths(name)[1:]:
        for bad in (math.nan, math.inf):
            cache = Cache.make(variant, [n], 1, size, 32, torch.float32)
            layer = cache.layer(path, variant, 2, **options)
            q, k, v = (torch.randn(n, heads, size) for heads in (2, 1, 1))
            q[1, 0, 3], k[200, 0, 3] = bad, bad
            layer.write_cache(k, v, cache.slots(0, 0, n))
            out = torch.zeros(n, 2, size)
            batch = Batch(cache.block_table, torch.tensor([0, n]), torch.tensor([n]))
            layer.attend(q, batch, out)
            wanted = torch.zeros(n, 2, dtype=torch.bool)
            wanted[1, 0] = wanted[200:] = True
            assert torch.equal(out.isnan().all(-1), wanted), (path, bad)
            assert torch.equal(out.isfinite().all(-1), ~wanted), (path, bad)
            last = torch.zeros(1, 2, size)
            decode = Batch(cache.block_table, torch.tensor([0, 1]), torch.tensor([n]))
            layer.attend(q[-1:], decode, last)
            assert last.isnan().all(), (path, bad)


LEARNING = [name for name in variant_names() if get_variant(name).learned]


def error_far_from_the_start(path: str, name: str) -> float:
    """Return the largest error, relative to the largest output, with learned tensors around the
    values they start from and on both sides, where a formula may clamp them."""
    torch.manual_seed(0)
    variant, n, heads, scale = get_variant(name), 60, 4, 0.1
    q, k, v = (torch.randn(n, count, 32) for count in (heads, 2, 2))
    learned = {
        tensor: variant.initial(tensor) + torch.tensor([0.0, 3.0, -3.0, 1.0])
        for tensor in variant.learned
    }
    cache = Cache.make(variant, [n], 2, 32, 16, torch.float32)
    layer = cache.layer(path, variant, heads, scale=scale, window=None, learned=learned)
    layer.write_cache(k, v, cache.slots(0, 0, n))
    out = torch.zeros(n, heads, 32)
    layer.attend(q, Batch(cache.block_table, torch.tensor([0, n]), torch.tensor([n])), out)
    dense = (x.double().transpose(0, 1) for x in (q, k, v))
    expected, _ = reference.attention(variant, *dense, scale=scale, window=None, learned=learned)
    return relative_error(out, expected.transpose(0, 1))


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in LEARNING for path in paths(name)[:2]]
)
def test_learned_tensors_far_from_the_start(name: str, path: str) -> None:
    assert error_far_from_the_start(path, name) <= TORCH_TOLERANCE


@pytest.mark.parametrize("path", ISAS)
def test_16_bit_outputs(path: str) -> None:
    """Outputs are rounded to nearest, ties to even, as torch does."""
    variant = get_variant("softpick")
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        cache = Cache.make(variant, [40], 1, 32, 16, dtype)
        layer = cache.layer(path, variant, 2, scale=0.2, window=None, learned={})
        k, v, q = (torch.randn(40, heads, 32).to(dtype) for heads in (1, 1, 2))
        layer.write_cache(k, v, cache.slots(0, 0, 40))
        batch = Batch(cache.block_table, torch.tensor([0, 40]), torch.tensor([40]))
        exact, rounded = torch.empty(40, 2, 32), torch.empty(40, 2, 32, dtype=dtype)
        for out in (exact, rounded):
            layer.attend(q, batch, out)
        assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in variant_names() for path in paths(name)]
)
def test_window_never_reads_recycled_blocks(name: str, path: str) -> None:
    """Blocks before the window may belong to another request: the answer must not change."""
    torch.manual_seed(1)
    variant = get_variant(name)
    learned = {tensor: torch.ones(2) for tensor in variant.learned}
    n, window = 128, 16
    cache = Cache.make(variant, [n], 1, 32, 16, torch.float32, group=2)
    layer = cache.layer(path, variant, 2, scale=0.2, window=window, learned=learned)
    layer.write_cache(torch.randn(n, 1, 32), torch.randn(n, 1, 32), cache.slots(0, 0, n))
    whole = Batch(cache.block_table, torch.tensor([0, n]), torch.tensor([n]))
    write_gates(layer, whole, [gates_of(variant, n, 2)])
    before = cache.kv.clone()
    q = torch.randn(1, 2, 32)
    outs = []
    for recycle in (False, True):
        cache.kv.copy_(before)
        if recycle:
            cache.kv[cache.block_table[0, : (n - window) // 16].long()] = float("nan")
        out = torch.empty(1, 2, 32)
        layer.attend(q, Batch(cache.block_table, torch.tensor([0, 1]), torch.tensor([n])), out)
        outs.append(out)
    assert torch.equal(*outs)
