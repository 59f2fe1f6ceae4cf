"""The work of `attnserve budgets`: a search on the validation text, a comparison on the test."""

import sys
from collections.abc import Collection
from pathlib import Path

from attnserve import machine
from attnserve.budgets import GREEDY_LAYERS, GREEDY_LENGTH, Search
from attnserve.budgets.model import Budgets, Forward, Measured
from attnserve.budgets.result import Found, compare
from attnserve.budgets.search import Target, Validation, by_thresholds, equal, find, higher
from attnserve.budgets.texts import Parts
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.files import CHECKOUT

BUNDLED = CHECKOUT / "checkpoints" / "softmax"
"""The reference where none is named, for a checkpoint of the same tokenizer; in a checkout only."""


def reference_of(own: Checkpoint, named: Path | None) -> Checkpoint | None:
    """Return the reference that is named, else the bundled one; None where that is not there or
    has another tokenizer."""
    if named is None and not (BUNDLED / "config.json").is_file():
        return None
    reference = Checkpoint(named or BUNDLED)
    if reference.variant != "softmax":
        raise UserError(f"{reference.folder} has {reference.variant} attention, not softmax")
    if own.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        if named is None:
            return None
        raise UserError(f"{own.folder} and {named} differ in their tokenizers")
    return reference


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def run(
    own: Checkpoint,
    reference: Checkpoint | None,
    parts: Parts,
    *,
    runs: Path,
    rises: Collection[float],
    max_loss: float | None,
    step: int,
    uniform: Collection[int],
    seed: int,
    search: Search | None = None,
) -> Found:
    """Search budgets for every target, and compare them with other ways of evicting.

    The arguments are options of the command, as `attnserve budgets --help` explains them.
    """
    model = Forward(own, seed)
    softmax = None if reference is None else Forward(reference, seed)
    if reference is None:
        say(
            "Reference: none, no softmax checkpoint of this tokenizer is at hand (--reference "
            "names one). The targets are --rise and --max-loss."
        )
    say(f"Text: {parts.source}")
    validation = Validation(
        Measured(model, parts.search, runs),
        Measured(model, parts.judge, runs),
        None if softmax is None else Measured(softmax, parts.judge, runs),
        step,
    )
    unpruned, allowance = validation.unpruned, validation.allowance
    limits = [(f"+{percent:g} %", higher(unpruned.value, percent)) for percent in rises]
    if max_loss is not None:
        limits.insert(0, ("max-loss", max_loss))
    elif reference is not None and allowance is not None and parts.kind != "own":
        limits.insert(0, (reference.name, unpruned.value + allowance.value))
    if not limits:
        raise UserError("there is no target: give --rise or --max-loss")
    length = len(parts.test.sequences[0])
    budgets = sorted((one for one in uniform if one < length), reverse=True)
    if search is None:
        few = model.layers <= GREEDY_LAYERS and length <= GREEDY_LENGTH
        search = "greedy" if few else "threshold"
    if search == "none":
        targets, path = equal(validation, limits, budgets)
    else:
        targets, path = (find if search == "greedy" else by_thresholds)(validation, limits)
    rows = compare(
        Measured(model, parts.test, runs),
        None if softmax is None else Measured(softmax, parts.test, runs),
        budgets,
        {} if search == "none" else chosen(targets, path, [one * model.layers for one in uniform]),
    )
    about = {
        "checkpoint": own.name,
        "reference": reference and reference.name,
        "digests": {one.name: one.digest for one in (own, reference) if one is not None},
        "text_from": parts.kind,
        "texts": parts.digests,
        "length": length,
        "search": search,
        "step": step if search == "greedy" else None,
        "sequences": {
            "search": len(parts.search),
            "judged": len(parts.judge),
            "test": len(parts.test),
        },
        "seed": seed,
        "machine": machine.summary(),
        "commit": machine.commit(),
    }
    return Found(about, unpruned, allowance, targets, list(path.items()), rows)


def chosen(
    targets: Collection[Target], path: Collection[Budgets], sizes: Collection[int]
) -> dict[Budgets, str]:
    """Return the searched budgets to compare and how they were chosen, the largest first: those
    of the targets that were reached, and the points of the path nearest to some sizes (tokens of
    all layers)."""
    found: dict[Budgets, str] = {}
    for target in targets:
        if target.reached:
            same = found.get(tuple(target.budgets))
            found[tuple(target.budgets)] = f"{same}, {target.name}" if same else target.name
    for size in sizes:
        found.setdefault(min(path, key=lambda one: abs(sum(one) - size)), "searched")
    return dict(sorted(found.items(), key=lambda pair: -sum(pair[0])))
