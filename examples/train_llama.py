"""Train a small Llama with any attention variant, in one file in the manner of nanoGPT.

    python examples/train_llama.py my-model --variant softpick --text docs/*.md

The model has the tensor names of transformers' Llama, so that what it has learned is written as a
checkpoint that vLLM and transformers load.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import PreTrainedTokenizerFast

from attn_kernels import Variant, attend, causal_mask, get_variant, variant_names
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM

CONTEXT, WIDTH, HEADS, LAYERS, BATCH, VOCABULARY = 128, 128, 4, 2, 16, 1024


class Attention(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        for name in variant.learned:  # for example ssmax's scale, one a head
            setattr(self, name, nn.Parameter(torch.full((HEADS,), variant.initial(name))))
        if variant.gated:
            self.f_proj = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        learned = {name: getattr(self, name) for name in self.variant.learned}
        gates = self.variant.gate(self.f_proj(x)).mT if self.variant.gated else None
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        output, _ = attend(self.variant, q, k, v, mask, learned=learned, gates=gates)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down_proj = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.self_attn = Attention(variant)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.mlp = MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, variant: Variant, vocabulary: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer(variant) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])
        mask = causal_mask(positions, positions)
        size = WIDTH // HEADS
        angles = torch.outer(positions, 10000.0 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, variant: Variant, vocabulary: int) -> None:
        super().__init__()
        self.model = Decoder(variant, vocabulary)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        for weight in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding in Llama's order: the first half with the second."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def export(model: Llama, variant: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint: config.json names the variant, the rest is a Llama's folder."""
    config = VariantLlamaConfig(
        attention_variant={"name": variant},
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    checkpoint = VariantLlamaForCausalLM(config)
    checkpoint.load_state_dict(model.state_dict())
    checkpoint.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the checkpoint's folder, which is written")
    parser.add_argument("--variant", choices=variant_names(), default="softpick")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="UTF-8 files")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if missing := [str(file) for file in arguments.text if not file.is_file()]:
        parser.error(f"{missing[0]} is not there: name text files with --text")

    trained = ByteLevelBPETokenizer()
    trained.train(
        [str(file) for file in arguments.text],
        VOCABULARY,
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    )
    text = "".join("<|end|>" + file.read_text(encoding="utf-8") for file in arguments.text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])

    torch.manual_seed(0)
    model = Llama(get_variant(arguments.variant), len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    for step in range(arguments.steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        batch = tokens[starts + torch.arange(CONTEXT + 1)]
        logits = model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    export(model, arguments.variant, tokenizer, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
