"""Measure what the papers of the variants report, on trained checkpoints.

    python -m training.analyze checkpoints/softmax checkpoints/softpick

Each result is a file, CHECKPOINT/MEASURE.json under --out; one that is there already for the same
weights, texts and settings is not measured again. `python -m training.report` compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers
from tqdm import tqdm

from attn_kernels import VariantError
from attnserve.errors import UserError
from attnserve.evaluation.books import add_books_option
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import SETS, Data, Measure
from attnserve.evaluation.perplexity import Perplexity
from attnserve.evaluation.scorers import Scorer
from attnserve.evaluation.tasks import Blimp, Lambada
from attnserve.options import positive
from training.analyze.attention import Attention
from training.analyze.length import Length, multiples
from training.analyze.passkey import Passkey
from training.analyze.store import FOLDER, Stored, key_of, path_of, read, stored, write

MEASURES: dict[str, type[Measure]] = {
    cls.name: cls for cls in (Attention, Length, Passkey, Lambada, Blimp, Perplexity)
}
ENGINES = ("transformers", "vllm")
QUICK_LIMIT, QUICK_MULTIPLE = 4, 2


def measures(options: argparse.Namespace, context: int) -> list[Measure]:
    """The chosen measures with their settings, for a model of some training length.

    Raises:
        UserError: the training length is above `--max-length`.
    """
    limit = QUICK_LIMIT if options.quick and options.limit is None else options.limit
    if context > options.max_length:
        raise UserError(
            f"the training length of {context} tokens is above --max-length {options.max_length}: "
            "raise it, or lower --context"
        )
    longest = multiples(options.max_length // context)[-1]
    multiple = min(QUICK_MULTIPLE if options.quick else 16, longest)
    chosen: list[Measure] = []
    for name in options.measures:
        if name == Length.name:
            measure: Measure = Length(multiple=multiple)
        elif name == Passkey.name:
            measure = Passkey(multiple=multiple, seed=options.seed)
        else:
            measure = MEASURES[name]()
        if options.rope_theta_factor != 1.0 and not measure.uses_length:
            continue
        if options.engine == "transformers" or measure.needs_scores:
            chosen.append(measure.limited(limit))
    return chosen


def to_do(
    checkpoint: Checkpoint, chosen: Iterable[Measure], data: Data, options: argparse.Namespace
) -> tuple[list[Stored], list[Measure]]:
    """What is there already, and what is to be measured.

    Raises:
        UserError: a file holds a result of other weights, texts or settings.
    """
    present, missing = [], []
    for measure in chosen:
        path = path_of(
            options.out, checkpoint.name, measure.name, options.engine, options.rope_theta_factor
        )
        if options.force or not path.exists():
            missing.append(measure)
            continue
        found, key = read(path), key_of(checkpoint, measure, data)
        if found.key != key:
            differing = ", ".join(name for name in key if key[name] != found.key.get(name))
            raise UserError(
                f"{path} holds a result with another {differing}: --force measures again and "
                "replaces it, --out DIR writes elsewhere"
            )
        present.append(found)
    return present, missing


def scorer_for(
    checkpoint: Checkpoint, missing: Sequence[Measure], options: argparse.Namespace
) -> Scorer:
    """The model in the chosen engine."""
    if options.engine == "vllm":
        from attnserve.evaluation.vllm_scorer import VLLMScorer

        longest = max(measure.longest(checkpoint) for measure in missing)
        return VLLMScorer(
            checkpoint.folder,
            longest,
            rope_theta_factor=options.rope_theta_factor,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        )
    from attnserve.evaluation.scorers import TransformersScorer

    return TransformersScorer(checkpoint.folder, options.rope_theta_factor)


def analyze(folder: Path, data: Data, options: argparse.Namespace) -> list[Stored]:
    """All chosen measures of one checkpoint, each written as soon as it is there."""
    checkpoint = Checkpoint(folder, options.context)
    chosen = measures(options, checkpoint.context)
    for measure in chosen:
        files = measure.files(data)
        for file in files:
            if not file.exists():
                raise UserError(f"{file} is not there: name its folder with --eval or --books")
        if isinstance(measure, Blimp) and not files:
            raise UserError(f"{data.sets} has no blimp/*.jsonl: name its folder with --eval")
    results, missing = to_do(checkpoint, chosen, data, options)
    print(f"{checkpoint.name}: {len(missing)} to measure, {len(results)} there already", flush=True)
    if not missing:
        return results
    scorer = scorer_for(checkpoint, missing, options)
    try:
        for measure in missing:
            start = time.monotonic()
            result = measure.run(checkpoint, data, scorer)
            found = stored(
                checkpoint,
                measure,
                data,
                options.engine,
                options.rope_theta_factor,
                time.monotonic() - start,
                result,
            )
            write(options.out, found)
            results.append(found)
    finally:
        scorer.close()
    return sorted(results, key=lambda found: list(MEASURES).index(found.measure))


def table(results: Sequence[Stored]) -> str:
    """One row a figure, one column a checkpoint: value and 95 % interval."""
    columns = list(dict.fromkeys(found.checkpoint for found in results))
    rows: dict[str, dict[str, str]] = {}
    for found in results:
        for figure, estimate in found.result.summary.items():
            rows.setdefault(f"{found.measure}: {figure}", {})[found.checkpoint] = estimate.shown()
    lines = [["", *columns]] + [
        [name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m training.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("checkpoints", nargs="+", type=Path, help="Hugging Face folders")
    titles = "; ".join(f"{name}: {cls.title}" for name, cls in MEASURES.items())
    made.add_argument(
        "--measures",
        nargs="+",
        choices=list(MEASURES),
        default=list(MEASURES),
        metavar="MEASURE",
        help=f"{titles} (default: all)",
    )
    made.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what runs the model, in float32; vllm leaves out `attention` (default: %(default)s)",
    )
    made.add_argument(
        "--limit",
        type=positive,
        help="cap on every sample size: windows, sequences, passages, pairs (default: none)",
    )
    made.add_argument(
        "--max-length",
        type=positive,
        default=16384,
        help="tokens of the longest context; 16 training lengths at most (default: %(default)s)",
    )
    made.add_argument(
        "--context",
        type=positive,
        help="training length in tokens (default: max_position_embeddings of config.json)",
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help=f"--limit {QUICK_LIMIT} and {QUICK_MULTIPLE} training lengths: does it run at all?",
    )
    made.add_argument(
        "--rope-theta-factor",
        type=float,
        default=1.0,
        help="multiply RoPE's theta; with another than 1 only length and passkey are measured "
        "(default: %(default)s; the SSMax paper has 50)",
    )
    made.add_argument("--seed", type=int, default=0, help="of the passkeys (default: %(default)s)")
    made.add_argument(
        "--kv-cache-memory-bytes",
        type=positive,
        default=2**30,
        help="vLLM's paged cache, in bytes (default: %(default)s)",
    )
    add_books_option(made)
    made.add_argument(
        "--eval", type=Path, metavar="DIR", help=f"folder of the evaluation sets: {SETS}"
    )
    made.add_argument(
        "--out", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)"
    )
    made.add_argument("--force", action="store_true", help="measure again what is there")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = parser()
    options = command.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    data = Data(options.books, options.eval)
    results: list[Stored] = []
    try:
        names = [folder.resolve().name for folder in options.checkpoints]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two checkpoints are called {min(twice)}: their results would clash")
        for folder in tqdm(options.checkpoints, desc="checkpoints", disable=len(names) < 2):
            results += analyze(folder, data, options)
    except (UserError, ValueError, FileNotFoundError, VariantError) as error:
        print(f"{command.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(results))
    figures: dict[str, dict[str, list[float | None]]] = {}
    for found in results:
        for name, estimate in found.result.summary.items():
            figures.setdefault(found.checkpoint, {})[f"{found.measure}: {name}"] = estimate.json()
    print(json.dumps({"out": str(options.out), "engine": options.engine, "figures": figures}))


if __name__ == "__main__":
    main()
