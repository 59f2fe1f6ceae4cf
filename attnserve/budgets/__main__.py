"""Search how many tokens each layer of a selective-attention checkpoint must keep.

    attnserve budgets checkpoints/selective --write checkpoints/selective_pruned

On the validation text: from full budgets, shrink again and again the layer whose shrinking moves
the loss least, until the loss is that of the reference checkpoint, or --max-loss, and likewise for
--rise. On the test text: perplexity against memory, beside random eviction and first + most recent
tokens on the same checkpoint, and StreamingLLM and H2O on the reference. Where there is no
reference, --rise and --max-loss are all targets, and the checkpoint is compared with itself only.

The text is --text, else the two held-out novels, which --books names or `attnserve books`
has fetched, else text that the checkpoint writes itself. On that the rise of the loss is what it
is on any other, the divergence from the unpruned checkpoint; but no other checkpoint can reach the
writer's loss there, so that the reference's loss is no target.

Every evaluation is kept: the same command goes on where it was after a kill at any moment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from attn_kernels import get_variant
from attn_kernels.variant import LEAST_BUDGET
from attnserve import machine
from attnserve.budgets.forward import Forward
from attnserve.budgets.measured import Budgets, Measured
from attnserve.budgets.plot import draw
from attnserve.budgets.result import FOLDER, Found, write_checkpoint
from attnserve.budgets.table import compare, text_table
from attnserve.budgets.targets import Validation, find, higher
from attnserve.budgets.texts import Counts, Parts, Texts, of_itself, of_novels, of_users_text
from attnserve.errors import UserError
from attnserve.evaluation.books import add_books_option, are_fetched, split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.tokens import text_file
from attnserve.files import CHECKOUT
from attnserve.options import command_line, positive
from attnserve.reports import save_figure

BUNDLED = CHECKOUT / "checkpoints" / "softmax"
"""The reference where none is named, for a checkpoint of the same tokenizer; in a checkout only."""


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("attnserve.budgets", __doc__)
    parser.add_argument("checkpoint", type=Path, help="folder; selective attention")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="CKPT",
        help="a softmax checkpoint of the same tokenizer, whose loss is the target (default: the "
        "bundled one where its tokenizer is the same, else none)",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        help="the target, nats per token (default: the reference's loss where there is one)",
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
    parser.add_argument(
        "--text",
        nargs="+",
        type=text_file,
        metavar="FILE",
        help="UTF-8 text files: the first half is for the search, the second for the test",
    )
    add_books_option(parser)
    add("--runs", "folder of the evaluations", type=Path, default=Path("runs"))
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the result (default: {FOLDER} for the novels, else budgets in --runs)",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table")
    parser.add_argument(
        "--write", type=Path, metavar="CKPT", help="a copy of the checkpoint with the budgets"
    )
    return parser.parse_args(argv)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return Checkpoint(folder)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def reference_of(own: Checkpoint, named: Path | None) -> Checkpoint | None:
    """Return the reference that is named, else the bundled one; None where that is not there or
    has another tokenizer.

    Raises:
        UserError: the one that is named does not fit.
    """
    if named is None and not (BUNDLED / "config.json").is_file():
        return None
    reference = open_checkpoint(named or BUNDLED)
    if reference.variant != "softmax":
        raise UserError(f"{reference.folder} has {reference.variant} attention, not softmax")
    if own.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        if named is None:
            return None
        raise UserError(f"{own.folder} and {named} differ in their tokenizers")
    return reference


def check(o: argparse.Namespace) -> tuple[Checkpoint, Checkpoint | None]:
    """Return the checkpoint and its reference, if there is one.

    Raises:
        UserError: what the command line asks for cannot be done.
    """
    own = open_checkpoint(o.checkpoint)
    if not get_variant(own.variant).prunable:
        raise UserError(f"{own.folder} has {own.variant} attention, which cannot be pruned")
    reference = reference_of(own, o.reference)
    if min(o.uniform) < LEAST_BUDGET:
        raise UserError(f"a layer must keep {LEAST_BUDGET} tokens at least, not {min(o.uniform)}")
    if o.write is not None and o.write.exists():
        raise UserError(f"{o.write} exists: name another folder or delete it")
    return own, reference


def parts_of(o: argparse.Namespace, own: Checkpoint) -> Parts:
    """Return the text that the command line asks for.

    Raises:
        UserError: it is too short, or the novels are not there.
    """
    counts = Counts(o.sequences, o.judge, o.test_sequences, o.length or own.context)
    if o.text:
        return of_users_text(own, o.text, counts)
    try:
        if o.books or are_fetched():
            return of_novels(own, split(o.books), counts)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return of_itself(own, counts)


def run(o: argparse.Namespace) -> Found:
    """Search and compare.

    Raises:
        UserError: it cannot be done.
    """
    own, reference = check(o)
    model = Forward(own, o.seed)
    softmax = None if reference is None else Forward(reference, o.seed)
    if reference is None:
        print(
            "Reference: none, no softmax checkpoint of this tokenizer is at hand (--reference "
            "names one). The targets are --rise and --max-loss.",
            flush=True,
        )
    parts = parts_of(o, own)
    length = parts.test.inputs.shape[1]
    print(f"Text: {parts.source}", flush=True)

    def on(forward: Forward, text: Texts) -> Measured:
        return Measured.on(forward, text, o.runs / "budgets")

    validation = Validation(
        on(model, parts.search),
        on(model, parts.judge),
        None if softmax is None else on(softmax, parts.judge),
        o.step,
    )
    unpruned, allowance = validation.unpruned, validation.allowance
    limits = [(f"+{percent:g} %", higher(unpruned.value, percent)) for percent in o.rise]
    if o.max_loss is not None:
        limits.insert(0, ("max-loss", o.max_loss))
    elif reference is not None and allowance is not None and parts.kind != "own":
        limits.insert(0, (reference.name, unpruned.value + allowance.value))
    if not limits:
        raise UserError("there is no target: give --rise or --max-loss")
    targets, path = find(validation, limits)

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
        on(model, parts.test),
        None if softmax is None else on(softmax, parts.test),
        sorted((budget for budget in o.uniform if budget < length), reverse=True),
        dict(sorted(chosen.items(), key=lambda pair: -sum(pair[0]))),
    )
    about = {
        "checkpoint": own.name,
        "reference": None if reference is None else reference.name,
        "digests": {one.name: one.digest for one in (own, reference) if one is not None},
        "text_from": parts.kind,
        "texts": parts.digests,
        "length": length,
        "step": o.step,
        "sequences": {
            "search": len(validation.looked_at.text),
            "judged": len(validation.judged.text),
            "test": len(parts.test),
        },
        "seed": o.seed,
        "machine": machine.summary(),
        "commit": machine.commit(),
    }
    return Found(about, unpruned, allowance, targets, list(path.items()), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Search, compare, write."""
    o = options(argv)
    try:
        found = run(o)
    except UserError as error:
        print(f"attnserve.budgets: {error}", file=sys.stderr)
        sys.exit(2)
    default = FOLDER if found.about["text_from"] == "novels" else o.runs / "budgets"
    out = found.write(o.out or default)
    if o.plot:
        save_figure(draw([found]), o.plot)
    print(text_table(found.rows))
    reference = ""
    if found.allowance is not None:
        reference = f"; {found.about['reference']} is {found.allowance.shown(4)} above it"
    print(
        f"Validation, {found.about['sequences']['judged']} sequences: unpruned "
        f"{found.unpruned.shown(4)} nats per token{reference}."
    )
    if reference and found.about["text_from"] == "own":
        print("It wrote the text: another model cannot reach its loss there, whatever it is worth.")
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
            sys.exit(f"attnserve.budgets: {o.write} is not written: name a higher --max-loss")
        write_checkpoint(o.checkpoint, found.targets[0].budgets, o.write)


if __name__ == "__main__":
    main()
