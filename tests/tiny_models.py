"""Tiny models of other architectures, with large random weights."""

from collections.abc import Callable

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


TIED = ("gemma2", "bloom")
"""Where the head is the embedding, and that is large, a model says what it was told last."""


def tiny_model(kind: str) -> PreTrainedModel:
    """Return a model of an architecture, with large random weights."""
    torch.manual_seed(0)
    layers = {"vocab_size": 512, "num_hidden_layers": 3}
    windows = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
    of_alibi = {"vocab_size": 512, "hidden_size": 128, "initializer_range": 0.1}
    of_alibi |= {"bos_token_id": 0, "eos_token_id": 0}
    make: dict[str, Callable[[], PreTrainedModel]] = {
        # It passes `sinks=None` through vLLM's layer.
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**layers, **COMMON)),
        # Caps that matter: raw scores are about as large.
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=512,
                num_hidden_layers=4,
                head_dim=32,
                query_pre_attn_scalar=32,
                attn_logit_softcapping=2.0,
                **windows,
                **COMMON,
            )
        ),
        "gpt_oss": lambda: GptOssForCausalLM(
            GptOssConfig(
                vocab_size=512,
                num_hidden_layers=4,
                head_dim=32,
                num_local_experts=4,
                num_experts_per_tok=2,
                **windows,
                **COMMON,
            )
        ),
        "bloom": lambda: BloomForCausalLM(BloomConfig(n_layer=3, n_head=4, **of_alibi)),
    }
    model = make[kind]()
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # sdpa leaves the caps out
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.uniform_(-1.0, 4.0)  # as large as scores
            elif kind in TIED and parameter.dim() > 1:
                parameter *= 0.1 if "embed" in name else 4.0
    return model
