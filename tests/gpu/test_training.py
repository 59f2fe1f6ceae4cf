"""Output and gradients of the training kernels against autograd of the float64 reference."""

from __future__ import annotations

import os

import pytest
import torch

from attn_kernels import get_variant, variant_names
from tests.attn_kernels.test_training import LIMIT, NARROW_LIMIT, Shape, errors

SHAPES = (
    Shape(2, 4, 2, 517, 64),
    Shape(1, 6, 2, 390, 128, 150),
    Shape(1, 2, 1, 260, 80),
    Shape(1, 2, 2, 200, 256),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", variant_names())
def test_equals_the_reference(name: str, shape: Shape, dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        found = errors(get_variant(name), shape, dtype)
    # More keys to a sum than in the interpreter's tests.
    assert max(found) <= 2 * (LIMIT if dtype == torch.float32 else NARROW_LIMIT[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softpick", "lssar", "selective", "forgetting"])
def test_a_compiled_step(name: str) -> None:
    """By inductor: the loss and gradients of a model in one graph are those of torch operations."""
    from tests.hf_attn.test_kernels import batch, model_of, results_of

    model = model_of(name, layers=2).cuda()
    given = {key: x.cuda() for key, x in batch("left").items()}
    wanted = results_of(model.double(), given)
    found = results_of(torch.compile(model.float(), fullgraph=True), given)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "0",
    reason="TRITON_INTERPRET=0: kernels are compiled for a GPU, as the tests above want them",
)
def test_the_same_interpreted() -> None:
    """A tiny case of the first test."""
    assert max(errors(get_variant("softpick"), Shape(1, 1, 1, 20, 16))) <= LIMIT
