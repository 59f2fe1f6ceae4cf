"""What is compiled: our layer, packed products and vLLM's kernel, called as a server calls them.

Import it after the environment of Triton and vLLM is set.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends import backends

from attn_kernels import get_variant, variant_names
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KV_FORMATS
from attn_kernels.paged import content_bytes
from attn_kernels.pruning import PageShape
from attn_kernels.triton import TritonLayer, TritonPrunedLayer, training
from attn_kernels.triton.tuned import trying
from attn_kernels.triton.tuning import GLUON, Tile
from attn_kernels.triton.variant import functions, has_kernel, is_plain, missing_derivative
from benchmarks.gpu_peers import call_unified, scratch
from benchmarks.triton_compile.dry import Compiled, DryCompiler
from quant_kernels import Panels
from quant_kernels import triton as packed

PACKED_ROWS = (4, 16, 32, 64, 256, 0)
"""Rows of x, a tile for each; with 256 the matrix is unpacked; 0: a lookup."""

TWO_LEVEL = "two-level"
OUTPUTS, INPUTS, GROUP_SIZE = 4096, 2048, 64
NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, CONTEXT, REQUESTS = 32, 8, 16, 4096, 3
CACHE_BYTES = 2**31 + 2**24
"""A served cache has more than 2 GiB, and AMD's code for smaller ones is another. Never touched."""

LARGE_PAGES = (64, 128)
"""Other block sizes."""

PEER_VARIANTS, PEER_DTYPES = ("softmax", "softpick", "ssmax"), ("bfloat16", "float16")
"""What is compared with vLLM's softmax. In float32 vLLM multiplies in TF32; float8 it scales
elsewhere."""

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300."""

HEAD_DIMS = (64, 128, 256)
DTYPES = ("float32", "bfloat16", "float16", "float8", *KV_FORMATS)
"""Of queries and of the cache; float8: bfloat16 queries and a float8_e4m3fn cache; bfloat16
queries, too, with the formats of quantized caches."""

FLOAT8_ARCHS = ("sm_90", "sm_100")
"""Which convert it; Triton refuses it for sm_80, and CDNA3's format is another."""

DECODE, SPLIT, PREFILL, WRITE = PHASES = ("decode", "decode-split", "prefill", "write")
"""One query a request; the same with contexts in parts; many queries; writing the cache."""

ON_HOPPER = "prefill-gluon"
"""Many queries with the kernel in Gluon, which tables may name."""

GLUON_TILE = Tile(128, 128, 8, 2, GLUON)

BUDGETS = (256, 1024, 4096, 16384)
"""Tokens of a page, of variants that can be pruned; the phase is called "budget-256"."""

Case = dict[str, Any]
"""Its values, in order and separated by spaces, are its name."""

Pair = tuple[Compiled, Compiled | None]
"""A kernel of ours, and vLLM's with the same tile where they can be compared."""


def packed_cases() -> Iterator[Case]:
    """Yield products and lookups, with a scale and a zero point in each group and with two-level
    scales; nothing but a cache is stored in float8."""
    for arch, dtype, bits, rows in product(ARCHS, DTYPES[:3], range(2, 9), PACKED_ROWS):
        case = {"arch": arch, "dtype": dtype, "bits": bits, "rows": rows}
        yield case
        yield case | {"scales": TWO_LEVEL}


