"""flash-linear-attention's `transformer` checkpoints from a real `vllm serve`, as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fla import VARIANTS, clear_prompt, fla_checkpoint, fla_logits
from tests.servers import failed_start, vllm_server
from tests.vllm_attn.client import Client
from tests.vllm_attn.test_refusals import make_config
from vllm_attn.report import StartupError, one_line

NUM_TOKENS = 24
PROMPT_LENGTHS = (3, 16, 65, 150)
SERVE_ARGS = (
    "--dtype=float32",
    "--max-num-batched-tokens=64",  # prefill in chunks, mixed with the decoding of other requests
    "--block-size=16",
    "--max-model-len=256",
)
EVERYTHING = {
    "attn_impl": "parallel_scaled_softpick_attn",
    "num_kv_heads": 2,
    "qk_norm": True,
    "qkv_bias": True,
    "norm_eps": 1e-3,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
}


WINDOW = {"attn_impl": "flash_attn", "window_size": 24}
SCALED_SOFTMAX = {"attn_impl": "naive_scaled_attn", "intermediate_size": 96}


@pytest.mark.parametrize(
    ("fields", "args"),
    [
        pytest.param(EVERYTHING, [], id="everything"),
        pytest.param({}, [], id="softpick", marks=pytest.mark.slow),
        pytest.param(WINDOW, [], id="window", marks=pytest.mark.slow),
        pytest.param(SCALED_SOFTMAX, [], id="scaled-softmax", marks=pytest.mark.slow),
        pytest.param(
            EVERYTHING, ["--tensor-parallel-size=2"], id="two-ranks", marks=pytest.mark.slow
        ),
    ],
)
def test_same_answers_as_the_reference(
    fields: dict[str, Any], args: list[str], tmp_path: Path
) -> None:
    """Greedy tokens, alone and together, and log-probabilities of a prompt; no flags needed."""
    folder = fla_checkpoint(tmp_path, **fields)
    prompts, expected = zip(
        *(clear_prompt(folder, length, NUM_TOKENS) for length in PROMPT_LENGTHS), strict=True
    )
    assert len({token for tokens in expected for token in tokens}) > 20
    longest = prompts[-1]
    logprobs = fla_logits(folder, longest[:-1]).log_softmax(-1)[range(149), longest[1:]]
    with vllm_server(folder, *SERVE_ARGS, *args) as server:
        client = Client(server)
        assert [client.greedy(prompt, NUM_TOKENS) for prompt in prompts] == list(expected)
        assert client.greedy_together(list(prompts), NUM_TOKENS) == list(expected)
        served = torch.tensor(client.prompt_logprobs(longest), dtype=torch.float64)
        torch.testing.assert_close(served, logprobs, atol=1e-3, rtol=1e-3)
        variant = VARIANTS[fields.get("attn_impl", "parallel_softpick_attn")]["name"]
        assert f"Using {variant.upper()} backend" in server.log()
        assert f"{variant} attention, as the checkpoint's config.json says" in server.log()


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fla_checkpoint(tmp_path_factory.mktemp("scaled"), **EVERYTHING)


def copy_of(folder: Path, to: Path, without: str | None = None, **fields: Any) -> Path:
    """Return the checkpoint with other fields in `config.json` and without a tensor."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    if without:
        del weights[without]
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_vllm_serve_stops_at_an_unknown_attn_impl(scaled: Path, tmp_path: Path) -> None:
    """A real `vllm serve` prints one line, last and without a traceback, and exits non-zero."""
    code, output = failed_start(copy_of(scaled, tmp_path, attn_impl="parallel_rectified_attn"))
    assert code == 1, output
    assert output.strip().splitlines()[-1] == (
        "attnserve: attn_impl 'parallel_rectified_attn' in config.json is not supported: use one "
        f"of {', '.join(VARIANTS)}"
    )
    assert "Traceback" not in output


@pytest.mark.parametrize("attn_impl", VARIANTS)
def test_the_checkpoint_chooses(attn_impl: str, tmp_path: Path) -> None:
    name = VARIANTS[attn_impl]["name"]
    folder = fla_checkpoint(tmp_path, attn_impl=attn_impl, num_hidden_layers=1)
    assert make_config(folder).attention_config.backend.name == name.upper()
    with pytest.raises(StartupError, match=f"was trained with {name} attention and answers"):
        make_config(folder, attention_backend="LSSA")


def refusal(folder: Path, **options: Any) -> str:
    """Return the one line with which vLLM's start-up ends."""
    with pytest.raises((StartupError, ValueError)) as error:
        make_config(folder, **options)
    message = one_line(error.value)
    assert message is not None and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("attn_impl", "options"),
    [
        ("parallel_scaled_softpick_attn", {}),
        ("naive_scaled_attn", {}),
        ("parallel_scaled_attn", {"attention_backend": "CPU_ATTN"}),  # vLLM's own softmax
    ],
)
def test_a_missing_scale(
    attn_impl: str, options: dict[str, Any], scaled: Path, tmp_path: Path
) -> None:
    folder = copy_of(scaled, tmp_path, without="model.layers.1.attn.s", attn_impl=attn_impl)
    line = refusal(folder, **options)
    assert line.startswith("the checkpoint lacks layers.1.attn.s, which does not fit its config")
    assert f"attn_impl {attn_impl}," in line


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"attn_impl": "parallel_softpick_attn"}, "the checkpoint has layers.0.attn.s, "),
        ({"qkv_bias": False}, "the checkpoint has layers.0.attn.q_proj.bias, "),
        ({"qk_norm": False}, "the checkpoint has layers.0.attn.q_norm.weight, "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' in config.json is not supported"),
        ({"attn": {"layers": [1]}}, "attn {'layers': [1]} in config.json is not supported"),
    ],
)
def test_another_config_is_refused(
    fields: dict[str, Any], line: str, scaled: Path, tmp_path: Path
) -> None:
    assert refusal(copy_of(scaled, tmp_path, **fields)).startswith(line)
