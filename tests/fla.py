"""Checkpoints in flash-linear-attention's `transformer` format, and the reference of such a model.

Both are written from the format's fields and tensor names, and independent of `hf_attn.fla`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attn_kernels import get_variant
from attn_kernels.reference import attention
from tests.reference_model import Greedy, ReferenceModel, decode_greedily
from tests.tiny import tiny_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "flash_attn": {"name": "softmax"},
    "parallel_attn": {"name": "softmax"},
    "naive_attn": {"name": "softmax"},
    "parallel_scaled_attn": {"name": "softmax"},
    "naive_scaled_attn": {"name": "softmax"},
    "parallel_softpick_attn": {"name": "softpick", "eps": 1e-6},
    "naive_softpick_attn": {"name": "softpick", "eps": 1e-8},
    "parallel_scaled_softpick_attn": {"name": "softpick", "eps": 1e-6},
    "naive_scaled_softpick_attn": {"name": "softpick", "eps": 1e-8},
}
"""Every `attn_impl` that is supported, and the formula that its kernel computes."""

PUBLISHED: dict[str, Any] = {
    "architectures": ["TransformerForCausalLM"],
    "attention_bias": False,
    "attn_impl": "parallel_softpick_attn",
    "bos_token_id": 0,
    "elementwise_affine": True,
    "eos_token_id": 0,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 128,
    "initializer_range": 0.006,
    "intermediate_size": None,
    "max_position_embeddings": 1024,
    "model_type": "transformer",
    "norm_eps": 1e-06,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "num_kv_heads": None,
    "qk_norm": False,
    "qkv_bias": False,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "window_size": None,
}
"""All fields of a published `config.json`, but for sizes and `vocab_size`."""

TENSORS = {
    "model.embed_tokens.": "model.embeddings.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".self_attn.": ".attn.",
}
"""Parts of tensor names in our own format, and the same in this one."""


def fla_checkpoint(folder: Path, **fields: Any) -> Path:
    """Write a small random checkpoint in the format and return its folder, `folder / "fla"`.

    `folder / "own"` gets the same weights in our own format. What that does not have (`attn.s`,
    QK-norm) is only in the other.

    Args:
        folder: where to write both.
        fields: of `config.json`, instead of those of `PUBLISHED`.
    """
    config = PUBLISHED | fields
    width = config["intermediate_size"]
    if width is None:
        width = 256 * -(-int(config["hidden_size"] * config["hidden_ratio"] * 2 / 3) // 256)
    own = tiny_checkpoint(
        folder / "own",
        VARIANTS[config["attn_impl"]],
        hidden_size=config["hidden_size"],
        head_dim=config["hidden_size"] // config["num_heads"],
        intermediate_size=width,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_heads"],
        num_key_value_heads=config["num_kv_heads"] or config["num_heads"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config["tie_word_embeddings"],
        sliding_window=config["window_size"],
        attention_bias=config["qkv_bias"],
    )
    weights = load_file(own / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("_proj.bias"):
            # The format has no bias at o_proj; zeros are as good as none.
            tensor.uniform_(-0.5, 0.5) if "o_proj" not in name else tensor.zero_()
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    config["vocab_size"] = json.loads((own / "config.json").read_text())["vocab_size"]

    fla = folder / "fla"
    fla.mkdir()
    for file in own.iterdir():
        if "token" in file.name:
            (fla / file.name).write_bytes(file.read_bytes())
    (fla / "config.json").write_text(json.dumps(config, indent=2))
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in TENSORS.items():
            name = name.replace(ours, theirs)
        if not name.endswith("o_proj.bias"):
            renamed[name] = tensor
    generator = torch.Generator().manual_seed(1)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.attn."
        if "scaled" in config["attn_impl"]:
            positions = torch.arange(4 * config["max_position_embeddings"])
            renamed[prefix + "logn"] = (positions + 2.0).log()[:, None, None]
            renamed[prefix + "s"] = torch.rand(config["num_heads"], 1, generator=generator) + 0.1
        if config["qk_norm"]:
            head_size = config["hidden_size"] // config["num_heads"]
            for norm in ("q_norm", "k_norm"):
                renamed[f"{prefix}{norm}.weight"] = torch.rand(head_size, generator=generator) + 0.5
    save_file(renamed, fla / "model.safetensors", metadata={"format": "pt"})
    return fla


class FlaReferenceModel(ReferenceModel):
    """A checkpoint of the format in float64 that reads one token at a time."""

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        parameters = dict(VARIANTS[fields["attn_impl"]])
        self.variant = get_variant(parameters.pop("name"), **parameters)
        self.config = {
            **fields,
            "num_attention_heads": fields["num_heads"],
            "rms_norm_eps": fields["norm_eps"],
            "rope_parameters": {"rope_theta": fields["rope_theta"]},
        }
        self.weights = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            for ours, theirs in TENSORS.items():
                name = name.replace(theirs, ours)
            self.weights[name] = tensor.double()
        self.reset()

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.self_attn."
        q, k, v = (
            self._linear(x, name + part).view(-1, self.config["hidden_size"] // self.heads)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        if self.config["qk_norm"]:
            q, k = (self._head_norm(a, name + norm) for a, norm in ((q, "q_norm"), (k, "k_norm")))
        q, k = self._rotate(q), self._rotate(k)
        if "scaled" in self.config["attn_impl"]:
            q = q * self.weights[name + "s"] * math.log(self.position + 2)
        self.keys[layer].append(k)
        self.values[layer].append(v)
        output, _ = attention(
            self.variant,
            q[:, None],
            torch.stack(self.keys[layer], 1),
            torch.stack(self.values[layer], 1),
            window=self.config["window_size"],
        )
        return self._linear(output.flatten(), name + "o_proj")

    @property
    def heads(self) -> int:
        heads: int = self.config["num_heads"]
        return heads

    def _head_norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm of each head, with the eps that the format does not let one choose."""
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[name + ".weight"]
        )


@torch.no_grad()
def fla_logits(folder: Path, tokens: list[int]) -> Tensor:
    """Logits `[len(tokens), vocab_size]` of the reference after each token."""
    model = FlaReferenceModel(folder)
    return torch.stack([model.read(token) for token in tokens])


def fla_greedy(folder: Path, prompt: list[int], num_tokens: int) -> Greedy:
    """Return the most likely tokens after a prompt, as `tests.reference_model.reference_greedy`."""
    return decode_greedily(FlaReferenceModel(folder), prompt, num_tokens)


def clear_prompt(folder: Path, length: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """Return a random prompt, and the reference's greedy tokens after it, none a near tie."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(1000 * length + seed)
        prompt = torch.randint(2, 256, (length,), generator=generator).tolist()
        expected = fla_greedy(folder, prompt, num_tokens)
        if min(expected.margins) > 1e-3:
            return prompt, expected.tokens
    raise AssertionError(f"100 prompts of {length} tokens have near ties")
