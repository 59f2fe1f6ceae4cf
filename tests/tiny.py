"""Tiny Llamas with random weights and a real tokenizer: a plain one, and one of any variant."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM

LICENSE = Path(__file__).parent.parent / "LICENSE"


def tiny_tokenizer(vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the licence text; `vocab_size` is an upper bound."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(LICENSE)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    )


def write_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Write it (float32, 2 layers, 4 heads, 2 KV heads, context 16384) and return `folder`."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_checkpoint(folder: Path, variant: str | dict[str, Any], **overrides: Any) -> Path:
    """Write a small random checkpoint of any variant and return `folder`.

    Its weights are large enough for attention to be far from uniform and for greedy tokens to
    vary, its learned per-head tensors all differ, and everything is float32.

    Args:
        folder: where to write.
        variant: a variant's name, or `{"name": ..., **parameters}`.
        overrides: fields of `VariantLlamaConfig`, for example `sliding_window=16`.
    """
    tokenizer = tiny_tokenizer(512)
    fields = {
        "attention_variant": {"name": variant} if isinstance(variant, str) else variant,
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    model = VariantLlamaForCausalLM(VariantLlamaConfig(**fields | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in model.config.variant.learned:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            elif name.endswith("f_proj.bias"):  # some heads forget fast, some hardly
                parameter.copy_(torch.linspace(0, 4, parameter.numel()))
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
