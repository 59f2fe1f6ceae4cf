"""Whole sequences by a GPU's kernels (here in Triton's interpreter) inside transformers.

Loss and gradients are those of torch operations in float64, whatever the mask, and calls that
kernels do not know are computed as before.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attn_kernels import get_variant, variant_names
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM, kernels
from tests.attn_kernels.test_triton import interpreter

__all__ = ["interpreter"]

TOKENS, VOCABULARY = 37, 29


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels take what is on a CPU."""
    monkeypatch.setattr(kernels, "on_gpu", lambda x: x.dtype != torch.float64)


def model_of(name: str, layers: int = 1, **options: Any) -> VariantLlamaForCausalLM:
    """Return a model whose attention is far from uniform, in training."""
    torch.manual_seed(0)
    config = VariantLlamaConfig(
        attention_variant={"name": name},
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=24,
        initializer_range=0.3,
        **options,
    )
    model = VariantLlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape == (3,):
                parameter += torch.linspace(-0.3, 0.3, 3)
    return model.train()


def batch(kind: str) -> dict[str, Tensor]:
    """Return two sequences as a model takes them."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    given = {"input_ids": ids}
    if kind in ("left", "right"):
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, slice(0, 9) if kind == "left" else slice(-9, None)] = 0
    if kind == "packed":
        lengths = (12, 25)
        given["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    return given


def results_of(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """Return logits of tokens and the gradients of a loss of theirs."""
    model.zero_grad()
    logits = model(**given, use_cache=False).logits
    tokens = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    cross_entropy(logits[tokens], given["input_ids"][tokens]).backward()
    return [logits[tokens].detach(), *(p.grad.detach().clone() for p in model.parameters())]


def assert_close(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


KINDS = ("left", "right", "packed")
CASES = [(name, KINDS[i % 3]) for i, name in enumerate(variant_names())]
CASES += [("selective", kind) for kind in KINDS if ("selective", kind) not in CASES]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets the arguments of each launch."""
    found: list[Any] = []
    attend = kernels.attend

    def counted(*arguments: Any) -> Tensor:
        found.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(kernels, "attend", counted)
    return found


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_of_a_model(name: str, kind: str, launched: list[Any]) -> None:
    """With padding, or several texts in a sequence; the second with a sliding window."""
    model, given = model_of(name, sliding_window=11 if kind == "right" else None), batch(kind)
    found = results_of(model, given)
    assert len(launched) == 1
    assert_close(found, results_of(model.double(), given), 1e-4)


