"""The registry: names, parameters, checkpoints' configurations, and a variant from outside."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attn_kernels import (
    Rows,
    Variant,
    VariantError,
    attend,
    get_variant,
    reference,
    register,
    variant_from_config,
    variant_names,
)
from attn_kernels import variant as registry
from tests.attn_kernels.cases import (
    CPU_KERNELS,
    GPU_KERNELS,
    Shape,
    causal,
    decode,
    make_inputs,
)

NINE = {
    *("softmax", "softpick", "ssmax", "lssa", "lssar", "selective"),
    *("softmax1", "sinks", "sigmoid"),
}


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return a registry to add to, forgotten after the test."""
    variant_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield


def test_names() -> None:
    assert set(variant_names()) >= NINE
    # Tests of kernels take the variants that have one.
    assert set(CPU_KERNELS) >= NINE and set(GPU_KERNELS) >= NINE
    assert list(variant_names()) == sorted(set(variant_names()))


@pytest.mark.parametrize("name", variant_names())
def test_variant_describes_itself(name: str) -> None:
    variant = get_variant(name)
    assert variant.name == name
    assert variant.paper
    assert variant == get_variant(name) and hash(variant) == hash(get_variant(name))
    assert get_variant(name, **dataclasses.asdict(variant)) == variant
    for learned in variant.learned:
        assert isinstance(variant.initial(learned), float)
    with pytest.raises(KeyError):
        variant.initial("no_such_tensor")
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("softpik", "did you mean 'softpick'"),
        ("sofmax", "did you mean 'softmax'"),
        ("SSMax", "did you mean 'ssmax'"),
        ("zzz", "known: .*selective, sigmoid, sinks, softmax"),
        ("", "known: "),
    ],
)
def test_unknown_name_suggests(name: str, says: str) -> None:
    with pytest.raises(VariantError, match=f"unknown attention variant '{name}'; .*{says}") as info:
        get_variant(name)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", variant_names())
def test_unknown_parameter(name: str) -> None:
    with pytest.raises(VariantError, match=f"'{name}' has no parameter 'colour'"):
        get_variant(name, colour=1)


BAD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("softpick", {"eps": 0.0}),
    ("softpick", {"eps": -1e-6}),
    ("softpick", {"eps": float("nan")}),
    ("softpick", {"eps": float("inf")}),
    ("softpick", {"eps": 10**400}),
    ("softpick", {"eps": 1e300}),
    ("softpick", {"eps": "1e-6"}),
    ("softpick", {"eps": None}),
    ("softpick", {"eps": True}),
    ("ssmax", {"scale": "learned"}),
    ("ssmax", {"scale": float("nan")}),
    ("ssmax", {"scale": [1.0]}),
    ("ssmax", {"bias": "no"}),
    ("ssmax", {"bias": 2}),
    ("lssar", {"power": 0.5}),
    ("lssar", {"power": float("nan")}),
    ("lssar", {"power": float("inf")}),
    ("lssar", {"power": "15"}),
    ("lssar", {"power": {}}),
]


@pytest.mark.parametrize(("name", "parameters"), BAD_VALUES, ids=str)
def test_bad_parameter_value(name: str, parameters: dict[str, Any]) -> None:
    """One line that names the variant, the parameter and the value, as a server must print it."""
    (key, value), *_ = parameters.items()
    with pytest.raises(VariantError) as info:
        variant_from_config({"attention_variant": {"name": name, **parameters}})
    message = str(info.value)
    assert (
        name in message
        and key in message
        and reprlib.repr(value) in message
        and "\n" not in message
    )


def test_whole_numbers_are_fine_where_a_float_is_asked() -> None:
    """JSON writes 15.0 as 15 in some writers."""
    assert get_variant("lssar", power=3) == get_variant("lssar", power=3.0)
    assert get_variant("ssmax", scale=1).learned == ()


def test_ssmax_learns_what_its_parameters_say() -> None:
    assert get_variant("ssmax").learned == ("ssmax_scale",)
    assert get_variant("ssmax", bias=True).learned == ("ssmax_scale", "ssmax_bias")
    assert get_variant("ssmax", scale=0.168).learned == ()
    assert get_variant("ssmax", scale=0.168, bias=True).learned == ("ssmax_bias",)


