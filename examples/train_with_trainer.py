"""Train a Llama with any attention variant by transformers' Trainer.

python examples/train_with_trainer.py my-model --variant softpick --text docs/*.md
"""

import argparse
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from attn_kernels import variant_names
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM

CONTEXT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the checkpoint's folder, which is written")
    parser.add_argument("--variant", choices=variant_names(), default="softpick")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="UTF-8 files")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    trained = ByteLevelBPETokenizer()
    trained.train([str(file) for file in arguments.text], 1024, special_tokens=["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    text = "".join("<|end|>" + file.read_text(encoding="utf-8") for file in arguments.text)
    ids = tokenizer(text)["input_ids"]
    sequences = [
        {"input_ids": ids[start : start + CONTEXT]}
        for start in range(0, len(ids) - CONTEXT, CONTEXT)
    ]

    config = VariantLlamaConfig(
        attention_variant={"name": arguments.variant},
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    trainer = Trainer(
        VariantLlamaForCausalLM(config),
        TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=sequences,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(arguments.out)  # config.json, weights and tokenizer
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
