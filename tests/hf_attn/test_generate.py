"""Generation: every way of running the same tokens gives what the float64 reference gives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from attn_kernels import variant_names
from tests.reference_model import ReferenceModel, clear_greedy
from tests.tiny import tiny_checkpoint

PROMPT_LENGTHS = (10, 3, 1, 5)
NEW = 24
WINDOW = 6


class Case:
    """A checkpoint in float32, and the reference's greedy tokens after each prompt."""

    def __init__(self, folder: Path, name: str, window: int | None) -> None:
        self.folder = tiny_checkpoint(folder, name, sliding_window=window, num_hidden_layers=2)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        asked = [clear_greedy(self.folder, length, NEW) for length in PROMPT_LENGTHS]
        self.prompts = [prompt for prompt, _ in asked]
        self.tokens = [expected.tokens for _, expected in asked]
        """The reference's tokens after each prompt."""

    def generate(
        self, ids: Tensor, mask: Tensor | None = None, **options: object
    ) -> list[list[int]]:
        mask = torch.ones_like(ids) if mask is None else mask
        options = {"max_new_tokens": NEW, "do_sample": False} | options
        output = self.model.generate(
            ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **options
        )
        rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return rows


@pytest.fixture(
    scope="module",
    params=[(name, window) for name in variant_names() for window in (None, WINDOW)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("checkpoint"), *request.param)


def padded(prompts: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """All prompts in one batch, `[4, 10]`, and the mask of their tokens."""
    length = max(map(len, prompts))
    ids, mask = torch.full((4, length), 500), torch.zeros(4, length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if left else slice(len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids, mask


def test_tokens_vary(case: Case) -> None:
    """The comparison means something: the reference's tokens are not one token again and again."""
    assert len(set().union(*case.tokens)) > NEW
    assert all(len(set(tokens)) > NEW // 4 for tokens in case.tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_alone(case: Case, use_cache: bool) -> None:
    for prompt, tokens in zip(case.prompts[:2], case.tokens, strict=False):
        assert case.generate(torch.tensor([prompt]), use_cache=use_cache) == [tokens]


@pytest.mark.parametrize("use_cache", [True, False])
def test_batch_with_left_padding(case: Case, use_cache: bool) -> None:
    assert case.generate(*padded(case.prompts, left=True), use_cache=use_cache) == case.tokens


def test_static_cache(case: Case) -> None:
    tokens = case.generate(
        *padded(case.prompts, left=True), cache_implementation="static", disable_compile=True
    )
    assert tokens == case.tokens


@pytest.mark.parametrize("left", [True, False])
def test_logits_of_a_padded_batch(case: Case, left: bool) -> None:
    """All logits of all prompts in one forward pass are the reference's."""
    ids, mask = padded(case.prompts, left)
    with torch.no_grad():
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = case.model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
    model = ReferenceModel(case.folder)
    for row, prompt in enumerate(case.prompts):
        model.reset()
        expected = torch.stack([model.read(token) for token in prompt])
        torch.testing.assert_close(
            logits[row, mask[row].bool()].double(), expected, atol=2e-3, rtol=1e-4
        )


def test_chunked_prefill_and_cropped_cache(case: Case) -> None:
    """A cache that is filled in chunks, cut back and filled again gives the same logits.

    Past its window a sliding cache cannot be cut back, so only what fits is.
    """
    ids = torch.tensor(case.prompts[:1])
    with torch.no_grad():
        whole = case.model(input_ids=ids, use_cache=True)
        cache = case.model(input_ids=ids[:, :3], use_cache=True).past_key_values
        case.model(input_ids=ids[:, 5:7], past_key_values=cache)
        cache.crop(-2)
        for chunk in (ids[:, 3:5], ids[:, 5:9], ids[:, 9:]):
            last = case.model(input_ids=chunk, past_key_values=cache)
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], atol=1e-3, rtol=1e-4)


def test_beam_search(case: Case) -> None:
    """Beams reorder the cache; without a cache there is nothing to reorder."""
    ids, mask = padded(case.prompts, left=True)
    options = {"num_beams": 3, "max_new_tokens": 10}
    with_cache = case.generate(ids, mask, use_cache=True, **options)
    assert with_cache == case.generate(ids, mask, use_cache=False, **options)
    assert with_cache != [tokens[:10] for tokens in case.tokens], "beams never changed places"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(case: Case, dtype: torch.dtype) -> None:
    """Rounding moves the logits by a little, not by a formula's worth."""
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype)
    ids = torch.tensor(case.prompts[:1])
    with torch.no_grad():
        exact, rounded = (m(input_ids=ids).logits.double() for m in (case.model, model))
    assert torch.corrcoef(torch.stack((exact.flatten(), rounded.flatten())))[0, 1] > 0.98
