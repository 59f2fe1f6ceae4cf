"""Turn a softmax Llama into a checkpoint of another attention variant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs, options_of
from attnserve.errors import UserError
from training.arguments import Variant, device_of
from training.recipe import LEARNING_RATES, Conversion, FineTuning


@options_of(Conversion, FineTuning)
@needs("train")
def convert(
    source: Annotated[
        Path, Argument(metavar="SRC", help="Folder of a softmax Llama.", show_default=False)
    ],
    out: Annotated[
        Path, Argument(metavar="OUT", help="Folder to write; a new one.", show_default=False)
    ],
    variant: Variant,
    data: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE",
            help="UTF-8 text files; a file named *.jsonl holds chats, "
            '{"messages": [...]} a line, which SRC\'s chat template writes out; one named *.npy '
            "holds tokens (python -m training.tokens).",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            help="Use torch.compile. Default: on a GPU. On a CPU all scores are in memory at once.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, Option(help="Where to train: cpu, cuda. Default: cuda if there is one.")
    ] = None,
    as_json: AsJson = False,
    *,
    change: Conversion,
    tuning: FineTuning,
) -> None:
    """Turn a softmax Llama into a checkpoint of another attention variant.

      python -m training.convert SRC OUT --variant ssmax

    As in the SSMax paper (arXiv 2501.19399), every layer and head starts from the scale
    1 / mean(ln n over n = 1 ... train length), with which the scores keep their size on average
    over the lengths that the model was trained on (0.168 for 1,024). Fine-tuning on --data may
    follow (--steps): the other variants need it, since weights that were trained with softmax know
    no other attention.

      python -m training.convert SRC OUT --variant softpick --train all --steps 2000
        --data books.txt chats.jsonl --distill 0.9 --blend 0.5 --precision bf16

    --distill follows SRC's own predictions on the same tokens, which takes fewer tokens than the
    text alone; --blend lets attention go over from softmax to the variant little by little.

    OUT is a Hugging Face folder that `vllm serve OUT` runs; its conversion.json says how it was
    made. A chat template or pad token that SRC lacks is added. An interrupted fine-tuning is kept
    in OUT.part: the same command goes on from there.
    """
    from training import conversion

    if out.exists():
        raise UserError(f"{out} is there already: choose another folder or delete it")
    if tuning.steps and tuning.minutes:
        raise UserError("--steps and --minutes say the same: give one of them")
    if tuning.tunes != bool(data):
        raise UserError("--steps (or --minutes) and --data go together: give both or neither")
    if not tuning.tunes and (tuning.distill or tuning.blend or tuning.memory_loss):
        raise UserError(
            "--distill, --blend and --memory-loss are of a fine-tuning: give --steps and --data too"
        )
    device = device_of(device)
    if not tuning.learning_rate:
        tuning = replace(tuning, learning_rate=LEARNING_RATES[tuning.train])
    compile_it = device != "cpu" if compiled is None else compiled
    model = conversion.convert(source, variant, change)
    record = conversion.write(
        model, source, out, change.train_length, tuning, data or [], compile_it, device
    )
    if as_json:
        print(json.dumps(record))
        return
    print(f"{out}: {record['source']} with {variant['name']} attention")
    stages = {"initial": record["initial"]}
    stages["fine-tuned"] = record.get("finetuning", {}).get("learned", {})
    for stage, summary in stages.items():
        for name, spread in summary.items():
            values = ", ".join(f"{what} {value:.4f}" for what, value in spread.items())
            print(f"{stage} {name}: {values}")


if __name__ == "__main__":
    main(convert, "python -m training.convert")
