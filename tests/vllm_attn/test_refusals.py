"""What must not be served ends start-up with one line that says what to do."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2AudioConfig

from attn_kernels import get_variant, variant_from_config, variant_names
from tests.quantized import quantize
from tests.servers import failed_start
from tests.tiny import tiny_checkpoint
from vllm_attn.preflight import check_budgets
from vllm_attn.report import StartupError


@pytest.fixture(scope="module")
def softpick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("softpick")
    tiny_checkpoint(folder, "softpick")
    return folder


@pytest.fixture(scope="module")
def unknown_variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unknown")
    tiny_checkpoint(folder, "softpick")
    config = json.loads((folder / "config.json").read_text())
    config["attention_variant"]["name"] = "softpik"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def scaleless_ssmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaleless")
    tiny_checkpoint(folder, "ssmax")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.ssmax_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "args", "line"),
    [
        pytest.param(
            "softpick",
            ["--attention-backend=softpik"],
            "unknown attention backend 'softpik'; did you mean 'softpick'?",
            id="misspelt-backend",
        ),
        pytest.param(
            "softpick",
            ["--attention-backend=lssa"],
            "was trained with softpick attention and answers nonsense with lssa: drop "
            "--attention-backend or pass --attention-backend softpick",
            id="another-variant",
        ),
        pytest.param(
            "unknown_variant",
            [],
            "attention_variant in config.json: unknown attention variant 'softpik'; did you mean "
            "'softpick'?",
            id="unknown-variant",
        ),
        pytest.param(
            "scaleless_ssmax",
            ["--attention-backend=ssmax"],
            "the checkpoint has no tensor model.layers.1.self_attn.ssmax_scale, which ssmax "
            "attention learns in every layer: train or convert it with ssmax",
            id="missing-scale",
        ),
        pytest.param(
            "softpick",
            ["--attention-backend=softpick", "--kv-cache-dtype=fp8"],
            "--kv-cache-dtype fp8 is not supported with softpick attention on CPU: use one of auto",
            id="fp8-cache",
        ),
    ],
)
def test_vllm_serve_stops(
    checkpoint: str, args: list[str], line: str, request: pytest.FixtureRequest
) -> None:
    """A real `vllm serve` prints one line, last and without a traceback, and exits non-zero."""
    code, output = failed_start(request.getfixturevalue(checkpoint), *args)
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("attnserve: "), output
    assert line in last
    assert "Traceback" not in output


def make_config(checkpoint: Path, **options: object) -> Any:
    """Return what vLLM does before it starts an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        str(checkpoint), dtype="float32", max_model_len=256, **options
    ).create_engine_config()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"attention_backend": "CPU_ATTN"}, "answers nonsense with cpu_attn"),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}},
            "would run another attention than softpick",
        ),
        ({"kv_cache_dtype": "turboquant_4bit_nc"}, "--kv-cache-dtype turboquant_4bit_nc"),
        ({"pipeline_parallel_size": 3, "enforce_eager": True}, "with --enforce-eager: drop one"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_refused(softpick: Path, options: dict[str, object], line: str) -> None:
    with pytest.raises(StartupError, match=line):
        make_config(softpick, **options)


def test_the_checkpoint_chooses(softpick: Path) -> None:
    """Without a flag the variant named by config.json runs."""
    assert make_config(softpick).attention_config.backend.name == "SOFTPICK"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"tensor_parallel_size": 2, "kv_cache_dtype": "int8_per_token_head"},
            "int8_per_token_head does not go with selective attention on several ranks",
        ),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                }
            },
            "drop --speculative-config",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "drop --kv-transfer-config",
        ),
        ({"kv_offloading_size": 1.0}, "drop --kv-offloading-size"),
        ({"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"}, "drop --kv-offloading-s"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_selective_limits(tmp_path: Path, options: dict[str, object], line: str) -> None:
    tiny_checkpoint(tmp_path, "selective")
    with pytest.raises(StartupError, match=line):
        make_config(tmp_path, **options)
    assert not make_config(tmp_path).cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("budgets", "options", "line"),
    [
        ([24, 24], {}, "kv_budgets has 2 entries and the model 3 layers: give one budget a layer"),
        ([24, 24, 1], {}, "kv_budgets must be at least 2 tokens a layer"),
        ([24, 24, 10**30], {}, "kv_budgets must be at most 1073741824 tokens a layer, not 1000"),
        ([24, 24, 2.5], {}, "kv_budgets must be a list of ints"),
        (24, {}, "kv_budgets must be a list of ints"),
        ([24] * 3, {"hf_overrides": {"sliding_window": 16}}, "do not go with a sliding window"),
    ],
    ids=str,
)
def test_budget_limits(tmp_path: Path, budgets: object, options: dict[str, Any], line: str) -> None:
    tiny_checkpoint(tmp_path, "selective")
    overrides = {"attention_variant": {"name": "selective", "kv_budgets": budgets}}
    options = options | {"hf_overrides": overrides | options.get("hf_overrides", {})}
    with pytest.raises((StartupError, ValueError), match=re.escape(line)):  # pydantic wraps some
        make_config(tmp_path, **options)