@pytest.mark.parametrize("name", ["softpick", "selective", "forgetting"])
def test_without_gradients(name: str, launched: list[Any]) -> None:
    """A whole prompt is the kernels', with and without a cache; what is decoded with that is not,
    and finds in it what it needs."""
    model, given = model_of(name, layers=2).eval(), batch("left")
    both = torch.cat((given["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    with torch.no_grad():
        wanted = model.double()(**given, use_cache=False).logits
        assert not launched
        next_wanted = model(
            torch.cat((given["input_ids"], torch.tensor([[3], [5]])), 1), both, use_cache=False
        ).logits[:, -1:]
        model.float()
        found = [model(**given, use_cache=use_cache) for use_cache in (False, True)]
        assert len(launched) == 4
        decoded = model(
            torch.tensor([[3], [5]]), both, past_key_values=found[1].past_key_values
        ).logits
        assert len(launched) == 4
    tokens = given["attention_mask"].bool()
    for each in found:
        assert_close([each.logits[tokens]], [wanted[tokens]], 1e-4)
    assert_close([decoded], [next_wanted], 1e-4)


def test_other_calls_are_computed_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are asked for, and masks with gaps."""
    model, given = model_of("selective"), batch("left")

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(kernels, "attend", refuse)
    found = model(**given, use_cache=False, output_attentions=True)
    assert found.attentions[0].shape == (2, 3, TOKENS, TOKENS)
    large = torch.zeros(1, 1, 2, 512)
    assert not kernels.usable(get_variant("softmax"), model, large, large, large)
    positions = torch.arange(TOKENS)
    gaps = positions[:, None] >= positions
    gaps &= (positions % 5 != 2) | (positions[:, None] == positions)
    model(input_ids=given["input_ids"], attention_mask=gaps[None, None], use_cache=False)
    assert kernels.rows_of(gaps[None, None], None, 2) is None


def test_rows_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where the mask was changed in place."""
    calls = []
    read = kernels._intervals

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(kernels, "_intervals", counted)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    ids = torch.arange(5)[None]
    first = kernels.rows_of(mask, ids, 3)
    assert kernels.rows_of(mask, ids, 3) is first and len(calls) == 1
    assert first is not None and first[:, 2].tolist() == [[0] * 5, [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]
    mask[..., 0] = False
    again = kernels.rows_of(mask, ids, 3)
    assert again is not None and again[:2, 0].tolist() == [[0, 1, 1, 1, 1], [0, 2, 3, 4, 5]]


def test_rows_of_other_positions() -> None:
    """Changed in place, gone, none, of another shape, one for all sequences; and a mask of one
    sequence for another number of them."""

    def positions(mask: Tensor, ids: Tensor | None, batch: int = 2) -> list[int]:
        rows = kernels.rows_of(mask, ids, batch)
        assert rows is not None and rows.shape == (3, batch, 4)
        return rows[2, -1].tolist()

    one = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask = one.expand(2, -1, -1, -1)
    ids = torch.arange(4).repeat(2, 1)
    assert positions(mask, ids) == [0, 1, 2, 3]
    ids += 5
    assert positions(mask, ids) == [5, 6, 7, 8]
    assert positions(one, ids) == [5, 6, 7, 8]
    del ids
    assert positions(mask, None) == positions(one, None) == [0, 1, 2, 3]
    assert positions(one, None, 3) == [0, 1, 2, 3]
    assert positions(mask, torch.full((3, 2, 4), 9)) == [0, 1, 2, 3]  # of images: three a token
    with torch.inference_mode():
        assert positions(one.clone(), torch.arange(4)[None] + 1) == [1, 2, 3, 4]


def test_a_model_in_training_mode_without_gradients() -> None:
    """Whose masks have no version: an evaluation that forgot `eval`."""
    model, given = model_of("softpick"), batch("left")
    wanted = model(**given, use_cache=False).logits
    with torch.inference_mode():
        found = model(**given, use_cache=False).logits
    torch.testing.assert_close(found, wanted)


def test_a_stateful_variant_is_causal() -> None:
    """Kernels would read accumulators that nobody wrote."""
    model, given = model_of("selective"), batch("none")
    given["attention_mask"] = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="no query may see a later key"):
        model(**given, use_cache=False)


def test_checkpointed_and_autocast() -> None:
    """With layers computed again in the backward; and in bfloat16."""
    model, given = model_of("softpick"), batch("right")
    wanted = results_of(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(results_of(model, given)[:1], wanted[:1], 0.1)
    model.gradient_checkpointing_enable()
    assert_close(results_of(model, given), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selective", "forgetting"])
def test_compiled(name: str) -> None:
    """In one graph, forth and back."""
    model, given = model_of(name, layers=2), batch("right")
    wanted = results_of(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(results_of(compiled, given), wanted, 1e-5)


def test_a_variant_without_derivatives_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_kernels.triton import variant

    monkeypatch.setattr(variant, "missing_derivative", lambda _: "weights_backward")
    model, given = model_of("softpick"), batch("left")
    monkeypatch.setattr(kernels.logger, "propagate", True)
    kernels.logger.warning_once.cache_clear()
    results_of(model, given)
    assert "softpick trains with torch operations" in caplog.text
    with torch.no_grad():
        assert kernels.usable(get_variant("softpick"), model, *(torch.zeros(1, 1, 2, 8),) * 3)
    assert get_variant("softpick").learned == ()