@pytest.mark.parametrize("make", [dict, SimpleNamespace], ids=["mapping", "object"])
def test_variant_from_config(make: Any) -> None:
    assert variant_from_config(make()) is None
    assert variant_from_config(make(attention_variant=None)) is None
    entry = {"name": "lssar", "power": 3.0}
    assert variant_from_config(make(attention_variant=entry)) == get_variant("lssar", power=3.0)
    assert entry == {"name": "lssar", "power": 3.0}, "the configuration is left as it was"


@pytest.mark.parametrize("make", [dict, SimpleNamespace], ids=["mapping", "object"])
@pytest.mark.parametrize(
    "entry",
    ["softpick", {}, {"power": 3}, {"name": None}, {"name": 7}, ["softpick"], 0, ""],
    ids=str,
)
def test_malformed_entry(make: Any, entry: object) -> None:
    with pytest.raises(VariantError, match=r"config\.json must look like"):
        variant_from_config(make(attention_variant=entry))


def test_config_with_an_unknown_name_or_parameter() -> None:
    with pytest.raises(VariantError, match="did you mean 'softpick'"):
        variant_from_config({"attention_variant": {"name": "softpik"}})
    with pytest.raises(
        VariantError, match="'softmax' has no parameter 'eps'; it has no parameters"
    ):
        variant_from_config({"attention_variant": {"name": "softmax", "eps": 1}})


@dataclass(frozen=True)
class Novel(Variant):
    """`sigmoid(x_ij + bias - ln n_i)`: a variant that nothing else in the project knows."""

    name: ClassVar[str] = "novel"
    paper: ClassVar[str] = "arXiv 2409.04431"

    bias: float = 0.0

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        shifted = scores + self.bias - rows.n.clamp_min(1.0).log()
        return shifted.sigmoid().masked_fill(~rows.mask, 0.0)


@pytest.mark.usefixtures("own_registry")
def test_registering_twice() -> None:
    assert register(Novel) is Novel
    assert register(Novel) is Novel, "the same class again is no clash"

    class Other(Novel):
        pass

    with pytest.raises(VariantError, match="two attention variants are named 'novel'"):
        register(Other)
    assert type(get_variant("novel")) is Novel


@pytest.mark.parametrize("bad", ["Novel", "sig moid", "", "2sig", "sig-moid"])
@pytest.mark.usefixtures("own_registry")
def test_name_must_be_a_lower_case_identifier(bad: str) -> None:
    named: type[Variant] = dataclass(frozen=True)(type("Named", (Novel,), {"name": bad}))
    with pytest.raises(VariantError, match="must be a lower-case identifier"):
        register(named)


@pytest.mark.usefixtures("own_registry")
def test_new_variant_works_everywhere_by_being_registered() -> None:
    register(Novel)
    assert "novel" in variant_names()
    with pytest.raises(VariantError, match="did you mean 'novel'"):
        get_variant("novl")
    variant = variant_from_config({"attention_variant": {"name": "novel", "bias": -0.5}})
    assert variant == Novel(bias=-0.5)

    shape = Shape(4, 2, 0, 11, 11, 4, 3)
    inputs = make_inputs(variant, shape, seed=40)
    q, k, v = inputs.qkv
    keys, values = (x.repeat_interleave(2, 0) for x in (k, v))
    n = torch.arange(1.0, 12.0, dtype=torch.float64)[:, None]
    weights = 1 / (1 + n * torch.exp(0.5 - q @ keys.mT / 2))
    want = (weights * causal(11)) @ values

    out, _ = attend(variant, q, k, v, causal(11))
    dense, state = reference.attention(variant, q, k, v)
    stepwise, _ = decode(variant, q, k, v)
    chunk, _ = reference.attention(variant, q[:, 4:9], k, v, query_start=4)
    assert state is None
    for got, expected in ((out, want), (dense, want), (stepwise, want), (chunk, want[:, 4:9])):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    windowed, _ = reference.attention(variant, q, k, v, window=3)
    decoded, _ = decode(variant, q, k, v, window=3)
    torch.testing.assert_close(windowed, decoded, rtol=1e-12, atol=1e-13)


def test_the_test_variant_is_gone() -> None:
    assert "novel" not in variant_names()


@pytest.mark.usefixtures("own_registry")
def test_another_package_registers_through_its_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def found(*, group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return [SimpleNamespace(load=lambda: register(Novel))]

    monkeypatch.setattr(registry, "entry_points", found)
    registry._load_all.__wrapped__()
    assert asked == ["attnserve.variants"]
    assert isinstance(get_variant("novel"), Novel)