def compile_packed(compiler: DryCompiler, case: Case) -> list[Pair]:
    """Compile what a server launches for so many rows of x."""
    kind, bits = getattr(torch, case["dtype"]), case["bits"]
    two_level = case.get("scales") == TWO_LEVEL
    group_size = (16 if bits == 2 else 32) if two_level else GROUP_SIZE
    panels, groups = OUTPUTS // 16, INPUTS // group_size
    words = torch.empty(panels, INPUTS * bits // 32, 16, dtype=torch.int32)
    scales = torch.empty(panels, 1 if two_level else groups, 16, dtype=torch.bfloat16)
    zeros = torch.empty(panels, groups, 16, dtype=torch.int8 if two_level else torch.uint8)
    weight = Panels(words, scales, zeros, bits, group_size, OUTPUTS, INPUTS)
    with compiler.target(case["arch"]) as found:
        if case["rows"] >= packed.UNPACKED_ROWS:
            packed.unpack(weight, kind, 0, OUTPUTS)
        elif case["rows"]:
            x = torch.empty(case["rows"], INPUTS, dtype=kind)
            packed.multiply(x, weight, case["arch"])
        else:
            ids = torch.zeros(3, dtype=torch.int64)
            packed.gather(ids, weight, kind)
    return [(kernel, None) for kernel in found]


def attention_cases() -> Iterator[Case]:
    """Yield the matrix, of variants that have a `kernel.py`. Writing differs between variants only
    by what they keep of a token beside key and value; large pages come in bfloat16."""
    names = [name for name in variant_names() if has_kernel(get_variant(name))]
    kept = {(get_variant(name).stateful, get_variant(name).gated): name for name in names}
    writers = kept.values()
    for arch, head_dim, dtype in product(ARCHS, HEAD_DIMS, DTYPES):
        if dtype == "float8" and arch not in FLOAT8_ARCHS:
            continue
        for variant, phase in product(names, PHASES):
            if phase != WRITE or variant in writers:
                case = {"arch": arch, "head_dim": head_dim, "dtype": dtype}
                case |= {"variant": variant, "phase": phase}
                yield case
                if dtype == "bfloat16" and phase in (DECODE, PREFILL):
                    yield from (case | {"block_size": size} for size in LARGE_PAGES)
    plain = [name for name in names if is_plain(functions(get_variant(name)))]
    for head_dim, dtype, variant in product(HEAD_DIMS[:2], ("bfloat16", "float16"), plain):
        case = {"arch": "sm_90", "head_dim": head_dim, "dtype": dtype}
        case |= {"variant": variant, "phase": ON_HOPPER}
        yield case
        yield from (case | {"block_size": size} for size in LARGE_PAGES)
    prunable = [name for name in names if get_variant(name).prunable]
    for arch, head_dim, dtype in product(ARCHS, HEAD_DIMS, DTYPES[:3]):
        for variant, budget in product(prunable, BUDGETS):
            case = {"arch": arch, "head_dim": head_dim, "dtype": dtype}
            yield case | {"variant": variant, "phase": f"budget-{budget}"}


def training_cases() -> Iterator[Case]:
    """Yield what training launches: `training.attention` and its backward."""
    names = [name for name in variant_names() if not missing_derivative(get_variant(name))]
    for arch, head_dim, dtype, name in product(ARCHS, HEAD_DIMS, DTYPES[:3], names):
        yield {"arch": arch, "head_dim": head_dim, "dtype": dtype, "variant": name}


def compile_training(compiler: DryCompiler, case: Case) -> list[Pair]:
    """Compile what one layer launches forth and back."""
    variant, dtype = get_variant(case["variant"]), getattr(torch, case["dtype"])
    q, k, v = (
        torch.empty(2, heads, 512, case["head_dim"], dtype=dtype, requires_grad=True)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    learned = {name: torch.ones(NUM_HEADS, requires_grad=True) for name in variant.learned}
    gates = torch.zeros(q.shape[:3], requires_grad=True) if variant.gated else None
    with compiler.target(case["arch"]) as found:
        training.attention(variant, q, k, v, learned=learned, gates=gates).sum().backward()
    return [(kernel, None) for kernel in found]


def batch_of(phase: str, block_size: int = BLOCK_SIZE, requests: int = REQUESTS) -> Any:
    """Return requests of CONTEXT tokens: the last of each, or the last 100, are new."""
    queries = 100 if phase in (PREFILL, ON_HOPPER) else 1
    return Batch(
        torch.zeros(requests, CONTEXT // block_size, dtype=torch.int32),
        torch.arange(requests + 1) * queries,
        torch.full((requests,), CONTEXT),
        max_query_len=queries,
        max_seq_len=CONTEXT,
    )


def empty_cache(content: int, dtype: Any, block_size: int = BLOCK_SIZE) -> Any:
    """Return `[num_blocks, num_kv_heads, block_size, bytes of the content]`, as vLLM's and ours."""
    shape = (NUM_KV_HEADS, block_size, content // dtype.itemsize)
    block = torch.Size(shape).numel() * dtype.itemsize
    return torch.empty(CACHE_BYTES // block, *shape, dtype=dtype)


def types_of(case: Case) -> tuple[Any, Any]:
    """Return the types of queries and of the cache."""
    if case["dtype"] == "float8":
        return torch.bfloat16, torch.float8_e4m3fn
    if case["dtype"] in KV_FORMATS:
        return torch.bfloat16, torch.uint8
    return getattr(torch, case["dtype"]), getattr(torch, case["dtype"])


def attention_call(case: Case, requests: int = REQUESTS) -> Callable[[], None]:
    """Return a call of our layer, with memory of its own."""
    variant, (query_dtype, cache_dtype) = get_variant(case["variant"]), types_of(case)
    kv_format, block_size = KV_FORMATS.get(case["dtype"]), case.get("block_size", BLOCK_SIZE)
    group = NUM_HEADS // NUM_KV_HEADS
    content = content_bytes(variant, case["head_dim"], cache_dtype, kv_format, group=group)
    layer = TritonLayer(
        variant,
        empty_cache(content, cache_dtype, block_size),
        kv_format=kv_format,
        num_heads=NUM_HEADS,
        scale=case["head_dim"] ** -0.5,
        learned={name: torch.ones(NUM_HEADS) for name in variant.learned},
        key_scale=torch.ones(1),
        value_scale=torch.ones(1),
        arch=case["arch"],
    )
    # 132 with 3 requests of 8 KV heads takes 16 parts, 1 none.
    layer.num_multiprocessors = 132 if case["phase"] == SPLIT else 1
    batch = batch_of(case["phase"], block_size, requests)
    tokens = int(batch.query_start_loc[-1])
    query = torch.empty(tokens, NUM_HEADS, case["head_dim"], dtype=query_dtype)
    if case["phase"] != WRITE:
        out = torch.empty_like(query)
        if case["phase"] == ON_HOPPER:
            return lambda: attend_with(GLUON_TILE, layer, query, batch, out)
        return lambda: layer.attend(query, batch, out)
    new, slots = query[:, :NUM_KV_HEADS].contiguous(), torch.arange(tokens)
    gates = torch.empty(tokens, NUM_HEADS)

    def write() -> None:
        layer.write_cache(new, new, slots)
        if variant.gated:
            layer.write_gates(gates, batch)

    return write


def attend_with(tile: Tile, layer: TritonLayer, *given: Any) -> None:
    """Attend with a tile, whatever tables say."""
    with trying(tile):
        layer.attend(*given)


def compile_attention(compiler: DryCompiler, case: Case, peer: Vllm) -> list[Pair]:
    """Compile what our layer launches, and vLLM's kernel where the two can be compared."""
    if case["phase"].startswith("budget"):
        return compile_budget(compiler, case)
    with compiler.target(case["arch"]) as found:
        attention_call(case)()
    compared = case["variant"] in PEER_VARIANTS and case["dtype"] in PEER_DTYPES
    return [
        (kernel, peer.compile(compiler, case, kernel))
        if compared and kernel.name == "attend_kernel"
        else (kernel, None)
        for kernel in list(found)
    ]


def compiled_kernels(
    compiler: DryCompiler, case: Case, requests: Sequence[int]
) -> dict[int, list[str]]:
    """Return the names of the kernels that are compiled for batches of so many requests, one batch
    after the other. `compiler` keeps kernels; what it has compiled before does not count."""
    names = {}
    for number in requests:
        with compiler.target(case["arch"]) as found:
            attention_call(case, number)()
        names[number] = [kernel.name for kernel in found]
    return names


def host_time(compiler: DryCompiler, case: Case, rounds: int = 50, calls: int = 40) -> float:
    """Return the seconds that a call of our layer takes once its kernels are compiled, without what
    Triton's launcher in C and the GPU's driver add: the fastest round's mean. `compiler` keeps
    kernels."""
    with compiler.target(case["arch"]):
        call = attention_call(case)
        call()
        return min(timeit.repeat(call, number=calls, repeat=rounds)) / calls


def compile_budget(compiler: DryCompiler, case: Case) -> list[Pair]:
    """Compile what a layer within a budget launches for a prefill and, where it is another kernel,
    for decoding."""
    budget, (dtype, _) = int(case["phase"].partition("-")[2]), types_of(case)
    shape = PageShape(budget, NUM_KV_HEADS, case["head_dim"], dtype)
    layer = TritonPrunedLayer(
        get_variant(case["variant"]),
        torch.empty(REQUESTS, shape.num_bytes, dtype=torch.uint8),
        shape,
        num_heads=NUM_HEADS,
        scale=case["head_dim"] ** -0.5,
        arch=case["arch"],
    )
    compiled: list[Compiled] = []
    for phase in (PREFILL, DECODE):
        batch = batch_of(phase)
        query, key, value = (
            torch.empty(int(batch.query_start_loc[-1]), heads, case["head_dim"], dtype=dtype)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )
        with compiler.target(case["arch"]) as found:
            layer.step(query, key, value, batch, torch.empty_like(query))
        compiled += [kernel for kernel in found if phase == PREFILL or "STORE" in kernel.constants]
    return [(kernel, None) for kernel in compiled]


class Vllm:
    """vLLM's Triton kernel, launched by vLLM's own code although it sees no GPU."""

    def __init__(self) -> None:
        # vLLM's CPU build hides Triton unless it has a backend of this name; only that is asked.
        hidden = "cpu" not in backends
        if hidden:
            backends["cpu"] = SimpleNamespace(driver=None)
        try:
            from vllm.v1.attention.ops import triton_unified_attention as module
        finally:
            if hidden:
                del backends["cpu"]
        self.module: Any = module
        self.kernel: Any = module.kernel_unified_attention

    def compile(self, compiler: DryCompiler, case: Case, ours: Compiled) -> Compiled:
        """Compile what vLLM launches for the batch of a case that does not write the cache: softmax
        whatever the variant, with the tile, warps and stages of our kernel."""
        dtype, _ = types_of(case)
        block_size = case.get("block_size", BLOCK_SIZE)
        batch, dim = batch_of(case["phase"], block_size), case["head_dim"]
        tokens = int(batch.query_start_loc[-1])
        query = torch.empty(tokens, NUM_HEADS, dim, dtype=dtype)
        # As vLLM's backend TRITON_ATTN takes its cache apart.
        cache = empty_cache(2 * dim * dtype.itemsize, dtype, block_size)
        keys, values = cache.transpose(1, 2).split(dim, dim=-1)
        descale = torch.ones(1).expand(batch.seq_lens.shape[0], keys.shape[2])
        split = case["phase"] == SPLIT
        parts = scratch(tokens, NUM_HEADS, dim, tokens) if split else {}
        group_rows = ours.constants["ROWS"]
        tile = {"BLOCK_M": group_rows, "BLOCK_Q": group_rows // ours.constants["GROUP"]}
        tile |= {"TILE_SIZE": ours.constants["KEYS"]}
        tile |= {"num_warps": ours.num_warps, "num_stages": ours.num_stages}
        self.module.kernel_unified_attention = Retiled(self.kernel, tile)
        platform = self.module.current_platform
        family = case["arch"].removeprefix("sm_")
        # What vLLM asks of the GPU when it chooses its tile.
        self.module.current_platform = SimpleNamespace(
            fp8_dtype=platform.fp8_dtype,
            is_device_capability_family=lambda wanted: family == str(wanted),
        )
        try:
            with compiler.target(case["arch"]) as found:
                out = torch.empty_like(query)
                call = self.module.unified_attention
                call_unified(call, query, keys, values, out, batch, descale, **parts)
        finally:
            self.module.current_platform = platform
            self.module.kernel_unified_attention = self.kernel
        (kernel,) = [each for each in found if each.name == self.kernel.__name__]
        return kernel


class Retiled:
    """vLLM's kernel launched with another tile."""

    def __init__(self, kernel: Any, tile: dict[str, int]) -> None:
        self.kernel, self.tile = kernel, tile

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.kernel[grid](**{**arguments, **self.tile})
