"""The command `attnserve evaluate`."""

import json
from typing import Annotated

from typer import Option

from attnserve.command import AsJson, main, needs
from attnserve.evaluation.arguments import Books, CheckpointFolder, Texts
from attnserve.evaluation.books import are_fetched, split

TOKENS = 2**15  # tokens of each text that are read where nothing else is said
OWN_TEXT, OWN_SEQUENCES, OWN_LENGTH = "own text", 16, 512
"""What a checkpoint writes where no text is at hand: sequences, and the tokens of each."""


@needs("train")
def evaluate(
    checkpoint: CheckpointFolder,
    text: Texts = None,
    books: Books = None,
    sequences: Annotated[
        int | None,
        Option(
            min=1,
            help="Sequences of the training length, from the beginning of each text. Default: as "
            f"many as have {TOKENS} tokens.",
            show_default=False,
        ),
    ] = None,
    whole: Annotated[
        bool, Option("--whole", help="Read whole texts, which takes minutes for novels.")
    ] = False,
    ngrams: Annotated[
        bool, Option("--ngrams", help="Add the two baselines, which need the novels.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a checkpoint.

    It reads --text FILE, or the beginnings of the two held-out novels, which --books names or
    `attnserve books` has fetched. Where there are neither, it reads text that the checkpoint writes
    itself; its perplexity there is the entropy of its own sampling, not a measure of its English.

    --ngrams adds an add-one unigram and an interpolated Kneser-Ney trigram over the same tokens,
    counted on the novels that the reference checkpoints train on. --whole --ngrams gives the
    figures of the model cards.
    """
    import transformers

    from attnserve.evaluation import perplexity, texts
    from attnserve.evaluation.checkpoint import Checkpoint

    transformers.utils.logging.disable_progress_bar()
    train = split(books).train if ngrams else []
    own = Checkpoint(checkpoint)
    most = None if whole else sequences or max(1, TOKENS // own.context)
    if text:
        found = [texts.beginning(own, file.name, file, most) for file in text]
    elif books or are_fetched():
        found = texts.held_out(own, split(books), most)
    else:
        count = min(most or OWN_SEQUENCES, OWN_SEQUENCES)
        length = min(own.context, OWN_LENGTH)
        found = [texts.written(OWN_TEXT, own, "evaluation", count, length)]
    scores = perplexity.evaluate(own, found, train)
    if as_json:
        print(json.dumps({"scores": [score.json() for score in scores]}))
        return
    print(perplexity.table(scores))
    if found[0].title == OWN_TEXT:
        print(
            "The checkpoint wrote this text itself: the perplexity is the entropy of its own "
            "sampling and says\nnothing about its English. For a real text: --text FILE, or the "
            "novels (attnserve books)."
        )


if __name__ == "__main__":
    main(evaluate, "attnserve evaluate")
