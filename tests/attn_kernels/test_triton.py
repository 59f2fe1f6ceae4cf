"""The GPU kernels against the float64 reference, in Triton's interpreter: odd shapes, random
paging, NaN in every unused slot, by the same test as the CPU's.

The interpreter multiplies bit patterns where matrices are bfloat16; here they are widened before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, get_variant, reference
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KV_FORMATS, KVFormat
from attn_kernels.pruning import PageShape
from tests.attn_kernels import test_paged as paged
from tests.attn_kernels import test_pruned_layers as pruned
from tests.attn_kernels.cases import GPU_KERNELS
from tests.attn_kernels.ranks import PrunedRanks, Ranks
from tests.attn_kernels.test_example import relu

__all__ = ["relu"]

if TYPE_CHECKING:
    from attn_kernels.triton import TritonLayer

TOLERANCE = 2e-6
NARROW_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 1e-3}
"""Weights are rounded to the queries' dtype before they meet the values, as in FlashAttention; to
bfloat16 the interpreter cuts off, which is twice as wrong (seen: 1.2e-2 and 3e-4)."""

SHAPES = (
    paged.Shape(4, 2, 32, 16, 83, 7),
    paged.Shape(3, 3, 48, 48, 131, 64),  # a head size that is no power of two
    paged.Shape(9, 3, 64, 32, 150, 90),  # nor is the group
    paged.Shape(20, 1, 32, 16, 70, 33),  # more heads to a KV head than a tensor core has rows
)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels imported from now on are interpreted, as Triton itself is (`conftest.py`).

    Triton replaces its language's functions anew at each call of a function inside a kernel, which
    was most of the time; here it does so where they are not replaced yet."""
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function: Any) -> Any:
        modules = [x for x in function.__globals__.values() if x in (language, language.core)]
        if any(language.core.is_builtin(module.load) for module in modules):
            return replace(function)
        return interpreter._LangPatchScope()

    builder = interpreter.interpreter_builder
    multiply = builder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar.is_bf16():
            bits = x.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(
            builder, "create_dot", lambda a, b, *rest: multiply(widened(a), widened(b), *rest)
        )
        yield


def launch(layer: TritonLayer, query: Tensor, batch: Batch, out: Tensor, *others: Tensor) -> None:
    """Attend with the sizes that a server knows."""
    lens = batch.query_start_loc.diff()
    sized = Batch(
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        max_query_len=int(lens.max()),
        max_seq_len=int(batch.seq_lens.max()),
        num_decodes=int((lens == 1).cumprod(0).sum()),
    )
    type(layer).attend(layer, query, sized, out, *others)


def make_layer(
    cache: paged.Cache, path: str, variant: Variant, num_heads: int, **options: Any
) -> Any:
    """In place of `Cache.layer`. `path`: processors of the device, which decide into how many parts
    a context is cut."""
    return bind(variant, path, cache.kv, num_heads=num_heads, **options)


def bind(variant: Variant, path: str, kv: Tensor, **options: Any) -> Any:
    from attn_kernels.triton import TritonLayer

    layer = TritonLayer(variant, kv, **options)
    layer.num_multiprocessors = int(path)
    # The harness calls a layer as on a CPU, without the batch's sizes.
    layer.attend = functools.partial(launch, layer)  # type: ignore[method-assign]
    return layer


def make_ranks(
    cache: paged.Cache, path: str, variant: Variant, num_heads: int, **options: Any
) -> Any:
    """Do the same on two ranks, of which one has head 0."""
    return Ranks(2, functools.partial(bind, variant, path, **options), variant, cache.kv, num_heads)


