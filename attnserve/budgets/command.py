"""The command `attnserve budgets`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from attnserve.budgets import GREEDY_LAYERS, GREEDY_LENGTH, Search
from attnserve.command import AsJson, main, needs
from attnserve.errors import UserError
from attnserve.evaluation.arguments import Books, CheckpointFolder, Texts
from attnserve.evaluation.books import are_fetched, split

UNIFORM = (8, 12, 16, 24, 32, 48, 64, 128, 256)


@needs("train")
def budgets(
    checkpoint: CheckpointFolder,
    reference: Annotated[
        Path | None,
        Option(
            metavar="CKPT",
            help="A softmax checkpoint of the same tokenizer, whose loss is the target. Default: "
            "the bundled one where its tokenizer is the same, else none.",
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        Option(
            help="The target, nats per token. Default: the reference's loss where there is one."
        ),
    ] = None,
    rise: Annotated[
        list[float] | None,
        Option(
            metavar="PERCENT",
            help="More targets: per cent of perplexity over the unpruned checkpoint's. Default: 1.",
        ),
    ] = None,
    no_rise: Annotated[bool, Option("--no-rise", help="No targets of that kind.")] = False,
    length: Annotated[
        int | None, Option(min=1, help="Tokens of a sequence. Default: the training length.")
    ] = None,
    step: Annotated[
        int, Option(min=1, help="Tokens that a layer gives up at a time, of greedy.")
    ] = 4,
    sequences: Annotated[
        int, Option(min=1, help="Sequences of the validation text, for the search.")
    ] = 16,
    judge: Annotated[int, Option(min=1, help="Sequences of it, for the targets.")] = 128,
    test_sequences: Annotated[
        int, Option(min=1, help="Sequences of the test text, for the table.")
    ] = 64,
    uniform: Annotated[
        list[int] | None,
        Option(
            min=1,
            metavar="TOKENS",
            help=f"Budgets for the table, tokens a layer. Default: {' '.join(map(str, UNIFORM))}.",
        ),
    ] = None,
    search: Annotated[
        Search | None,
        Option(
            help="How: greedy, layer by layer; threshold, all layers keep what is masked by less "
            "than the same amount; none, the same budget in all layers, of --uniform. "
            f"Default: greedy up to {GREEDY_LAYERS} layers and {GREEDY_LENGTH} tokens, else "
            "threshold.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, Option(help="Seed of random eviction.")] = 0,
    text: Texts = None,
    books: Books = None,
    runs: Annotated[Path, Option(help="Folder of the evaluations.")] = Path("runs"),
    out: Annotated[
        Path | None,
        Option(
            help="Folder of the result. Default: training/results/budgets for the novels, else "
            "budgets in --runs."
        ),
    ] = None,
    plot: Annotated[Path | None, Option(metavar="PNG", help="Draw the table.")] = None,
    write: Annotated[
        Path | None, Option(metavar="CKPT", help="Write a copy of the checkpoint with the budgets.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find KV budgets for a checkpoint with selective attention.

    The search finds how many tokens each layer of a prunable variant must keep:

      attnserve budgets checkpoints/selective --write checkpoints/selective_pruned

    On the validation text, it starts from full budgets and shrinks again and again the layer whose
    shrinking moves the loss least, until the loss is that of the reference checkpoint, or
    --max-loss, and likewise for --rise. With many layers that would take days: there it looks for
    the lowest threshold, of a list in which each is 1.4 times the one before, such that every layer
    may forget what is masked by more (--search). On the test text, it compares perplexity and
    memory with random eviction and with keeping the first and the most recent tokens on the same
    checkpoint, and with StreamingLLM and H2O on the reference. Where there is no reference, --rise
    and --max-loss are all targets, and the checkpoint is compared with itself only.

    The text is --text, of which the first half is for the search and the second for the test, else
    the two held-out novels, which --books names or `attnserve books` has fetched, else text that
    the checkpoint writes itself. On that the rise of the loss is what it is on any other, the
    divergence from the unpruned checkpoint; but no other checkpoint can reach the writer's loss
    there, so that the reference's loss is no target.

    Every evaluation is kept: the same command goes on where it was after a kill at any moment.
    """
    from attn_kernels import get_variant
    from attn_kernels.variant import LEAST_BUDGET
    from attnserve.budgets.result import FOLDER, text_table, write_checkpoint
    from attnserve.budgets.run import reference_of, run
    from attnserve.budgets.texts import parts_of
    from attnserve.evaluation.checkpoint import Checkpoint

    own = Checkpoint(checkpoint)
    if not get_variant(own.variant).prunable:
        raise UserError(f"{checkpoint} has {own.variant} attention, which cannot be pruned")
    softmax = reference_of(own, reference)
    kept = uniform or UNIFORM
    if min(kept) < LEAST_BUDGET:
        raise UserError(f"a layer must keep {LEAST_BUDGET} tokens at least, not {min(kept)}")
    if write is not None and write.exists():
        raise UserError(f"{write} exists: name another folder or delete it")
    counts = (sequences, judge, test_sequences)
    novels = split(books) if not text and (books or are_fetched()) else None
    parts = parts_of(own, counts, length or own.context, text or (), novels)
    found = run(
        own,
        softmax,
        parts,
        runs=runs / "budgets",
        rises=[] if no_rise else rise or [1.0],
        max_loss=max_loss,
        step=step,
        uniform=kept,
        seed=seed,
        search=search,
    )
    file = found.write(out or (FOLDER if parts.kind == "novels" else runs / "budgets"))
    if plot:
        from attnserve.budgets.plot import draw
        from attnserve.reports import save_figure

        save_figure(draw([found]), plot)
    if as_json:
        summary = {
            target.name: vars(target) | {"factor": round(found.factor(target.budgets), 3)}
            for target in found.targets
        }
        print(json.dumps({"out": str(file), "targets": summary}))
    else:
        print(text_table(found.rows))
        print("\n".join(found.lines()))
        print(f"Written to {file}")
    if write is not None:
        if not found.targets[0].reached:
            raise UserError(f"{write} is not written: name a higher --max-loss")
        write_checkpoint(checkpoint, found.targets[0].budgets, write)


if __name__ == "__main__":
    main(budgets, "attnserve budgets")
