"""What is loaded is whole, and runs the attention that was chosen; else one line says what is
missing. vLLM's own loader and model classes, in this process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from attn_kernels import variant_names
from quant.schemes.rtn import rtn
from quant_kernels.formats.packed import FORMAT, config_of, entry_of, stored_tensors
from quant_kernels.weight import QuantSpec
from tests.quantized import quantize
from tests.tiny import tiny_checkpoint, tiny_tokenizer, write_tiny_llama
from tests.vllm_attn.loading import load, one_worker
from vllm_attn.report import StartupError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a stock model with experts."""
    folder = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def worker(mixtral: Path) -> Iterator[None]:
    with one_worker(mixtral):  # for experts, a worker sets up more
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of our model class with every variant, of a stock Llama, and packed; one layer each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {
        name: tiny_checkpoint(folder / name, name, num_hidden_layers=1) for name in variant_names()
    }
    made["llama"] = write_tiny_llama(folder / "llama")
    made["tied"] = tiny_checkpoint(
        folder / "tied", "softpick", num_hidden_layers=1, tie_word_embeddings=True
    )
    for name in ("softpick", "tied"):
        made[f"packed-{name}"] = folder / f"packed-{name}"
        arguments = ["--bits=4", "--scheme=rtn", "--embeddings=8"]
        quantize([str(made[name]), str(made[f"packed-{name}"]), *arguments])
    return made


def changed(source: Path, folder: Path, tensors: dict[str, Tensor | None]) -> Path:
    """Return a copy with other tensors; None: without them."""
    shutil.copytree(source, folder)
    content = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        del content[name]
        if tensor is not None:
            content[name] = tensor
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensor_names(folder: Path) -> list[str]:
    return sorted(load_file(folder / "model.safetensors"))


def refused_without(source: Path, name: str, folder: Path, **options: Any) -> None:
    """Check that the line names the tensor that is not there."""
    copy = changed(source, folder, {name: None})
    with pytest.raises(StartupError, match=rf"has no tensor {re.escape(name)}(,|:| )"):
        load(copy, **options)


@pytest.mark.parametrize("name", variant_names())
def test_whole_checkpoints_load(checkpoints: dict[str, Path], name: str) -> None:
    load(checkpoints[name])


@pytest.mark.parametrize("name", ["tied", "packed-softpick", "packed-tied"])
def test_others_load(checkpoints: dict[str, Path], name: str) -> None:
    load(checkpoints[name])


@pytest.mark.parametrize("name", ["softpick", "packed-softpick"])
def test_dummy_weights_load(checkpoints: dict[str, Path], name: str) -> None:
    load(checkpoints[name], load_format="dummy")


def test_a_plain_llama_loads(checkpoints: dict[str, Path]) -> None:
    load(checkpoints["llama"], attention_backend="SOFTPICK")


def test_no_tensor_may_miss(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Each in its turn, fused parts, norms, embeddings, head and learned tensors among them."""
    names = tensor_names(checkpoints["ssmax"])
    assert len(names) == 13
    for i, name in enumerate(names):
        refused_without(checkpoints["ssmax"], name, tmp_path / str(i))


def test_no_tensor_of_a_plain_llama_may_miss(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for i, name in enumerate(
        ("layers.1.mlp.down_proj", "layers.0.mlp.up_proj", "layers.1.input_layernorm", "norm")
    ):
        refused_without(
            checkpoints["llama"],
            f"model.{name}.weight",
            tmp_path / str(i),
            attention_backend="SOFTPICK",
        )


@pytest.mark.parametrize("checkpoint", ["packed-softpick", "packed-tied"])
def test_no_packed_tensor_may_miss(
    checkpoints: dict[str, Path], checkpoint: str, tmp_path: Path
) -> None:
    """Nor what is not packed beside them."""
    kinds = ("k_proj", "up_proj", "down_proj", "embed_tokens", "norm")
    names = [
        name
        for name in tensor_names(checkpoints[checkpoint])
        if any(kind in name for kind in kinds)
    ]
    assert len(names) == 4 * 4 + 3
    for i, name in enumerate(names):
        refused_without(checkpoints[checkpoint], name, tmp_path / str(i))


def test_no_expert_may_miss(mixtral: Path, tmp_path: Path) -> None:
    """vLLM has those of a layer in two tensors."""
    load(mixtral, attention_backend="SOFTPICK")
    experts = "model.layers.1.block_sparse_moe.experts"
    for name, stacked in (("0.w1", "w13"), ("2.w3", "w13"), ("3.w2", "w2")):
        copy = changed(mixtral, tmp_path / name, {f"{experts}.{name}.weight": None})
        line = rf"for vLLM's {re.escape(experts)}\.\w+\.{stacked}_weight: it is"
        with pytest.raises(StartupError, match=line):
            load(copy, attention_backend="SOFTPICK")


def test_a_packed_matrix_may_not_miss(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The first of its four tensors is named."""
    prefix = "model.layers.0.mlp.down_proj."
    names = tensor_names(checkpoints["packed-softpick"])
    lost: dict[str, Tensor | None] = {name: None for name in names if name.startswith(prefix)}
    assert len(lost) == 4
    line = f"has no tensor {prefix}weight_packed (and 3 more): it is incomplete"
    with pytest.raises(StartupError, match=re.escape(line)):
        load(changed(checkpoints["packed-softpick"], tmp_path / "copy", lost))


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        ("model.layers.0.self_attn.q_proj", (128, 120), "is [128, 120], and the layer is [128, 1"),
        ("model.layers.0.self_attn.v_proj", (128, 128), "is [128, 128], and the layer is [64, 12"),
        ("model.layers.0.mlp.up_proj", (250, 128), "is [250, 128], and the layer is [256, 128]"),
        ("model.layers.0.mlp.down_proj", (128, 250), "is [128, 250], and the layer is [128, 256]"),
        ("model.embed_tokens", (511, 128), "is [511, 128], and the layer is [512, 128]"),
    ],
)
def test_weight_shape_is_compared(
    checkpoints: dict[str, Path],
    name: str,
    shape: tuple[int, int],
    line: str,
    tmp_path: Path,
) -> None:
    stored: dict[str, Tensor | None] = {f"{name}.weight_shape": torch.tensor(shape)}
    copy = changed(checkpoints["packed-softpick"], tmp_path / "copy", stored)
    with pytest.raises(StartupError, match=re.escape(line)):
        load(copy)


PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
PACKED = [
    *(f"model.layers.0.{layer}" for layer in PROJECTIONS),
    "model.embed_tokens",
    "lm_head",
]


@pytest.mark.parametrize("more", [(0, 1), (1, 0), (0, -1), (-1, 0)], ids=str)
@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_packed_tensors_of_other_shapes(
    checkpoints: dict[str, Path], kind: str, more: tuple[int, int], tmp_path: Path
) -> None:
    """A row or a column too many, which vLLM would cut off, or too few."""
    for layer in PACKED:
        name = f"{layer}.{kind}"
        refused_with_shape(checkpoints["packed-softpick"], name, more, tmp_path / layer)


@pytest.mark.parametrize("more", [(0, 1), (1, 0), (0, -1), (-1, 0)], ids=str)
def test_plain_tensors_of_other_shapes(
    checkpoints: dict[str, Path], more: tuple[int, int], tmp_path: Path
) -> None:
    for layer in PACKED:
        refused_with_shape(checkpoints["ssmax"], f"{layer}.weight", more, tmp_path / layer)
    if not more[1]:
        for name in ("input_layernorm.weight", "self_attn.ssmax_scale"):
            name = f"model.layers.0.{name}"
            refused_with_shape(checkpoints["ssmax"], name, more, tmp_path / name)
    layer = "model.layers.1.mlp.gate_proj"
    refused_with_shape(
        checkpoints["llama"],
        f"{layer}.weight",
        more,
        tmp_path / layer,
        attention_backend="SOFTPICK",
    )