# Few processors leave a context whole, many cut it into parts.
@pytest.mark.parametrize(("window", "processors"), [(None, "132"), (24, "1")])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_equals_the_reference(
    name: str, window: int | None, processors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill in chunks and decoding, mixed; one request alone decodes against a split context."""
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    shape = SHAPES[window is not None]
    error = paged.error_against_reference(processors, name, shape, window, torch.float32, 1)
    assert error <= TOLERANCE


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_many_queries_in_parts(name: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries behind a long context: their contexts are cut, too. A block of 128 holds several
    tiles of keys, one of 16 is a part of a tile."""
    from attn_kernels.triton import tuning

    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    monkeypatch.setattr(tuning, "KEYS_OF_PART", 8)
    shape = paged.Shape(4, 2, 32, block_size, 150, 20)
    window = 70 if block_size == 16 else None
    error = paged.error_against_reference("132", name, shape, window, torch.float32, 1)
    assert error <= TOLERANCE


def test_large_heads_of_a_stateful_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop over the keys, with masks, as everything has on a GPU in float32."""
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    shape = paged.Shape(4, 2, 144, 16, 50, 20)
    error = paged.error_against_reference("1", "selective", shape, 24, torch.float32, 1)
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["lssar"])
def test_scores_that_are_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they would take too much memory, the second pass computes them again."""
    from attn_kernels.triton import layer

    monkeypatch.setattr(layer, "MOST_SCORES", 0)
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    error = paged.error_against_reference("132", name, SHAPES[0], None, torch.float32, 1)
    assert error <= TOLERANCE


@pytest.mark.parametrize(
    ("shape", "processors", "dtype"),
    [(SHAPES[0], "132", torch.float32), (SHAPES[3], "1", torch.bfloat16)],
    ids=str,
)
def test_selective_on_two_ranks(
    shape: paged.Shape, processors: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several KV heads, and one that both ranks have."""
    monkeypatch.setattr(paged.Cache, "layer", make_ranks)
    error = paged.error_against_reference(processors, "selective", shape, None, dtype, 1)
    assert error <= NARROW_TOLERANCE.get(dtype, TOLERANCE)


@pytest.mark.parametrize("kv_format", KV_FORMATS.values(), ids=str)
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_caches_of_few_bits(
    name: str, kv_format: KVFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference sees the keys and values that `kv_quant` says the cache holds."""
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    whole = (kv_format.bits == 4) == (name in ("softpick", "lssa", "softmax"))
    window, processors, shape = (24, "1", SHAPES[1]) if whole else (None, "132", SHAPES[0])
    error = paged.error_against_reference(
        processors, name, shape, window, torch.float32, 1, kv_format
    )
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in paged.LEARNING if name in GPU_KERNELS])
def test_learned_tensors_far_from_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    assert paged.error_far_from_the_start("1", name) <= paged.TORCH_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("name", ["softpick", "lssar", "selective"])
@pytest.mark.integration
def test_groups_of_any_size(name: str, shape: paged.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    assert paged.error_against_reference("16", name, shape, None, torch.float32, 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("softpick", torch.float16),
        *((name, torch.bfloat16) for name in ("softpick", "lssar", "selective")),
    ],
    ids=str,
)
def test_16_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    error = paged.error_against_reference("132", name, SHAPES[0], None, dtype, 1)
    assert error <= NARROW_TOLERANCE[dtype]


@pytest.mark.usefixtures("relu")
def test_the_example_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    error = paged.error_against_reference("132", "relu", SHAPES[0], None, torch.float32, 1)
    assert error <= TOLERANCE