def test_budgets_that_a_gpu_does_not_take(tmp_path: Path) -> None:
    """No GPU is needed to refuse them: only the device's name is asked."""
    tiny_checkpoint(tmp_path, "selective")
    budgets = {"attention_variant": {"name": "selective", "kv_budgets": [16384, 16385, 20000]}}
    config = make_config(tmp_path, hf_overrides=budgets)
    variant = variant_from_config(config.model_config.hf_config)
    assert variant is not None
    config.model_config.max_model_len = 32768
    check_budgets(config, variant)
    config.device_config.device_type = "cuda"
    with pytest.raises(StartupError, match="do not go with a GPU where one is above 16384: lower"):
        check_budgets(config, variant)
    config.model_config.max_model_len = 16384
    check_budgets(config, variant)


def test_budgets_need_our_model_class(tiny_llama: Path) -> None:
    budgets = {"attention_variant": {"name": "selective", "kv_budgets": [24, 24]}}
    with pytest.raises(StartupError, match="LlamaForCausalLM, whose layers cannot have budgets"):
        make_config(tiny_llama, hf_overrides=budgets)


def test_learned_tensors_on_a_plain_llama(tiny_llama: Path) -> None:
    """A plain Llama has no gates and no learned scale: refused, unless the scale is given as a
    constant."""
    with pytest.raises(
        StartupError, match=r"no tensor model\.layers\.0\.self_attn\.f_proj\.weight"
    ):
        make_config(tiny_llama, attention_backend="FORGETTING")
    with pytest.raises(StartupError, match=r"no tensor model\.layers\.0\.self_attn\.ssmax_scale"):
        make_config(tiny_llama, attention_backend="SSMAX")
    constant = {"attention_variant": {"name": "ssmax", "scale": 0.168}}
    config = make_config(tiny_llama, hf_overrides=constant)
    assert config.attention_config.backend.name == "SSMAX"


@pytest.mark.parametrize("variant", ["softpick", "ssmax"])
def test_a_broken_file(tmp_path: Path, variant: str) -> None:
    """Is named, whether or not the variant has learned tensors; one that the index does not name
    is not looked at."""
    tiny_checkpoint(tmp_path, variant)
    whole, shard = tmp_path / "model.safetensors", tmp_path / "model-1.safetensors"
    shutil.copy(whole, shard)
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(StartupError, match=rf"{whole} is no whole safetensors file \(.*\): copy"):
        make_config(tmp_path)
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    make_config(tmp_path)


FIXED: dict[str, dict[str, Any]] = {"ssmax": {"scale": 0.2}}
"""What a variant needs for a model that has not learned it."""
OTHERS = [
    name
    for name in variant_names()
    if name != "softmax" and not get_variant(name, **FIXED.get(name, {})).tensors
]


