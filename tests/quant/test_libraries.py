"""The schemes that are other libraries': what they return, beside ours, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnserve.errors import UserError
from attnserve.evaluation.scorers import load
from quant.model import quantize
from quant.schemes import registry
from quant.schemes.registry import SCHEMES, Scheme, get_scheme, installed
from quant_kernels.weight import QuantizedWeight, QuantSpec

pytestmark = pytest.mark.integration


def needs(name: str) -> Scheme:
    """Return a scheme whose library is there; else skip the test."""
    scheme = get_scheme(name)
    assert scheme.library is not None
    if not installed(scheme.library):
        pytest.skip(f"{scheme.library} is not installed: pip install {scheme.requirement}")
    return scheme


def matrix(columns: int = 256) -> Tensor:
    return torch.randn(48, columns, generator=torch.manual_seed(1)) * 0.05


def error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Mean square."""
    return float((weight - quantized.dequantize()).square().mean())


@pytest.mark.parametrize(
    ("name", "spec", "ours", "factor"),
    [
        ("quanto", QuantSpec(2, 64), "rtn", 1.2),
        ("quanto", QuantSpec(4, 64), "rtn", 1.05),
        ("quanto", QuantSpec(8, None, True), "rtn", 1.05),
        *(("hqq-library", QuantSpec(bits, 64), "hqq", 1.2) for bits in (2, 3, 4, 5, 6, 8)),
        ("hqq-library", QuantSpec(4, None), "hqq", 1.1),
        ("bnb-nf4", QuantSpec(4, 64), "rtn", 1.5),
        ("bnb-fp4", QuantSpec(4, 64), "rtn", 2.5),  # most of its values are near 0
        ("bnb-int8", QuantSpec(8, None, True), "rtn", 1.05),
    ],
)
def test_as_good_as_ours(name: str, spec: QuantSpec, ours: str, factor: float) -> None:
    scheme, weight = needs(name), matrix()
    scheme.check(spec, {weight.shape[1]})
    found, own = scheme(weight, spec), get_scheme(ours)(weight, spec)
    assert found.values.shape == weight.shape and found.values.dtype == torch.uint8
    assert int(found.values.max()) <= spec.qmax
    assert error(weight, own) / factor < error(weight, found) < error(weight, own) * factor
    assert found.packed_bytes <= own.packed_bytes * 1.4  # 32-bit scales, not 16


def test_int8_of_two_libraries_is_the_same() -> None:
    """Both take the row's largest number for 127."""
    spec, weight = QuantSpec(8, None, True), matrix(688)
    quanto, bitsandbytes = needs("quanto")(weight, spec), needs("bnb-int8")(weight, spec)
    assert torch.equal(quanto.values, bitsandbytes.values)
    torch.testing.assert_close(quanto.dequantize(), bitsandbytes.dequantize())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [32, 128])
def test_bitsandbytes_gives_the_same_back(kind: str, size: int) -> None:
    scheme, weight = needs(f"bnb-{kind}"), matrix()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight, blocksize=size, compress_statistics=False, quant_type=kind
    )
    found = scheme(weight, QuantSpec(4, size)).dequantize()
    torch.testing.assert_close(found, dequantize_4bit(packed, state), atol=1e-6, rtol=0)


def test_blocks_that_go_on_in_the_next_row() -> None:
    """Every value is the nearest of its block's values: the library's own CPU kernel that gives
    numbers back is wrong here."""
    weight, size = matrix(688), 64
    found = needs("bnb-nf4")(weight, QuantSpec(4, size)).dequantize().flatten()
    # A column of -1 to 1 in small steps takes every value of the table.
    values = (
        needs("bnb-nf4")(torch.linspace(-1, 1, 4096)[None], QuantSpec(4, 4096))
        .dequantize()
        .unique()
    )
    assert len(values) == 16
    for start in range(0, weight.numel(), size):
        block = weight.flatten()[start : start + size]
        reach = values * block.abs().max()
        nearest = reach[(block[:, None] - reach).abs().argmin(1)]
        torch.testing.assert_close(found[start : start + size], nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("columns", [128, 688])
def test_hqq_gives_the_same_back(bits: int, columns: int) -> None:
    scheme, weight = needs("hqq-library"), matrix(columns)
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = nn.Linear(columns, len(weight), bias=False)
    layer.weight.data = weight
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    theirs = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
    found = scheme(weight, QuantSpec(bits, 64)).dequantize()
    torch.testing.assert_close(found, theirs.dequantize().float(), atol=4e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["hqq-library", "bnb-nf4", "bnb-int8", "quanto"])
def test_models(name: str, softpick: Path) -> None:
    scheme = needs(name)
    spec = {"bnb-int8": QuantSpec(8, None, True)}.get(name, QuantSpec(4, 64))
    model = load(softpick)
    found = quantize(model, scheme, spec, torch.empty(0))
    parameters = dict(model.named_parameters())
    for layer, quantized in found.items():
        assert torch.equal(parameters[f"{layer}.weight"], quantized.dequantize())


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("quanto", QuantSpec(3, 64), "scheme quanto cannot do 3 bits: it has 2, 4, 8"),
        ("quanto", QuantSpec(8, 64), "use --group-sizes channel --symmetric"),
        ("quanto", QuantSpec(4, 64, True), "leave out --symmetric"),
        (
            "hqq-library",
            QuantSpec(7, 64),
            "scheme hqq-library cannot do 7 bits: it has 2, 3, 4, 5, 6, 8",
        ),
        ("hqq-library", QuantSpec(4, 64, True), "has no symmetric form"),
        ("bnb-nf4", QuantSpec(8, 64), "scheme bnb-nf4 cannot do 8 bits: it has 4"),
        (
            "bnb-nf4",
            QuantSpec(4, 48),
            "has blocks of 32, 64, 128, 256, 512, 1024, 2048, 4096: use one",
        ),
        ("bnb-fp4", QuantSpec(4, None), "has blocks of 32"),
        ("bnb-fp4", QuantSpec(4, 64, True), "has a table of its own, with 0 in it"),
        ("bnb-int8", QuantSpec(8, 64, True), "use --group-sizes channel --symmetric"),
    ],
)
def test_what_a_library_lacks_is_refused(name: str, spec: QuantSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_scheme(name).check(spec, {128})


def test_a_missing_library_is_one_line_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "installed", lambda library: False)
    for scheme in SCHEMES.values():
        if scheme.library is None:
            continue
        rows = scheme.name in ("quanto", "bnb-int8")
        spec = QuantSpec(8, None, True) if rows else QuantSpec(4, 64)
        with pytest.raises(UserError) as refused:
            scheme.check(spec, {128})
        line = str(refused.value)
        assert f"pip install {scheme.requirement}, or leave the scheme out" in line
        assert "\n" not in line and "==" in line


def test_installed() -> None:
    assert installed("torch") and not installed("no_such_library")
    assert not installed("no_such_library.part")
