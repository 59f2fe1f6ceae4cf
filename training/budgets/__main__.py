"""Search how many tokens each layer of a selective-attention checkpoint must keep.

    python -m training.budgets checkpoints/selective --write checkpoints/selective_pruned

On the validation text: from full budgets, shrink again and again the layer whose shrinking moves
the loss least, until the loss is that of the reference checkpoint, or --max-loss, and likewise for
--rise. On the test text: perplexity against memory, beside random eviction and first + most recent
tokens on the same checkpoint, and StreamingLLM and H2O on the reference.

Every evaluation is kept: the same command goes on where it was after a kill at any moment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from attn_kernels.variants.selective import LEAST_BUDGET
from benchmarks.machine import commit
from benchmarks.options import command_line, positive
from training.analyze.measure import Checkpoint, digest
from training.analyze.store import ROOT
from training.books import Split, add_books_option, split
from training.budgets.forward import Forward, Refusal
from training.budgets.measured import Budgets, Measured
from training.budgets.plot import save
from training.budgets.result import FOLDER, Found, write_checkpoint
from training.budgets.table import compare, text_table
from training.budgets.targets import Validation, find, higher
from training.card import machine


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("training.budgets", __doc__)
    parser.add_argument("checkpoint", type=Path, help="folder; selective attention")
    add(
        "--reference",
        "a softmax checkpoint of the same tokenizer, whose loss is the target",
        type=Path,
        default=ROOT / "checkpoints" / "softmax",
    )
    parser.add_argument(
        "--max-loss", type=float, help="the target, nats per token (default: the reference's loss)"
    )
    add(
        "--rise",
        "more targets: per cent of perplexity over the unpruned checkpoint's",
        nargs="*",
        type=float,
        default=[1.0],
        metavar="PERCENT",
    )
    parser.add_argument(
        "--length", type=positive, help="tokens of a sequence (default: the training length)"
    )
    add("--step", "tokens that a layer gives up at a time", type=positive, default=4)
    add("--sequences", "of the validation text, for the search", type=positive, default=16)
    add("--judge", "sequences of it, for the targets", type=positive, default=128)
    add("--test-sequences", "of the test text, for the table", type=positive, default=64)
    add(
        "--uniform",
        "budgets for the table, tokens a layer",
        nargs="+",
        type=positive,
        default=[8, 12, 16, 24, 32, 48, 64, 128, 256],
        metavar="TOKENS",
    )
    add("--seed", "of random eviction", type=int, default=0)
    add_books_option(parser)
    add("--runs", "folder of the evaluations", type=Path, default=ROOT / "runs")
    add("--out", "folder of the result", type=Path, default=FOLDER)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table")
    parser.add_argument(
        "--write", type=Path, metavar="CKPT", help="a copy of the checkpoint with the budgets"
    )
    return parser.parse_args(argv)


def check(o: argparse.Namespace) -> tuple[Split, Checkpoint, Checkpoint]:
    """The texts, the checkpoint and its reference.

    Raises:
        Refusal: what the command line asks for cannot be done.
    """
    try:
        books = split(o.books)
        own, reference = Checkpoint(o.checkpoint), Checkpoint(o.reference)
    except (FileNotFoundError, ValueError) as error:
        raise Refusal(str(error)) from error
    for checkpoint, wanted in ((own, "selective"), (reference, "softmax")):
        if checkpoint.variant != wanted:
            raise Refusal(f"{checkpoint.folder} has {checkpoint.variant} attention, not {wanted}")
    if own.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise Refusal(f"{own.folder} and {reference.folder} differ in their tokenizers")
    if min(o.uniform) < LEAST_BUDGET:
        raise Refusal(f"a layer must keep {LEAST_BUDGET} tokens at least, not {min(o.uniform)}")
    if o.write is not None and o.write.exists():
        raise Refusal(f"{o.write} exists: name another folder or delete it")
    return books, own, reference


def run(o: argparse.Namespace) -> Found:
    """Search and compare.

    Raises:
        Refusal: it cannot be done.
    """
    books, own, reference = check(o)
    model, softmax = (Forward(checkpoint, o.seed) for checkpoint in (own, reference))
    length = o.length or own.context

    def on(forward: Forward, file: Path, sequences: int) -> Measured:
        return Measured.on(forward, file, length, sequences, o.runs / "budgets")

    validation = Validation(
        on(model, books.validation, o.sequences),
        on(model, books.validation, o.judge),
        on(softmax, books.validation, o.judge),
        o.step,
    )
    unpruned, allowance = validation.unpruned, validation.allowance
    limit = unpruned.value + allowance.value
    main_target = (reference.name, limit) if o.max_loss is None else ("max-loss", o.max_loss)
    rises = [(f"+{percent:g} %", higher(unpruned.value, percent)) for percent in o.rise]
    targets, path = find(validation, [main_target, *rises])

    chosen: dict[Budgets, str] = {}
    for target in targets:
        if target.reached:
            same = chosen.get(tuple(target.budgets))
            chosen[tuple(target.budgets)] = f"{same}, {target.name}" if same else target.name
    for budget in o.uniform:  # points of the path that keep about as much
        wanted = budget * model.layers
        nearest = min(path, key=lambda budgets: abs(sum(budgets) - wanted))
        chosen.setdefault(nearest, "searched")
    rows = compare(
        on(model, books.test, o.test_sequences),
        on(softmax, books.test, o.test_sequences),
        sorted((budget for budget in o.uniform if budget < length), reverse=True),
        dict(sorted(chosen.items(), key=lambda pair: -sum(pair[0]))),
    )
    about = {
        "checkpoint": own.name,
        "reference": reference.name,
        "digests": {checkpoint.name: checkpoint.digest for checkpoint in (own, reference)},
        "texts": {file.name: digest(file) for file in (books.validation, books.test)},
        "length": length,
        "step": o.step,
        "sequences": {
            "search": len(validation.looked_at.text),
            "judged": len(validation.judged.text),
            "test": o.test_sequences,
        },
        "seed": o.seed,
        "machine": machine(),
        "commit": commit(),
    }
    return Found(about, unpruned, allowance, targets, list(path.items()), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Search, compare, write."""
    o = options(argv)
    try:
        found = run(o)
    except Refusal as error:
        sys.exit(f"training.budgets: {error}")
    out = found.write(o.out)
    if o.plot:
        save([found], o.plot)
    print(text_table(found.rows))
    print(
        f"Validation, {found.about['sequences']['judged']} sequences: unpruned "
        f"{found.unpruned.shown(4)} nats per token; {found.about['reference']} is "
        f"{found.allowance.shown(4)} above it."
    )
    for target in found.targets:
        budgets = ", ".join(map(str, target.budgets))
        missed = "" if target.reached else " (not reached: the unpruned model is above it)"
        print(
            f"{target.name}: at most {target.max_loss:.4f} nats with budgets {budgets}, "
            f"{found.factor(target.budgets):.1f} times less memory{missed}"
        )
    summary = {
        target.name: vars(target) | {"factor": round(found.factor(target.budgets), 3)}
        for target in found.targets
    }
    print(json.dumps({"out": str(out), "targets": summary}))
    if o.write is not None:
        if not found.targets[0].reached:
            sys.exit(f"training.budgets: {o.write} is not written: name a higher --max-loss")
        write_checkpoint(o.checkpoint, found.targets[0].budgets, o.write)


if __name__ == "__main__":
    main()
