"""The C++ kernels' arguments: whatever fits is computed, and nothing beyond a tensor is touched, as
`make sanitize` sees; what does not fit is refused before they get a pointer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import cpu, get_variant
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KV_FORMATS
from attn_kernels.paged import Layer, TorchLayer
from attn_kernels.pruning import PageShape
from quant_kernels import Panels, gather, multiply
from tests.attn_kernels.cases import CPU_KERNELS, make_learned, seeded
from tests.attn_kernels.test_paged import Cache, gates_of, relative_error, write_gates
from tests.quant_kernels.test_packed import in_panels, weight

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 32, 16
ROUNDS = 16


def run(
    layer: Layer,
    cache: Cache,
    lens: list[int],
    counts: list[int],
    qkv: list[Tensor],
    gates: list[Tensor | None],
) -> Tensor:
    """Store requests of these lengths and attend with the last `counts` tokens of each."""
    q, k, v = qkv
    slots = torch.cat([cache.slots(r, 0, n) for r, n in enumerate(lens)])
    layer.write_cache(k, v, slots)
    write_gates(
        layer,
        Batch(cache.block_table, torch.tensor([0, *lens]).cumsum(0), torch.tensor(lens)),
        gates,
    )
    starts = torch.tensor([0, *counts]).cumsum(0)
    out = torch.empty(q.shape, dtype=torch.float32)
    layer.attend(q, Batch(cache.block_table, starts, torch.tensor(lens)), out)
    return out


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_random_arguments(name: str) -> None:
    """The result is that of torch operations, on caches as large as they must be."""
    chance, threads = random.Random(name), torch.get_num_threads()
    variant = get_variant(name)
    try:
        for seed in range(ROUNDS):
            g = seeded(seed)
            torch.manual_seed(seed)
            torch.set_num_threads(chance.choice((1, 3)))
            kv_heads, group = chance.randint(1, 3), chance.choice((1, 2, 3, 7))
            size, block = chance.choice((32, 48, 64, 80, 256)), chance.choice((16, 32, 48, 128))
            dtype = chance.choice((torch.float32, torch.bfloat16, torch.float16))
            kv_format = chance.choice((None, None, *KV_FORMATS.values()))
            kernel = cpu.load(variant, quantized=kv_format is not None)
            assert kernel is not None
            lens = [chance.randint(1, chance.choice((40, 1500))) for _ in range(3)]
            counts = [chance.randint(0, n if n < 300 else 3) for n in lens]
            qkv = [
                torch.randn(rows, heads, size, generator=g).to(dtype)
                for rows, heads in (
                    (sum(counts), kv_heads * group),
                    (sum(lens), kv_heads),
                    (sum(lens), kv_heads),
                )
            ]
            options: dict[str, Any] = {
                "num_heads": kv_heads * group,
                "scale": size**-0.5,
                "window": chance.choice((None, 1, 37)),
                "learned": {
                    k: t.float() for k, t in make_learned(variant, kv_heads * group, g).items()
                },
                "kv_format": kv_format,
            }
            cache = Cache.make(variant, lens, kv_heads, size, block, dtype, kv_format, group)
            gates = [gates_of(variant, n, kv_heads * group) for n in lens]
            other = Cache(cache.kv.clone(), cache.block_table)
            layers = kernel.layer(cache.kv, **options), TorchLayer(variant, other.kv, **options)
            found = run(layers[0], cache, lens, counts, qkv, gates)
            expected = run(layers[1], other, lens, counts, qkv, gates)
            if found.numel():
                limit = 1e-4 if dtype == torch.float32 else 0.02
                assert relative_error(found, expected) < limit, (seed, dtype, lens, counts)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["softpick", "selective"])
def test_steps_whose_layout_changes(name: str) -> None:
    """A step takes over what the last one's calls have: it does what writing and attending do,
    whatever came before."""
    variant, chance, lens = get_variant(name), random.Random(0), [5, 30, 61]
    kernel = cpu.load(variant)
    assert kernel is not None
    dtypes = (torch.float32, torch.bfloat16)
    caches = [Cache.make(variant, [130] * 3, KV_HEADS, SIZE, BLOCK, torch.float32)]
    caches[0].kv.normal_(generator=seeded(0))
    caches.append(Cache(caches[0].kv.clone(), caches[0].block_table))
    layers = [kernel.layer(cache.kv, num_heads=HEADS, scale=0.2) for cache in caches]
    repeated = 0
    layout: tuple[Any, ...] = (1, 3, 0, "split", *dtypes[:1] * 3)
    for seed in range(60):
        g = seeded(seed)
        if chance.random() < 0.4:
            sizes = chance.choice((1, 3)), chance.randint(1, 3), chance.choice((0, 0, 1))
            kind = chance.choice(("split", "contiguous", "apart"))
            layout = *sizes, kind, *(chance.choice(dtypes) for _ in range(3))
        count, requests, padding, kind, query_dtype, key_dtype, out_dtype = layout
        starts = count * torch.arange(requests + 1)
        tokens = int(starts[-1])
        q, k, v = made(kind, tokens, g)
        q, k, v = q.to(query_dtype), k.to(key_dtype), v.to(key_dtype)
        first = [n + seed for n in lens[:requests]]
        slots = torch.cat([caches[0].slots(r, n, n + count) for r, n in enumerate(first)])
        padded = torch.cat([slots, torch.full((padding,), -1)])
        k, v = (torch.cat([x, x[:1]]) if padding else x for x in (k, v))
        batch = Batch(caches[0].block_table, starts, torch.tensor(first) + count, padded)
        outs = [torch.full((tokens, HEADS, SIZE), torch.nan, dtype=out_dtype) for _ in layers]
        last = layers[0]._layout
        layers[0].step(q, k, v, batch, outs[0])
        repeated += last is not None and layers[0]._layout is last
        layers[1].write_cache(k, v, padded)
        layers[1].attend(q, batch, outs[1])
        assert torch.equal(*outs), seed
        assert torch.equal(*(cache.kv.view(torch.int32) for cache in caches)), seed
        if chance.random() < 0.1:  # as a layer does that shares the cache
            layers[0].write_cache(k.double().float(), v.double().float(), padded)
            layers[1].write_cache(k.double().float(), v.double().float(), padded)
    assert repeated > 10


def made(kind: str, tokens: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values: parts of one tensor, tensors of their own, or strided."""
    widths = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    if kind == "split":
        parts = torch.randn(tokens, sum(widths), generator=g).split(widths, 1)
        q, k, v = (x.unflatten(1, (-1, SIZE)) for x in parts)
    elif kind == "contiguous":
        q, k, v = (torch.randn(tokens, width // SIZE, SIZE, generator=g) for width in widths)
    else:
        q, k, v = (
            torch.randn(tokens, width // SIZE, 2 * SIZE, generator=g)[..., ::2] for width in widths
        )
    return q, k, v


def fitting() -> dict[str, Any]:
    """Return arguments of one request of 40 tokens, 3 of them queries."""
    cache = Cache.make(get_variant("softpick"), [40], KV_HEADS, SIZE, BLOCK, torch.float32)
    return {
        "kv": cache.kv,
        "key": torch.randn(40, KV_HEADS, SIZE),
        "value": torch.randn(40, KV_HEADS, SIZE),
        "slots": cache.slots(0, 0, 40),
        "query": torch.randn(3, HEADS, SIZE),
        "out": torch.full((3, HEADS, SIZE), torch.nan),
        "table": cache.block_table,
        "starts": torch.tensor([0, 3]),
        "lens": torch.tensor([40]),
        "num_heads": HEADS,
        "window": None,
        "learned": {},
        "variant": "softpick",
    }


def call(given: dict[str, Any]) -> None:
    kernel = cpu.load(get_variant(given["variant"]))
    assert kernel is not None
    options = {key: given[key] for key in ("num_heads", "window", "learned")}
    layer = kernel.layer(given["kv"], scale=0.2, **options)
    layer.write_cache(given["key"], given["value"], given["slots"])
    layer.attend(
        given["query"], Batch(given["table"], given["starts"], given["lens"]), given["out"]
    )


def test_fitting_arguments() -> None:
    """What the others change one of."""
    given = fitting()
    call(given)
    assert given["out"].isfinite().all()


def with_slot(slot: int) -> Callable[[Tensor], Tensor]:
    return lambda slots: slots.index_fill(0, torch.tensor([7]), slot)


def with_block(block: int) -> Callable[[Tensor], Tensor]:
    return lambda table: table.index_fill(1, torch.tensor([1]), block)


BAD: list[tuple[str, Any, str]] = [
    ("key", lambda x: x[:39], r"key is \[39, 2, 32\], not \[at least 40, 2, 32\]"),
    ("key", lambda x: x[:, :1], r"key is \[40, 1, 32\]"),
    ("value", lambda x: x[..., :16], r"value is \[40, 2, 16\]"),
    (
        "slots",
        with_slot(6 * BLOCK),
        r"slots \d+ to 96 of a cache of 96",
    ),
    ("slots", with_slot(-2), "slots -2 to"),
    ("query", lambda x: x[:2], r"query is \[2, 4, 32\], not \[at least 3, 4, 32\]"),
    ("query", lambda x: x[:, :2], r"query is \[3, 2, 32\]"),
    ("out", lambda x: x[:2], r"out is \[2, 4, 32\]"),
    ("out", lambda x: x[..., :16], r"out is \[3, 4, 16\]"),
    ("out", lambda x: torch.empty(HEADS, 3, SIZE).transpose(0, 1), "heads of out must lie side"),
    ("table", with_block(6), "blocks beyond the 6 of the cache"),
    ("table", with_block(-1), "blocks beyond the 6 of the cache"),
    ("table", lambda x: x[:, :2], "a request of 40 tokens has only 2 blocks"),
    ("table", lambda x: x[:0], r"a batch of \[1\] lengths has .* block_table \[0, 4\]"),
    ("table", lambda x: x[0], r"block_table \[4\]"),
    ("starts", lambda x: x[:1], r"query_start_loc \[1\]"),
    ("starts", lambda x: torch.tensor([3, 1]), "query_start_loc falls"),
    ("starts", lambda x: torch.tensor([-1, 3]), "query_start_loc falls"),
    ("lens", lambda x: torch.tensor([2]), "a request has more queries than tokens"),
    ("lens", lambda x: torch.tensor([2**31 - 1]), "a request of 2147483647 tokens has only 4"),
    ("num_heads", lambda x: 3, "3 heads cannot share 2 heads"),
    ("num_heads", lambda x: 1, "1 heads cannot share 2 heads"),
    ("window", lambda x: -1, "a window of -1 tokens"),
]


@pytest.mark.parametrize(("name", "change", "says"), BAD)
def test_bad_arguments(name: str, change: Callable[[Any], Any], says: str) -> None:
    given = fitting()
    given[name] = change(given[name])
    out = given["out"].clone()
    with pytest.raises(ValueError, match=says):
        call(given)
    assert torch.equal(given["out"].isnan(), out.isnan()), "nothing was written"


def test_a_large_window_is_none() -> None:
    """Beyond what C++ counts in."""
    given, other = fitting(), fitting()
    other |= {key: given[key] for key in ("kv", "key", "value", "slots", "query", "table")}
    call(given)
    call(other | {"window": 2**32 + 1})
    assert torch.equal(given["out"], other["out"])


def test_learned_tensors_of_other_heads() -> None:
    given = fitting() | {"variant": "ssmax", "learned": {"ssmax_scale": torch.ones(3)}}
    with pytest.raises(ValueError, match=r"ssmax_scale is \[3\], not \[4\]"):
        call(given)


def pruned(**changes: Any) -> None:
    """Attend with two tokens of one request in pages for 8."""
    kernel = cpu.load(get_variant("selective"))
    assert kernel is not None
    shape = PageShape(8, KV_HEADS, SIZE, torch.float32)
    given = {
        "pages": torch.zeros(3, shape.num_bytes, dtype=torch.uint8),
        "query": torch.randn(2, HEADS, SIZE),
        "key": torch.randn(2, KV_HEADS, SIZE),
        "table": torch.tensor([[2]]),
        "out": torch.empty(2, HEADS, SIZE),
    } | changes
    layer = cpu.PrunedCPULayer(kernel, given["pages"], shape, num_heads=HEADS, scale=0.2)
    batch = Batch(given["table"], torch.tensor([0, 2]), torch.tensor([2]))
    layer.step(given["query"], given["key"], given["key"], batch, given["out"])
    assert given["out"].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"pages": torch.zeros(3, 4100, dtype=torch.uint8)},
            r"pages are \[3, 4100\], not \[\.\.\.",
        ),
        ({"query": torch.randn(2, 2, SIZE)}, r"query is \[2, 2, 32\]"),
        ({"key": torch.randn(1, KV_HEADS, SIZE)}, r"key is \[1, 2, 32\]"),
        ({"out": torch.empty(2, HEADS, 16)}, r"out is \[2, 4, 16\]"),
        ({"table": torch.tensor([[3]])}, "blocks beyond the 3 of the cache"),
    ],
)
def test_bad_arguments_of_pruned_layers(changes: dict[str, Any], says: str) -> None:
    pruned()
    with pytest.raises(ValueError, match=says):
        pruned(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"words": torch.zeros(1, 12, 16, dtype=torch.int32)}, r"does not have \d+ words"),
        ({"words": torch.zeros(2, 12, 16, dtype=torch.uint8)}, "in words of 32 bits"),
        ({"scales": torch.ones(2, 2, 16)}, r"does not have \d+ words"),
        ({"zeros": torch.zeros(2, 3, 15)}, r"does not have \d+ words"),
        ({"group_size": 48}, "4 bits in groups of 48 columns"),
        ({"group_size": 0}, "4 bits in groups of 0 columns"),
        ({"bits": 9}, "a weight of 9 bits"),
        ({"outputs": 33}, r"a matrix \[33, 96\]"),
        ({"inputs": 97}, r"a matrix \[20, 97\]"),
    ],
)
def test_matrices_of_other_shapes(changes: dict[str, Any], says: str) -> None:
    stored: Panels = in_panels(weight(4, 20, 96, 32, "integers"))._replace(**changes)
    with pytest.raises((ValueError, RuntimeError), match=says):
        multiply(torch.randn(3, stored.inputs), stored)
    with pytest.raises((ValueError, RuntimeError), match=says):
        gather(torch.tensor([3]), stored, torch.float32)


def test_bad_arguments_of_products() -> None:
    stored = in_panels(weight(4, 20, 96, 32, "integers"))
    for x in (
        torch.randn(3, 32),
        torch.randn(3, 96).double(),
        torch.ones(3, 96, dtype=torch.uint8),
    ):
        with pytest.raises(RuntimeError, match=r"x is not \[\.\.\., 96\] in float32"):
            multiply(x, stored)
    with pytest.raises(RuntimeError, match="rows are float32"):
        gather(torch.tensor([3]), stored, torch.float64)
    # Ids of another width are read as what they are.
    ids = torch.tensor([3, 19, 0])
    rows = gather(ids.int(), stored, torch.float32)
    assert torch.equal(rows, gather(ids, stored, torch.float32))


OVERFLOW = """
import torch
from tests.attn_kernels.test_arguments import call, fitting, with_slot
given = fitting()
call(given | {"slots": with_slot(6 * 16)(given["slots"])})
"""


@pytest.mark.skipif(
    "asan" not in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer: make sanitize"
)
def test_the_sanitizer_sees_an_overflow() -> None:
    """Where nobody checks the values: the control of all that it does not report."""
    done = subprocess.run(
        [sys.executable, "-c", OVERFLOW],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"ATTNSERVE_CHECKS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