def declaring(source: Path, folder: Path, **fields: object) -> Path:
    """Return a copy of a checkpoint with other fields in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_a_plain_llama_that_names_a_variant(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    """transformers would run softmax (`tests/hf_attn/test_unread.py`): both refuse, and both take a
    variant that is asked for."""
    parameters = FIXED.get(name, {})
    folder = declaring(
        tiny_llama, tmp_path / "llama", attention_variant={"name": name, **parameters}
    )
    with pytest.raises(StartupError, match=r"llama does not read attention_variant.*variant_llama"):
        make_config(folder)
    asked = make_config(folder, attention_backend=name.upper())
    overridden = make_config(
        tiny_llama, hf_overrides={"attention_variant": {"name": name, **parameters}}
    )
    for config in (asked, overridden):
        assert config.attention_config.backend.name == name.upper()


def test_a_plain_llama_that_names_softmax(tiny_llama: Path, tmp_path: Path) -> None:
    make_config(declaring(tiny_llama, tmp_path / "llama", attention_variant={"name": "softmax"}))


def test_a_variant_in_a_nested_configuration(tiny_llama: Path, tmp_path: Path) -> None:
    """Of a multimodal model, whose text part vLLM would run with softmax."""
    config = Qwen2AudioConfig(
        text_config={"num_hidden_layers": 1, "vocab_size": 4096},
        architectures=["Qwen2AudioForConditionalGeneration"],
    )
    folder = tmp_path / "audio"
    shutil.copytree(tiny_llama, folder)  # for its tokenizer
    config.save_pretrained(folder)
    make_config(folder)
    config.text_config.attention_variant = {"name": "softpick"}
    config.save_pretrained(folder)
    for options in ({}, {"attention_backend": "SOFTPICK"}):
        with pytest.raises(StartupError, match=r"in text_config\.attention_variant, which"):
            make_config(folder, **options)


@pytest.mark.parametrize("connector", ["NixlConnector", "ExampleConnector", "MultiConnector"])
def test_connectors_to_other_engines_on_a_cpu(softpick: Path, connector: str) -> None:
    """Their engine may have another order of blocks: without a compiler, or another backend."""
    transfer = {"kv_connector": connector, "kv_role": "kv_both"}
    with pytest.raises(StartupError, match=f"which {connector} would give"):
        make_config(softpick, kv_transfer_config=transfer)
    with pytest.raises(StartupError, match="which --kv-offloading-backend lmcache would give"):
        make_config(softpick, kv_offloading_size=1.0, kv_offloading_backend="lmcache")
    config = make_config(softpick, kv_offloading_size=1.0)
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"


@pytest.mark.parametrize("name", ["softpick", "llama"])
def test_a_tokenizer_larger_than_the_table(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    """Whoever may ask could read past the table; the last row is still right."""
    folder = tmp_path / name
    if name == "llama":
        shutil.copytree(tiny_llama, folder)
    else:
        tiny_checkpoint(folder, name)
    make_config(folder)
    rows = len(AutoTokenizer.from_pretrained(folder))
    line = f"token ids up to {rows}, and the model's embedding table {rows} rows"
    for special in (False, True):  # the latter as Gemma 3 1B's placeholder for images
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens("<one more>", special_tokens=special)
        other = shutil.copytree(folder, tmp_path / f"{special}")  # vLLM keeps a folder's tokenizer
        tokenizer.save_pretrained(other)
        with nullcontext() if special else pytest.raises(StartupError, match=line):
            make_config(other)
        make_config(other, skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def normless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, without a norm."""
    folder = tmp_path_factory.mktemp("normless")
    tiny_checkpoint(folder / "whole", "softpick")
    quantize([str(folder / "whole"), str(folder / "out"), "--bits=4", "--scheme=rtn"])
    tensors = load_file(folder / "out" / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, folder / "out" / "model.safetensors", metadata={"format": "pt"})
    return folder / "out"


def test_a_worker_stops_with_one_line(normless: Path) -> None:
    """What only a loaded model shows is found by a worker and said as shortly: one line, last and
    without a traceback, and exit code 1."""
    code, output = failed_start(normless)
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("attnserve: "), output
    assert "has no tensor model.layers.1.post_attention_layernorm.weight: it is" in last
    assert "Traceback" not in output


def test_platform_plugin_bypassed(softpick: Path) -> None:
    """`VLLM_TARGET_DEVICE=cpu` makes vLLM skip platform plugins; the mismatch is still refused."""
    code, output = failed_start(
        softpick, "--attention-backend=lssa", env={"VLLM_TARGET_DEVICE": "cpu"}
    )
    assert code == 1
    assert "answers nonsense with lssa" in output.strip().splitlines()[-1]


@pytest.mark.parametrize("fields", [{}, {"attention_varient": {"name": "softpick"}}])
def test_our_model_without_a_variant(
    softpick: Path, tmp_path: Path, fields: dict[str, object]
) -> None:
    """A name left out, or misspelt: transformers refuses it, and vLLM would run softmax."""
    folder = declaring(softpick, tmp_path / "copy", attention_variant=None, **fields)
    with pytest.raises(StartupError, match="variant_llama names no attention function"):
        make_config(folder)
