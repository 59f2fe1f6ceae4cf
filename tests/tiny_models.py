"""Small models of many architectures, with random weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
MULTI_HEAD = {"num_key_value_heads": 4}
HEAD = {"head_dim": 32}
WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32, **HEAD},
    "mixtral": {**EXPERTS, **HEAD},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3": HEAD,
    "qwen3_moe": {**EXPERTS, **HEAD},
    "phi": MULTI_HEAD,
    "phi3": {},
    "gemma": HEAD,
    "gemma2": {
        **WINDOW,
        **HEAD,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,  # raw scores are about as large
    },
    "gemma3_text": {**WINDOW, **HEAD, "num_hidden_layers": 4, "query_pre_attn_scalar": 32},
    "gemma3n_text": {
        **WINDOW,
        **HEAD,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "architectures": ["Gemma3nForCausalLM"],
    },
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 1024},
    "gpt_neox": MULTI_HEAD,
    "gptj": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 1024, "rotary_dim": 16},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128, **MULTI_HEAD},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 128, "n_layers": 3, "n_heads": 4, "max_seq_len": 1024},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
    "falcon, ALiBi": {"alibi": True, "multi_query": False, "bias": True},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "stablelm": {},
    "starcoder2": {},
    "olmo": {},
    "olmo2": {},
    "granite": {},
    "granitemoe": EXPERTS,
    "cohere": {},
    "cohere2": {**WINDOW, **HEAD, "num_hidden_layers": 4},
    "exaone4": {**WINDOW, **HEAD, "num_hidden_layers": 4},
    "glm": HEAD,
    "glm4": HEAD,
    "nemotron": {},
    "smollm3": {},
    "ernie4_5": HEAD,
    "seed_oss": HEAD,
    "arcee": {},
    "apertus": HEAD,
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_bigcode, multi-head": {"multi_query": False, **MULTI_HEAD},
    "gpt_oss": {**WINDOW, **EXPERTS, "head_dim": 64, "num_hidden_layers": 4},
    "deepseek_v3": {
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        **MULTI_HEAD,
    },
}
"""By `model_type`: what is changed of a small configuration."""


def tiny_model(name: str, **changed: Any) -> PreTrainedModel:
    """Return a random model of an architecture, a key of `ARCHITECTURES`, in float32; its attention
    is "eager", since others leave out soft caps. `changed`: fields of its configuration."""
    torch.manual_seed(0)
    fields = COMMON | ARCHITECTURES[name] | changed
    config = AutoConfig.for_model(name.partition(",")[0], **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.uniform_(parameter, -1.0, 4.0)  # as large as scores
        elif parameter.ndim == 1:  # biases and norms start alike in all layers
            torch.nn.init.normal_(parameter, float(parameter.detach().mean()), 0.1)
    return model.float().eval()
