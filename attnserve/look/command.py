"""The command `attnserve look`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs
from attnserve.errors import UserError
from attnserve.evaluation.arguments import CheckpointFolder, Texts

MOST_TOKENS = 512
"""Tokens that the page's maps have room for."""


@needs("train")
def look(
    checkpoint: CheckpointFolder,
    other: Annotated[
        Path | None,
        Argument(
            metavar="OTHER",
            help="A second checkpoint of the same tokenizer, shown beside the first.",
            show_default=False,
        ),
    ] = None,
    text: Texts = None,
    prompt: Annotated[str | None, Option(help="The text itself, in place of --text.")] = None,
    tokens: Annotated[
        int, Option(min=2, max=MOST_TOKENS, help="Tokens of the text that are read.")
    ] = 96,
    budgets: Annotated[
        list[int] | None,
        Option(
            metavar="TOKENS",
            help="For selective attention: tokens a layer keeps, for each of which the page shows "
            "what is dropped. Default: a quarter and half of the tokens.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, Option(metavar="HTML", help="The page.")] = Path("look.html"),
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint's heads attend to.

      attnserve look checkpoints/softmax checkpoints/softpick --text README.md

    One HTML page, which works offline: for each layer and head the attention map on one text, its
    sink, its exact zeros and its entropy; the text word by word, colored by what a word attends to;
    for selective attention the masks, and which tokens a budget drops. Two checkpoints are shown
    side by side on the same tokens.

    The text is the beginning of --text FILE or --prompt, else what the first checkpoint writes
    itself. Maps are computed in float32 by transformers; a model without attention_variant is shown
    with softmax.
    """
    import transformers

    from attnserve.evaluation import texts
    from attnserve.evaluation.checkpoint import Checkpoint
    from attnserve.files import write_text
    from attnserve.look.maps import maps
    from attnserve.look.page import page, words_of
    from attnserve.sampled_text import alphabet

    transformers.utils.logging.disable_progress_bar()
    own = Checkpoint(checkpoint)
    checkpoints = [own, *([Checkpoint(other)] if other is not None else [])]
    if text and prompt is not None:
        raise UserError("--text and --prompt are both the text: leave one out")
    if text and len(text) > 1:
        raise UserError(f"one text is shown, not {len(text)}: name one file with --text")
    if text:
        title = text[0].name
        ids = own.encode(texts.read(text[0]))
    elif prompt is not None:
        title, ids = "the prompt", own.encode(prompt)
    else:
        title = f"text that {own.name} wrote itself"
        ids = texts.written(title, own, "evaluation", 1, tokens).tokens
    ids = [own.bos, *ids][: min(tokens, *(each.context for each in checkpoints))]
    if len(ids) < 2:
        raise UserError(f"{title} has no token: give more text")
    for each in checkpoints[1:]:
        if alphabet(each) != alphabet(own):
            raise UserError(
                f"{each.folder} has another tokenizer than {checkpoint}: look at each alone"
            )
    looked = [maps(each, ids) for each in checkpoints]
    shown = budgets or sorted({max(2, len(ids) // 4), max(2, len(ids) // 2)} - {len(ids)})
    write_text(out, page(looked, words_of(own, ids), shown, title))
    if as_json:
        figures = {
            found.name: {"sink rate": found.sink_rate}
            | {name: float(values.mean()) for name, values in found.figures.items()}
            for found in looked
        }
        print(json.dumps({"out": str(out), "tokens": len(ids), "figures": figures}))
        return
    print(f"{len(ids)} tokens of {title}; means over all heads")
    names = ("first token", "zeros", "entropy")
    print(f"{'checkpoint':24} {'sink rate':>11}", *(f"{name:>11}" for name in names))
    for found in looked:
        values = [found.sink_rate, *(found.figures[name].mean() for name in names)]
        print(f"{found.name:24}", *(f"{value:11.3f}" for value in values))
    print(f"Page: {out}")


if __name__ == "__main__":
    main(look, "attnserve look")