def refused_with_shape(
    source: Path, name: str, more: tuple[int, int], folder: Path, **options: Any
) -> None:
    """Check that the line names a tensor with more rows and columns than it may have."""
    tensor = load_file(source / "model.safetensors")[name]
    if tensor.dim() == 2 and tensor.shape[1] + more[1] < 1:
        return
    pads = (0, more[1], 0, more[0]) if tensor.dim() == 2 else (0, more[0])
    other = torch.nn.functional.pad(tensor, pads).contiguous()
    copy = changed(source, folder, {name: other})
    line = rf"{re.escape(name)} of the checkpoint is {re.escape(str(list(other.shape)))}"
    with pytest.raises(StartupError, match=line):
        load(copy, **options)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight_bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.extra_proj.weight",
        "model.layers.7.mlp.down_proj.weight_packed",
        "extra",
    ],
)
def test_packed_tensors_too_many(checkpoints: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Of another model or format: what they would change is not computed."""
    copy = changed(checkpoints["packed-softpick"], tmp_path / "copy", {})
    content = load_file(copy / "model.safetensors")
    save_file(content | {name: torch.zeros(4, 4)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartupError, match=rf"has a tensor {re.escape(name)}, which the model"):
        load(copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_no_numbers(
    checkpoints: dict[str, Path], value: float, tmp_path: Path
) -> None:
    """Every answer would be NaN."""
    for layer in ("model.layers.0.mlp.down_proj", "model.embed_tokens"):
        name = f"{layer}.weight_scale"
        scales = load_file(checkpoints["packed-softpick"] / "model.safetensors")[name]
        scales[1, 0] = value
        copy = changed(checkpoints["packed-softpick"], tmp_path / layer, {name: scales})
        with pytest.raises(StartupError, match=r"weight_scale of the checkpoint has scales that"):
            load(copy)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("weight_packed", torch.float64),
        ("weight_packed", torch.int64),
        ("weight_scale", torch.int8),
    ],
)
def test_packed_tensors_of_other_types(
    checkpoints: dict[str, Path], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """vLLM would convert the numbers, whatever they stand for."""
    name = f"model.layers.0.self_attn.k_proj.{kind}"
    tensor = load_file(checkpoints["packed-softpick"] / "model.safetensors")[name].to(dtype)
    copy = changed(checkpoints["packed-softpick"], tmp_path / "copy", {name: tensor})
    with pytest.raises(StartupError, match=rf"{re.escape(name)} of the checkpoint is {dtype}, whi"):
        load(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("group_size", None), ("num_bits", "four"), ("type", True), ("actorder", [1])],
)
def test_a_configuration_that_cannot_be_read(
    checkpoints: dict[str, Path], field: str, value: object, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints["packed-softpick"], copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][field] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=r"quantization_config of config\.json cannot be read: "):
        load(copy)


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM has a kernel with AMX")
def test_experts_that_others_have_packed(mixtral: Path, tmp_path: Path) -> None:
    """In compressed-tensors' format, each expert's matrices by themselves."""
    shutil.copytree(mixtral, tmp_path / "packed")
    stored, entry = {}, {}
    for name, tensor in load_file(mixtral / "model.safetensors").items():
        if tensor.dim() < 2 or name.startswith(("lm_head", "model.embed")) or "gate." in name:
            stored[name] = tensor
            continue
        weight = rtn(tensor.float(), QuantSpec(4, 32, symmetric=True))
        entry = entry_of(weight)
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{part}": x.contiguous() for part, x in stored_tensors(weight).items()}
    save_file(stored, tmp_path / "packed/model.safetensors", {"format": "pt"})
    config = json.loads((mixtral / "config.json").read_text())
    groups = [(["Linear"], entry, FORMAT)]
    config["quantization_config"] = config_of(groups, ["lm_head", "re:.*gate$"])
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="has experts, for which vLLM has no kernel here"):
        load(tmp_path / "packed")


def test_zero_points_of_symmetric_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """They say that the values mean something else."""
    quantize([str(checkpoints["softpick"]), str(tmp_path / "a"), "--bits=4", "--scheme=rtn"])
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=r"has a tensor model\..*zero_point, which the model"):
        load(tmp_path / "a")


def test_another_models_packed_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """One line instead of vLLM's assertion without a message."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints["packed-softpick"], copy)
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = 320
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=r"weight_packed of the checkpoint is \["):
        load(copy)


class OwnAttention(LlamaAttention):
    """Attention that does not ask which backend to run, in layer 1."""

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(*args, prefix=prefix, **kwargs)
        if ".1." in prefix:
            backend = AttentionBackendEnum.CPU_ATTN.get_class()
            self.attn = Attention(4, 32, 1.0, 2, prefix=f"{prefix}.own", attn_backend=backend)


class WideValues(LlamaAttention):
    """Values of another size than keys."""

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(*args, prefix=prefix, **kwargs)
        self.attn = Attention(4, 32, 1.0, 2, prefix=f"{prefix}.own", head_size_v=64)


class Sinks(LlamaAttention):
    """Passes what a model passes through vLLM's layer."""

    given: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(*args, prefix=prefix, **kwargs)
        self.attn = Attention(4, 32, 1.0, 2, prefix=f"{prefix}.own", **self.given)


def model_with(attention: type[LlamaAttention]) -> type[LlamaForCausalLM]:
    class Layer(LlamaDecoderLayer):
        def __init__(self, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config, prefix, attn_layer_type=attention, **kwargs)

    class Model(LlamaForCausalLM):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)

    return Model


def load_with(attention: type[LlamaAttention], folder: Path) -> Any:
    name = f"{attention.__name__}ForCausalLM"
    ModelRegistry.register_model(name, model_with(attention))
    return load(folder, attention_backend="SOFTPICK", hf_overrides={"architectures": [name]})


@pytest.mark.parametrize(
    ("attention", "line"),
    [
        (OwnAttention, "layers.1.self_attn.own would run CPU_ATTN instead of softpick attention"),
        (
            WideValues,
            "layers.0.self_attn.own has values of size 64 and keys of size 32",
        ),
    ],
)
def test_every_layer_is_the_variants(
    checkpoints: dict[str, Path], attention: type[LlamaAttention], line: str
) -> None:
    with pytest.raises(StartupError, match=re.escape(line)):
        load_with(attention, checkpoints["llama"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"sinks": None, "chunk_lookback": -1, "layer_idx": 1, "anything": False}, None),
        ({"chunk_lookback": 1}, "Chunked attention with lookback requires the Triton backend"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "`dual_chunk_attention_config`"),
        ({"new_feature": 0.5}, "softpick attention does not support `new_feature`, which the mod"),
        (
            {"sinks": torch.zeros(4)},
            "learned sinks, which softpick attention has not: pass --attention-backend sinks",
        ),
    ],
)
def test_arguments_that_models_pass(
    checkpoints: dict[str, Path],
    given: dict[str, Any],
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sinks, "given", given)
    if line is None:
        load_with(Sinks, checkpoints["llama"])
        return
    with pytest.raises((StartupError, AssertionError), match=re.escape(line)):
        load_with(Sinks, checkpoints["llama"])
