"""Turn a softmax Llama into a checkpoint of another attention variant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs, options_of
from attnserve.errors import UserError
from attnserve.evaluation.arguments import Texts
from training.arguments import Variant
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
    data: Texts = None,
    compiled: Annotated[
        bool, Option("--compile", help="Use torch.compile; all scores are in memory at once.")
    ] = False,
    as_json: AsJson = False,
    *,
    change: Conversion,
    tuning: FineTuning,
) -> None:
    """Turn a softmax Llama into a checkpoint of another attention variant.

      python -m training.convert SRC OUT --variant ssmax

    As in the SSMax paper (arXiv 2501.19399), every layer and head starts from the scale
    1 / mean(ln n over n = 1 ... train length), with which the scores keep their size on average
    over the lengths that the model was trained on (0.168 for 1,024). A few steps of fine-tuning on
    --data may follow (--steps). Variants without learned tensors can be named as well: softpick and
    the like, on weights that were trained with softmax, are experiments.

    OUT is a Hugging Face folder that `vllm serve OUT` runs; its conversion.json says how it was
    made. A chat template or pad token that SRC lacks is added. An interrupted fine-tuning is kept
    in OUT.part: the same command goes on from there.
    """
    from training import conversion

    if out.exists():
        raise UserError(f"{out} is there already: choose another folder or delete it")
    if bool(tuning.steps) != bool(data):
        raise UserError("--steps and --data go together: give both or neither")
    if not tuning.learning_rate:
        tuning = replace(tuning, learning_rate=LEARNING_RATES[tuning.train])
    model = conversion.convert(source, variant, change)
    record = conversion.write(model, source, out, change.train_length, tuning, data or [], compiled)
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
