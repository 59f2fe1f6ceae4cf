"""The Gluon kernel for Hopper against the float64 reference: launched by the layer, its source run
by `gluon_emulator.py`, by the same test as the other kernels; and that the emulator finds errors.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attn_kernels import get_variant, reference
from attn_kernels.batch import Batch
from tests.attn_kernels import test_paged as paged
from tests.attn_kernels.cases import GPU_KERNELS
from tests.attn_kernels.test_triton import NARROW_TOLERANCE, bind, interpreter, make_layer

__all__ = ["interpreter"]

PLAIN = ["sigmoid", "sinks", "softmax", "softmax1", "softpick", "ssmax"]

Launched = list[tuple[int, int]]
"""Grids of the kernel's launches."""


def ask(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int]) -> None:
    """Let layers ask for a tile of so many rows, keys and stages of the Gluon kernel."""
    from attn_kernels.triton import tuned
    from attn_kernels.triton.tuning import DECODE, GLUON, Tile

    rows, keys, stages = tile
    asked = Tile(rows, keys, rows // 16, stages, GLUON)
    monkeypatch.setattr(
        tuned, "tuned_tile", lambda kind, *_: None if kind.phase == DECODE else asked
    )


def emulate(
    monkeypatch: pytest.MonkeyPatch,
    tile: tuple[int, int, int],
    kernel: ModuleType | None = None,
    seed: int = 0,
) -> Launched:
    """Do so, and emulate the kernel, or that of another module."""
    from attn_kernels.triton import hopper, layer
    from tests.attn_kernels import gluon_emulator

    launched: Launched = []
    seeds = itertools.count(1000 * seed)

    class Emulated:
        def __init__(self, function: Any, constants: dict[str, Any]) -> None:
            self.function = (kernel or hopper).prefill_kernel
            self.constants = constants

        def __call__(
            self, grid: tuple[int, int], *args: Any, options: Any, **constants: Any
        ) -> None:
            launched.append(grid)
            given = self.constants | constants
            gluon_emulator.run(self.function, grid, *args, seed=next(seeds), **given)

    ask(monkeypatch, tile)
    monkeypatch.setattr(layer, "INTERPRETED", False)
    monkeypatch.setattr(hopper, "Launcher", Emulated)
    monkeypatch.setattr(paged.Cache, "layer", make_layer)
    return launched


@pytest.mark.parametrize("name", PLAIN)
def test_variants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of requests of odd lengths, whose contexts are cut into parts."""
    from attn_kernels.triton import tuning

    launched = emulate(monkeypatch, (64, 64, 2))
    monkeypatch.setattr(tuning, "KEYS_OF_PART", 16)
    shape = paged.Shape(4, 2, 64, 32, 150, 60)
    error = paged.error_against_reference("132", name, shape, None, torch.float16, 1)
    assert error <= NARROW_TOLERANCE[torch.float16]
    assert max(parts for _, parts in launched) > 1


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        (paged.Shape(6, 2, 128, 16, 333, 200), (128, 128, 2)),  # 42 queries of 3 heads, 126 rows
        (paged.Shape(2, 2, 64, 128, 333, 200), (64, 64, 3)),  # tiles within a block
        (paged.Shape(20, 1, 64, 64, 150, 70), (64, 128, 4)),  # more heads than a product's rows
        (paged.Shape(2, 1, 128, 256, 300, 290), (128, 64, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", NARROW_TOLERANCE)
def test_shapes(
    shape: paged.Shape,
    tile: tuple[int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With enough queries for a whole context to a program."""
    launched = emulate(monkeypatch, tile)
    error = paged.error_against_reference("1", "softmax", shape, None, dtype, 1)
    assert error <= NARROW_TOLERANCE[dtype]
    assert launched and all(parts == 1 for _, parts in launched)


def test_requests_that_pad_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without tokens, and tokens without a request, which stay as they are."""
    launched = emulate(monkeypatch, (64, 64, 2))
    torch.manual_seed(0)
    lens, dtype = [70, 9], torch.float16
    cache = paged.Cache.make(get_variant("softmax"), lens, 1, 64, 16, dtype)
    layer = bind(get_variant("softmax"), "132", cache.kv, num_heads=2, scale=0.2)
    q, k, v = (torch.randn(79 + 5, heads, 64).to(dtype) for heads in (2, 1, 1))
    slots = torch.cat([cache.slots(0, 0, 70), cache.slots(1, 0, 9), torch.full((5,), -1)])
    layer.write_cache(k, v, slots)
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    table = cache.block_table[[0, 1, 1, 1]]
    starts, seq_lens = torch.tensor([0, 70, 79, 79, 79]), torch.tensor([70, 9, 0, 0])
    layer.attend(q, Batch(table, starts, seq_lens, max_query_len=70, max_seq_len=70), out)
    assert launched and out[79:].isnan().all()
    for tokens in (slice(0, 70), slice(70, 79)):
        given = (x[tokens].double().transpose(0, 1) for x in (q, k, v))
        expected, _ = reference.attention(layer.variant, *given, scale=0.2)
        found = out[tokens].double().transpose(0, 1)
        assert paged.relative_error(found, expected) <= NARROW_TOLERANCE[dtype]


def test_what_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the usual tile of Triton's kernel: all that the Gluon kernel does not do."""
    from attn_kernels.triton.tuning import GLUON, PREFILL, TRITON

    emulate(monkeypatch, (64, 64, 2))

    def kernel(name: str, content: int = 128, **options: Any) -> str:
        variant = get_variant(name)
        kv = torch.zeros(2, 1, 16, content, dtype=torch.float16)
        learned = {tensor: torch.ones(2) for tensor in variant.learned}
        layer = bind(variant, "1", kv, num_heads=2, scale=0.2, learned=learned, **options)
        chosen: str = layer.tile(PREFILL, torch.float16, 300).kernel
        return chosen

    contents = {"selective": 130, "forgetting": 132}
    for name in GPU_KERNELS:
        wanted = GLUON if name in PLAIN else TRITON
        assert kernel(name, contents.get(name, 128)) == wanted, name
    assert kernel("softmax", window=24) == TRITON
    assert kernel("softmax", soft_cap=5.0) == TRITON
    assert kernel("softmax", alibi_slopes=torch.ones(2)) == TRITON


BROKEN = {
    "queries are multiplied before the keys are there": (
        "mbarrier.wait(keys_filled.index(after), (i + 1) // STAGES & 1)",
        "pass",
    ),
    "values are added before they are there": (
        "mbarrier.wait(values_filled.index(stage), i // STAGES & 1)",
        "pass",
    ),
    "keys are given back before they are read": (
        "s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)",
        "mbarrier.arrive(keys_free.index(after)); "
        "s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)",
    ),
    "values are given back before they are read": (
        "            output = warpgroup_mma_wait(0, deps=[output])\n"
        "            mbarrier.arrive(values_free.index((i + STAGES - 1) % STAGES), pred=i > 0)",
        "            mbarrier.arrive(values_free.index((i + STAGES - 1) % STAGES), pred=i > 0)\n"
        "            output = warpgroup_mma_wait(0, deps=[output])",
    ),
    "nobody gives values back": ("pred=i > 0", "pred=False"),
    "a phase is the other one": ("mbarrier.wait(free.index(stage), phase ^ 1)",
                                 "mbarrier.wait(free.index(stage), phase)"),
    "a place that is not free is filled": ("mbarrier.wait(free.index(stage), phase ^ 1)", "pass"),
    "a score is used before it is there": (
        "s = warpgroup_mma_wait(1, deps=[s])", "s = warpgroup_mma_wait(2, deps=[s])",
    ),
    "too few bytes are expected": (
        "TILE.keys * SHAPE.head_size * 2", "TILE.keys * SHAPE.head_size",
    ),
    "what is behind the last key is added": ("if start + TILE.keys > end:", "if start > end:"),
    "zeros are not seen by products": (
        "there)))\n        fence_async_shared()", "there)))",
    ),
    "the last key that a query sees is not": (">= offset[None, :]", "> offset[None, :]"),
    "a tile too many has no masks": (
        "gl.minimum(position + 1, end)", "gl.minimum(position + 99, end)",
    ),
    "blocks behind the last are looked up": ("mask=key < end", "mask=key > -1"),
}  # fmt: skip


ERRORS_SHAPE = paged.Shape(1, 1, 64, 16, 275, 135)


@pytest.mark.parametrize("seed", range(3))
def test_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of copies, products and partitions; of what the next test breaks."""
    emulate(monkeypatch, (64, 64, 2), seed=seed)
    error = paged.error_against_reference("1", "softmax", ERRORS_SHAPE, None, torch.float16, 1)
    assert error <= NARROW_TOLERANCE[torch.float16]


@pytest.mark.parametrize("error", BROKEN)
def test_errors_are_found(error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The emulator stops, or outputs are wrong, of a kernel with one thing wrong."""
    from attn_kernels.triton import hopper
    from tests.attn_kernels.gluon_emulator import EmulatedError

    source = inspect.getsource(hopper)
    right, wrong = BROKEN[error]
    assert right in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    shape = ERRORS_SHAPE
    found = []
    for seed in range(5):
        emulate(monkeypatch, (64, 64, 2), broken, seed)
        try:
            found.append(
                paged.error_against_reference("1", "softmax", shape, None, torch.float16, 1)
            )
        except EmulatedError:
            return
        if not found[-1] <= NARROW_TOLERANCE[torch.float16]:
            return
    pytest.fail(f"errors of {found} only")
