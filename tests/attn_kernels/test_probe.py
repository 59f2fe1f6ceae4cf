"""What a variant may know of a row: position, head, visible keys, length, distances and learned
tensors, the same in Python, C++ and Triton; and sinks of any size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from attn_kernels import Rows, get_variant, reference, register, variant_names
from attn_kernels import variant as registry
from attn_kernels.batch import Batch
from tests.attn_kernels import test_paged as paged
from tests.attn_kernels import test_triton as triton
from tests.attn_kernels.cases import Shape, make_inputs
from tests.attn_kernels.probe import Probe
from tests.attn_kernels.test_triton import interpreter

__all__ = ["interpreter"]


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register it for one test."""
    variant_names()  # loads what there is
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register(Probe)
    yield
    paged.make_case.cache_clear()


@pytest.mark.parametrize("window", [None, 4])
def test_reference_equals_the_formula(window: int | None) -> None:
    """Entry by entry, in Python's floats."""
    inputs = make_inputs(Probe(), Shape(4, 2, 0, 11, 11, 4, 3), seed=3)
    got, _ = reference.attention(Probe(), *inputs.qkv, window=window, learned=inputs.learned)
    for head in range(4):
        slope, sink = (float(inputs.learned[name][head]) for name in Probe().learned)
        for i in range(11):
            seen = range(0 if window is None else max(0, i - window + 1), i + 1)
            q, keys = inputs.q[head, i], inputs.k[head // 2]
            temperature = (1 + math.log(1 + i)) / (1 + float(q.norm())) / math.sqrt(4)
            y = [temperature * float(q @ keys[j]) - slope * math.sqrt(i - j) for j in seen]
            total = math.exp(sink) + sum(map(math.exp, y))
            part = len(seen) / (len(seen) + 1)
            weights = torch.tensor([part * math.exp(x) / total for x in y], dtype=torch.float64)
            expected = weights @ inputs.v[head // 2, seen.start : seen.stop]
            torch.testing.assert_close(got[head, i], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("shape", [paged.SHAPES[0], paged.SHAPES[3]], ids=str)
@pytest.mark.parametrize("path", paged.PATHS[:2])
def test_cpu_kernels(path: str, shape: paged.Shape, window: int | None) -> None:
    error = paged.error_against_reference(path, "probe", shape, window, torch.float32, 1)
    assert error <= paged.tolerance(path, torch.float32)


@pytest.mark.parametrize("name", ["probe", "sinks"])
def test_split_contexts(name: str) -> None:
    """A sink counts once, however many parts a context has."""
    shape = paged.Shape(4, 2, 32, 32, 1100, 1097)
    error = paged.error_against_reference(paged.PATHS[1], name, shape, None, torch.float32, 3)
    assert error <= paged.TOLERANCE


@pytest.mark.parametrize(("window", "processors"), [(None, "132"), (24, "1")])
def test_triton_kernels(
    window: int | None, processors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged.Cache, "layer", triton.make_layer)
    shape = triton.SHAPES[window is not None]
    error = paged.error_against_reference(processors, "probe", shape, window, torch.float32, 1)
    assert error <= triton.TOLERANCE


@pytest.mark.parametrize("path", [*paged.PATHS[:2], "132"])
def test_sinks_of_any_size(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-infinity is softmax; one far above the scores takes all the weight; the others are exact."""
    n, sinks = 70, torch.tensor([-torch.inf, -300.0, 0.0, 20.0, 300.0, 3e37])
    variant, learned = get_variant("sinks"), {"sinks": sinks}
    torch.manual_seed(0)
    cache = paged.Cache.make(variant, [n], 2, 32, 16, torch.float32)
    if path == "132":
        monkeypatch.setattr(paged.Cache, "layer", triton.make_layer)
    layer = cache.layer(path, variant, 6, scale=0.2, learned=learned)
    q, k, v = torch.randn(n, 6, 32) * 2, torch.randn(n, 2, 32), torch.randn(n, 2, 32)
    layer.write_cache(k, v, cache.slots(0, 0, n))
    out = torch.empty(n, 6, 32)
    # All but the last; that alone is decoded, against a context in parts.
    for first, end in ((0, n - 1), (n - 1, n)):
        batch = Batch(cache.block_table, torch.tensor([0, end - first]), torch.tensor([end]))
        layer.attend(q[first:end], batch, out[first:end])
    qkv = [x.double().transpose(0, 1) for x in (q, k, v)]
    want, _ = reference.attention(variant, *qkv, scale=0.2, learned=learned)
    plain, _ = reference.attention(get_variant("softmax"), *qkv, scale=0.2)
    torch.testing.assert_close(want[:2], plain[:2], rtol=1e-12, atol=1e-13)
    assert (want[5] == 0).all() and want.isfinite().all()
    torch.testing.assert_close(out.transpose(0, 1).double(), want, rtol=0, atol=1e-5)
    assert (out[:, 5] == 0).all()
    small = out[:, 3].double(), want[3].mT.T  # 2^-29 of softmax's, and as exact
    torch.testing.assert_close(small[0], small[1], rtol=1e-4, atol=1e-12)


def test_distances_and_positions_of_a_mask() -> None:
    """Of padded and packed sequences, whose keys lie anywhere, the mask tells distances."""
    mask = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    rows = Rows.of(mask, {}, torch.float64)
    assert rows.n.flatten().tolist() == [1, 2, 2]
    assert rows.position.flatten().tolist() == [2, 3, 4]
    assert rows.distance[mask].tolist() == [0, 1, 0, 1, 0]
    given = Rows.of(mask, {}, torch.float64, torch.tensor([[0], [1], [2]]))
    assert given.position.flatten().tolist() == [0, 1, 2]
