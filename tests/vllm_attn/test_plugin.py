"""Registration: vLLM resolves every variant's backend and sends it to its processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from attn_kernels import VariantError, get_variant, variant_names
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.loading import load, one_worker
from vllm_attn import names, register
from vllm_attn.backend import VariantBackend, VariantMetadataBuilder
from vllm_attn.preflight import check_fp8, check_layer
from vllm_attn.report import StartupError, one_line

pytestmark = pytest.mark.integration

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
    """A stateful variant's page has one float32 more a slot, a gated one's 64 bits a query head;
    the others' is vLLM's own."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=dtype)
    page = AttentionBackendEnum[name.upper()].get_class().customize_spec(spec).page_size_bytes
    variant = get_variant(name)
    extra = (4 * variant.stateful + 8 * variant.gated) * 2 * 16
    assert page == spec.page_size_bytes + extra


@pytest.mark.parametrize("window", [None, 24])
def test_gated_pages(window: int | None, tmp_path: Path) -> None:
    """With two query heads to a KV head, which only the layer knows. Gates are float32 in a 16-bit
    model, and in one buffer of all layers."""
    tiny_checkpoint(tmp_path, "forgetting", sliding_window=window)
    with one_worker(tmp_path):
        layers = [x.self_attn.attn for x in load(tmp_path, "bfloat16").model.layers]
        config = EngineArgs(str(tmp_path), dtype="bfloat16", block_size=16).create_engine_config()
        spec = layers[0].get_kv_cache_spec(config)
    plain = 2 * 2 * 32 * 2 * spec.block_size
    assert spec.page_size_bytes == plain + 2 * 2 * 8 * spec.block_size
    assert layers[0].gates.dtype == torch.float32
    assert layers[0].gates.shape == (config.scheduler_config.max_num_batched_tokens, 4)
    assert all(layer.impl.gates is layers[0].gates for layer in layers)


def test_gates_of_each_layer_in_a_compiled_model(tmp_path: Path) -> None:
    """Attention reads them from a buffer of all layers, of which a compiler knows nothing: it must
    not keep for the end what is written there."""
    tiny_checkpoint(tmp_path, "forgetting")
    with one_worker(tmp_path):
        layers = [x.self_attn.attn for x in load(tmp_path).model.layers[:2]]
        config = EngineArgs(str(tmp_path), dtype="float32").create_engine_config()
        for layer in layers:
            config.compilation_config.static_forward_context[layer.layer_name] = layer
            layer.impl.forward = lambda self, query, key, value, *_, output, **__: output.copy_(
                query + self.gates[: len(query), :, None]
            )

        def both(query: Tensor, key: Tensor) -> Tensor:
            first = layers[0](query, key, key, query[:, ::32] * 10)
            return layers[1](first, key, key, query[:, ::32] * 100)

        query, key = torch.ones(3, 4 * 32), torch.ones(3, 2 * 32)
        with set_forward_context(None, config, slot_mapping={}):
            compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
            assert torch.equal(both(query, key), query * 111)
            assert torch.equal(compiled(query, key), query * 111)


@pytest.mark.parametrize(
    ("capability", "kv_cache_dtype", "message"),
    [
        ((9, 0), "fp8", None),
        ((8, 0), "auto", None),
        ((8, 6), "fp8_e4m3", "float8 needs a GPU of compute capability 8.9 or later"),
        ((7, 5), "auto", "compute capability not supported"),
        (None, "auto", None),
    ],
)
def test_what_a_gpu_must_have(
    capability: tuple[int, int] | None, kv_cache_dtype: Any, message: str | None
) -> None:
    gpu = DeviceCapability(*capability) if capability else None
    layer = AttentionSelectorConfig(128, torch.bfloat16, kv_cache_dtype, block_size=16)
    member = AttentionBackendEnum["SOFTPICK"]
    if message is None:
        check_layer(member, layer, gpu)
        return
    with pytest.raises(StartupError, match=message):
        check_layer(member, layer, gpu)


def test_graphs_are_captured_for_the_longest_context() -> None:
    """vLLM's buffers themselves, on the GPU's side, and the sizes of what is launched."""
    builder: Any = object.__new__(VariantMetadataBuilder)
    builder.device = torch.device("cuda")
    builder.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens=torch.tensor([7, 9], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=9,
        block_table_tensor=torch.zeros(2, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(2, dtype=torch.int64),
    )
    batch = builder.build(0, common)
    for name in ("query_start_loc", "seq_lens", "slot_mapping"):
        assert getattr(batch, name) is getattr(common, name)
    assert batch.block_table is common.block_table_tensor
    assert (batch.max_query_len, batch.max_seq_len) == (1, 9)
    captured = builder.build_for_cudagraph_capture(common)
    assert (captured.max_query_len, captured.max_seq_len) == (1, 4096)
    assert captured.seq_lens is common.seq_lens
    assert captured.seq_lens.tolist() == [1, 1]
    common.query_start_loc[1:] = torch.tensor([4, 4])  # drafts, and a request of padding
    assert builder.build_for_cudagraph_capture(common).seq_lens.tolist() == [4, 1]


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
    gguf = OSError("It looks like the config file at '/a/b.gguf' is not a valid JSON file.")
    assert "/a/b.gguf is a GGUF file, which vLLM does not read" in str(one_line(gguf))


@pytest.mark.parametrize(
    ("method", "entry", "refused"),
    [
        ("fp8", None, True),  # --quantization fp8
        ("fp8_per_tensor", None, True),
        ("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"}, True),
        ("fp8", {"quant_method": "fp8", "activation_scheme": "static"}, False),
        ("fp8", {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, False),
        ("compressed-tensors", {"format": "float-quantized"}, False),
        (None, None, False),
    ],
)
def test_fp8(method: str | None, entry: dict[str, Any] | None, refused: bool) -> None:
    config = SimpleNamespace(
        quantization=method, hf_config=SimpleNamespace(quantization_config=entry)
    )
    with pytest.raises(StartupError, match="no CPU kernel for fp8") if refused else nullcontext():
        check_fp8(config)