class Single(NamedTuple):
    """One request's prefill: queries, what the cache holds, and outputs, `[heads, n, 32]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor


def single(name: str, dtype: torch.dtype, **options: Any) -> Single:
    """37 tokens with a scale of 0.2."""
    from attn_kernels.triton import TritonLayer

    n = 37
    torch.manual_seed(0)
    cache = paged.Cache.make(get_variant(name), [n], 2, 32, 16, torch.float32)
    kv = torch.zeros(cache.kv.shape).to(dtype)
    layer = TritonLayer(get_variant(name), kv, num_heads=4, scale=0.2, **options)
    q, k, v = torch.randn(n, 4, 32) * 2, torch.randn(n, 2, 32), torch.randn(n, 2, 32)
    slots = cache.slots(0, 0, n)
    layer.write_cache(k, v, slots)
    out = torch.full((n, 4, 32), float("nan"))
    batch = Batch(cache.block_table, torch.tensor([0, n]), torch.tensor([n]))
    launch(layer, q, batch, out)
    # What the cache holds: per block and head all keys, then all values.
    blocks = kv[cache.block_table[0, : -(-n // 16)].long()].float().flatten(2)
    k, v = (
        x.unflatten(2, (16, 32)).transpose(0, 1).flatten(1, 2)[:, :n] for x in blocks.split(512, 2)
    )
    if dtype == torch.int8:
        k, v = k * options["key_scale"], v * options["value_scale"]
    return Single(q.double().transpose(0, 1), k.double(), v.double(), out.transpose(0, 1))


@pytest.mark.parametrize("name", ["softmax", "lssa"])
def test_quantized_cache(name: str) -> None:
    """Keys and values divided by their scales and rounded, against what the cache holds."""
    scales = {"key_scale": torch.tensor([0.03]), "value_scale": torch.tensor([0.04])}
    found = single(name, torch.int8, **scales)
    assert (found.k / 0.03).abs().max() > 100
    expected, _ = reference.attention(get_variant(name), found.q, found.k, found.v, scale=0.2)
    assert paged.relative_error(found.output, expected) <= TOLERANCE


def test_soft_cap_and_alibi() -> None:
    """Against softmax of capped and biased scores, written out."""
    cap, slopes = 3.0, torch.tensor([0.5, 0.1, 0.02, 0.3])
    found = single("softmax", torch.float32, soft_cap=cap, alibi_slopes=slopes)
    k, v = (x.repeat_interleave(2, 0) for x in (found.k, found.v))
    scores = found.q @ k.mT * 0.2
    distance = (torch.arange(37)[:, None] - torch.arange(37)).double()
    scores = cap * (scores / cap).tanh() - slopes.double()[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    assert paged.relative_error(found.output, weights @ v) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("lssa", torch.float32, 5e-6), ("lssa", torch.float16, 6e-4), ("lssar", torch.float32, 1e-3)],
    ids=str,
)
def test_queries_against_all_keys(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Scores are -20 to -10 then: a softplus is e^score, and no row is 0. (lssar's power of nearly
    equal ones is known to 2e-4.)"""
    n, variant = 70, get_variant(name)
    torch.manual_seed(0)
    direction = torch.randn(1, 1, 32) * 2
    q = (torch.randn(n, 1, 32) * 0.5 - direction).to(dtype)
    k, v = (direction + torch.randn(n, 1, 32) * 0.3).to(dtype), torch.randn(n, 1, 32).to(dtype)
    cache = paged.Cache.make(variant, [n], 1, 32, 16, dtype)
    layer = bind(variant, "1", cache.kv, num_heads=1, scale=1.0)
    layer.write_cache(k, v, cache.slots(0, 0, n))
    out = torch.full((n, 1, 32), float("nan"))
    layer.attend(q, Batch(cache.block_table, torch.tensor([0, n]), torch.tensor([n])), out)
    expected, _ = reference.attention(variant, *(x.double().transpose(0, 1) for x in (q, k, v)))
    assert paged.relative_error(out.transpose(0, 1), expected) <= tolerance


