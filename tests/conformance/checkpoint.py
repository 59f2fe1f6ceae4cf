"""A tiny model that can see: what a conformance suite asks of a chat model, vLLM can do with it.

BLIP-2 with a Llama, because of vLLM 0.32's models that take images it is one that does without
torchvision, which this environment leaves out (docs/ARCHITECTURE.md). Random weights and a small
vocabulary: it says nothing of sense, and samples the end of its answer within some hundred tokens.
"""

from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    LlamaConfig,
)

from tests.tiny import tiny_tokenizer

IMAGE = "<image>"
PIXELS = {"height": 28, "width": 28}
QUERIES = 4

# OpenAI's content is a string or a list of parts; vLLM puts the image's tokens first by itself.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.content is string %}{{ m.content }}"
    "{% elif m.content %}{% for p in m.content %}{{ p.text or '' }}{% endfor %}{% endif %}\n"
    "{% endfor %}assistant: "
)


def write_tiny_blip2(folder: Path) -> Path:
    """Write one of 2 + 2 + 2 layers (float32, context 8192), and return `folder`."""
    tokenizer = tiny_tokenizer(384)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **small, num_attention_heads=2, image_size=PIXELS["height"], patch_size=14
        ),
        qformer_config=Blip2QFormerConfig(
            **small, num_attention_heads=2, encoder_hidden_size=64, vocab_size=len(tokenizer)
        ),
        text_config=LlamaConfig(
            **small,
            vocab_size=len(tokenizer),
            head_dim=32,  # the smallest that vLLM's CPU attention takes
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=0,
            architectures=["LlamaForCausalLM"],
        ),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size=PIXELS)
    Blip2Processor(images, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    return folder
