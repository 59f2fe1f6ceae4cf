"""Checkpoints in flash-linear-attention's `forgetting_transformer` format, and the reference of
such a model: written from the format's fields and tensor names, and independent of
`hf_attn.fla_forgetting`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attn_kernels import get_variant
from attn_kernels.reference import attention
from tests.fla import TENSORS
from tests.reference_model import ReferenceModel, decode_greedily
from tests.tiny import tiny_checkpoint

DEFAULTS: dict[str, Any] = {
    "architectures": ["ForgettingTransformerForCausalLM"],
    "bos_token_id": 0,
    "elementwise_affine": True,
    "eos_token_id": 0,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "model_type": "forgetting_transformer",
    "norm_eps": 1e-06,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "num_kv_heads": None,
    "qk_norm": False,
    "qkv_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_l2warp": False,
    "use_output_gate": False,
    "window_size": None,
}
"""All fields that the format writes, but for sizes and `vocab_size`."""

EVERYTHING = {"num_kv_heads": 2, "qk_norm": True, "qkv_bias": True, "use_output_gate": True}


def fox_checkpoint(folder: Path, **fields: Any) -> Path:
    """Write a small random checkpoint in the format and return its folder, `folder / "fox"`.

    Args:
        folder: where to write it, and its weights in our own format as far as that goes.
        fields: of `config.json`, instead of those of `DEFAULTS`.
    """
    config = DEFAULTS | fields
    heads, width = config["num_heads"], config["hidden_size"]
    kv_heads, layers = config["num_kv_heads"] or heads, config["num_hidden_layers"]
    own = tiny_checkpoint(
        folder / "own",
        "forgetting",
        hidden_size=width,
        head_dim=width // heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=config["norm_eps"],
        tie_word_embeddings=config["tie_word_embeddings"],
    )
    config["vocab_size"] = json.loads((own / "config.json").read_text())["vocab_size"]
    fox = folder / "fox"
    fox.mkdir()
    for file in own.iterdir():
        if "token" in file.name:
            (fox / file.name).write_bytes(file.read_bytes())
    (fox / "config.json").write_text(json.dumps(config, indent=2))
    weights = {}
    for name, tensor in load_file(own / "model.safetensors").items():
        for ours, theirs in TENSORS.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    generator = torch.Generator().manual_seed(1)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.attn."
        sizes = {"q": width, "k": kv_heads * (width // heads), "v": kv_heads * (width // heads)}
        if config["qkv_bias"]:
            for part, size in sizes.items():
                bias = torch.rand(size, generator=generator) - 0.5
                weights[f"{prefix}{part}_proj.bias"] = bias
        if config["qk_norm"]:
            for part in "qk":
                weight = torch.rand(sizes[part], generator=generator) + 0.5
                weights[f"{prefix}{part}_norm.weight"] = weight
        if config["use_output_gate"]:
            weight = torch.randn(width, width, generator=generator) * 0.2
            weights[f"{prefix}g_proj.weight"] = weight
    save_file(weights, fox / "model.safetensors", metadata={"format": "pt"})
    return fox


class FoxReferenceModel(ReferenceModel):
    """A checkpoint of the format in float64 that reads one token at a time."""

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        self.variant, self.budgets, self.kv_format = get_variant("forgetting"), (), None
        self.config = {**fields, "rms_norm_eps": fields["norm_eps"]}
        self.weights = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            for ours, theirs in TENSORS.items():
                name = name.replace(theirs, ours)
            self.weights[name] = tensor.double()
        self.reset()

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.self_attn."
        size = self.config["hidden_size"] // self.config["num_heads"]
        q, k, v = (
            self._linear(x, name + part).view(-1, size) for part in ("q_proj", "k_proj", "v_proj")
        )
        if self.config["qk_norm"]:
            q, k = (self._head_norm(a, name + norm) for a, norm in ((q, "q_norm"), (k, "k_norm")))
        self.keys[layer].append(k)
        self.values[layer].append(v)
        self.gates[layer].append(self._linear(x, name + "f_proj").sigmoid().log())
        output, _ = attention(
            self.variant,
            q[:, None],
            torch.stack(self.keys[layer], 1),
            torch.stack(self.values[layer], 1),
            gates=torch.stack(self.gates[layer], 1),
        )
        output = output.flatten()
        if self.config["use_output_gate"]:
            output = output * self._linear(x, name + "g_proj").sigmoid()
        return self._linear(output, name + "o_proj")

    def _head_norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm of each head, with weights of its own and the format's fixed eps."""
        weight = self.weights[name + ".weight"].view(x.shape)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@torch.no_grad()
def fox_logits(folder: Path, tokens: list[int]) -> Tensor:
    """Logits `[len(tokens), vocab_size]` of the reference after each token."""
    model = FoxReferenceModel(folder)
    return torch.stack([model.read(token) for token in tokens])


def clear_prompt(folder: Path, length: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """Return a random prompt, and the reference's greedy tokens after it, none a near tie."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(1000 * length + seed)
        prompt = torch.randint(2, 256, (length,), generator=generator).tolist()
        expected = decode_greedily(FoxReferenceModel(folder), prompt, num_tokens)
        if min(expected.margins) > 1e-3:
            return prompt, expected.tokens
    raise AssertionError(f"100 prompts of {length} tokens have near ties")
