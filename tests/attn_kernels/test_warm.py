"""What is compiled at start-up is all that requests can launch, whatever their lengths."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from attn_kernels import get_variant
from attn_kernels.paged import content_bytes
from attn_kernels.triton import TritonLayer, launch, layer, warm
from attn_kernels.triton.cache import write_kernel

MOST_TOKENS, MOST_REQUESTS = 2048, 256


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Return what launches are compiled for, as they come; nothing is launched."""
    found: set[Any] = set()

    def record(self: Any, grid: Any, *args: Any, options: Any, **constants: Any) -> None:
        # All that changes of the writing kernel's arguments are strides.
        kinds = map(launch.kind_of, args) if self.kernel is write_kernel else ()
        found.add((self.kernel, *kinds, *options.items(), *constants.items()))

    monkeypatch.setattr(launch.Launcher, "__call__", record)
    monkeypatch.setattr(layer, "compiling", lambda: True)
    return found


@pytest.mark.parametrize("most_keys", [1000, 8192, 131072])
@pytest.mark.parametrize("name", ["softmax", "lssar", "selective"])
def test_all_lengths_of_requests(name: str, most_keys: int, launched: set[Any]) -> None:
    """lssar's kernels also depend on whether scores of so many tokens and keys are kept."""
    variant = get_variant(name)
    content = content_bytes(variant, 128, torch.bfloat16, group=4) // 2

    def bind() -> TritonLayer:
        cache = torch.zeros(1, 8, 64, content, dtype=torch.bfloat16)
        return TritonLayer(variant, cache, num_heads=32, scale=1.0)

    most = {"max_num_tokens": MOST_TOKENS, "max_num_reqs": MOST_REQUESTS}
    warm.compile_launches(bind(), torch.bfloat16, max_seq_len=most_keys, **most)
    compiled = launched.copy()
    draw, served = random.Random(0), bind()
    edges = [2**n + extra for n in range(8, most_keys.bit_length()) for extra in (-1, 0)]
    for _ in range(1000):
        launched.clear()
        length = draw.choice([*edges, most_keys, draw.randrange(2, most_keys)])
        longest = draw.choice([1, 2, min(length, MOST_TOKENS)])
        limit = MOST_REQUESTS if longest == 1 else MOST_TOKENS
        count = draw.choice([draw.randrange(longest, limit + 1), 2 ** draw.randrange(1, 8)])
        warm._launch(served, torch.bfloat16, count, max_query_len=longest, max_seq_len=length)
        assert launched <= compiled, (count, longest, length)


def test_keys_that_are_a_part_of_a_product(launched: set[Any]) -> None:
    """16 divides the strides of 10 heads of 72, which share a product, and not of one."""
    cache = torch.zeros(1, 1, 64, 144, dtype=torch.bfloat16)
    served = TritonLayer(get_variant("softmax"), cache, num_heads=8, scale=1.0)
    most = {"max_num_tokens": 64, "max_num_reqs": 8, "max_seq_len": 100}
    warm.compile_launches(served, torch.bfloat16, **most)
    compiled = launched.copy()
    _, *parts = torch.empty(5, 10, 72, dtype=torch.bfloat16).split([8, 1, 1], 1)
    whole = [part.contiguous() for part in parts]
    launched.clear()
    for key, value in (parts, whole, (whole[0], parts[1])):
        served.write_cache(key, value, torch.zeros(5, dtype=torch.int64))
    assert len(launched) == 3 and launched <= compiled


def test_a_launch_is_like_another_of_the_same_types() -> None:
    """Queries of another dtype, or an address that 16 does not divide, have another kernel."""
    x = torch.zeros(40, dtype=torch.float16)
    kinds = [launch.kind_of(each) for each in (x, x.bfloat16(), x[1:], None, 1, 3, 16, 2**31)]
    assert len(set(kinds)) == len(kinds)
    assert launch.kind_of(x[8:]) == kinds[0] and launch.kind_of(48) == launch.kind_of(16)
