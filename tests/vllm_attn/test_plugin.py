"""Registration: vLLM resolves every variant's backend and sends it to its processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from attn_kernels import VariantError, get_variant, variant_names
from vllm_attn import names, register
from vllm_attn.backend import VariantBackend
from vllm_attn.report import StartupError, one_line

register()


def test_platform_is_ours() -> None:
    assert current_platform.is_cpu()
    assert type(current_platform).__name__ == "VariantCpuPlatform"


@pytest.mark.parametrize("name", variant_names())
def test_member(name: str) -> None:
    register()  # once more: idempotent
    member = AttentionBackendEnum[name.upper()]
    backend = member.get_class()
    assert issubclass(backend, VariantBackend)
    assert backend.get_name() == member.name
    assert names.variant_of(member) == name
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_members_reach_a_spawned_process() -> None:
    """A fresh interpreter that has loaded no plugin restores every member."""
    members = [AttentionBackendEnum[name.upper()] for name in variant_names()]
    code = f"import pickle; print(*[m.name for m in pickle.loads({pickle.dumps(members)!r})])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    restored = done.stdout.strip().splitlines()[-1:]
    assert restored == [" ".join(member.name for member in members)], done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", variant_names())
def test_cache_page(name: str, dtype: torch.dtype) -> None:
    """A stateful variant's page has one float32 more a slot; the others' is vLLM's own."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=dtype)
    page = AttentionBackendEnum[name.upper()].get_class().customize_spec(spec).page_size_bytes
    extra = 4 * 2 * 16 if get_variant(name).stateful else 0
    assert page == spec.page_size_bytes + extra


def test_one_line_finds_our_error_inside_others() -> None:
    try:
        try:
            raise VariantError("what to do")
        except VariantError as error:
            raise RuntimeError("engine failed") from error
    except RuntimeError as error:
        assert one_line(error) == "what to do"
    assert one_line(StartupError("stop")) == "stop"
    assert one_line(ValueError("not ours")) is None
    with pytest.raises(ValueError, match="Unknown attention backend") as unknown:
        AttentionBackendEnum["QQQQQQ"]
    assert one_line(unknown.value) == (
        f"unknown attention backend 'qqqqqq'; variants: {', '.join(variant_names())}"
    )