@pytest.mark.parametrize("kv_format", [None, KV_FORMATS["int8_per_token_head"]], ids=str)
@pytest.mark.parametrize("name", ["softmax", "lssar", "selective"])
def test_blocks_before_a_window_are_not_read(name: str, kv_format: KVFormat | None) -> None:
    """They may be another request's, or another layer's, whose bits are NaN here."""
    n, variant = 40, get_variant(name)
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 1, 32) for _ in range(3))
    cache = paged.Cache.make(variant, [n], 1, 32, 16, torch.float32, kv_format)
    layer = bind(variant, "1", cache.kv, num_heads=1, scale=0.2, window=5, kv_format=kv_format)
    out = torch.full((n, 1, 32), float("nan"))
    for start, end in ((0, 36), (36, 39), (39, 40)):
        for block in cache.block_table[0, : max(0, start - 4) // 16]:
            cache.kv[block].view(torch.uint8).fill_(255)
        layer.write_cache(k[start:end], v[start:end], cache.slots(0, start, end))
        batch = Batch(cache.block_table, torch.tensor([0, end - start]), torch.tensor([end]))
        layer.attend(q[start:end], batch, out[start:end])
    if kv_format is not None:
        k, v = kv_format.rounded(k), kv_format.rounded(v)
    given = (x.double().transpose(0, 1) for x in (q, k, v))
    expected, _ = reference.attention(variant, *given, scale=0.2, window=5)
    assert paged.relative_error(out.transpose(0, 1), expected) <= 1e-5


@pytest.mark.parametrize("name", ["softpick", "sigmoid"])
def test_modifiers_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    error = paged.error_against_reference(
        "132", name, SHAPES[0], None, torch.float32, 1, modified=True
    )
    assert error <= TOLERANCE


def test_requests_that_pad_a_graph() -> None:
    """Requests without queries, whose rows of the block table name no block, are left alone."""
    from attn_kernels.triton import TritonLayer

    for name in ("softmax", "selective"):
        variant = get_variant(name)
        cache = paged.Cache.make(variant, [20, 18], 1, 32, 16, torch.float32)
        layer = TritonLayer(variant, cache.kv, num_heads=2, scale=0.2)
        for request, n in enumerate((20, 18)):
            layer.write_cache(
                torch.randn(n, 1, 32), torch.randn(n, 1, 32), cache.slots(request, 0, n)
            )
        table = torch.cat([cache.block_table, torch.full((3, 3), 10**9, dtype=torch.int32)])
        q = torch.randn(5, 2, 32)
        outs = []
        for padding in (0, 3):
            batch = Batch(
                table[: 2 + padding],
                torch.tensor([0, 1, 2, *[2] * padding]),
                torch.tensor([20, 18, *[0] * padding]),
            )
            before = cache.kv.clone()
            out = torch.full((5, 2, 32), float("nan"))
            launch(layer, q, batch, out)
            assert out[2:].isnan().all()
            outs.append(out[:2])
            cache.kv.copy_(before)
        assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("name", "dtype", "options", "message"),
    [
        ("lssa", torch.float32, {"soft_cap": 3.0}, "lssa attention does not support a soft cap"),
        ("ssmax", torch.float32, {"alibi_slopes": torch.ones(1)}, "does not support ALiBi"),
        ("softmax", torch.float32, {"alibi_slopes": torch.ones(2)}, r"is \[2\], not \[1\]"),
        ("softmax", torch.int8, {}, "needs key_scale and value_scale"),
    ],
)
def test_refusals(name: str, dtype: torch.dtype, options: dict[str, Any], message: str) -> None:
    from attn_kernels.triton import TritonLayer

    with pytest.raises(ValueError, match=message):
        TritonLayer(
            get_variant(name),
            torch.zeros(2, 1, 16, 64).to(dtype),
            num_heads=1,
            scale=1.0,
            learned=dict.fromkeys(get_variant(name).learned, torch.ones(1)),
            **options,
        )


@pytest.mark.parametrize(
    ("dtype", "ranks"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [
        pruned.Shape(name, *sizes)
        for name in pruned.PRUNABLE
        for sizes in ((4, 2, 32, 7, (20, 1, 7, 8)), (6, 1, 48, 2, (1, 9)))
    ],
    ids=str,
)
def test_budgets(shape: pruned.Shape, dtype: torch.dtype, ranks: int) -> None:
    """Pages of a budget, in chunks: evictions, what each query sees, and what is kept."""
    from attn_kernels.triton import TritonPrunedLayer

    def bind(page: PageShape, heads: int) -> Any:
        pages = torch.full((pruned.NUM_PAGES, page.num_bytes), 0xFF, dtype=torch.uint8)
        return TritonPrunedLayer(shape.variant, pages, page, num_heads=heads, scale=shape.scale)

    page = shape.page(dtype)
    for chunk in (3, 20):
        layer = PrunedRanks(2, bind, page, shape.heads) if ranks == 2 else bind(page, shape.heads)
        outputs = pruned.in_chunks(layer, shape, dtype, chunk)
        for output, right in zip(outputs, pruned.expected(shape, dtype), strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else NARROW_TOLERANCE[dtype]
            scale = max(1.0, float(right.abs().max()))
            torch.testing.assert_close(output.double(), right, rtol=0, atol=tolerance * scale)
