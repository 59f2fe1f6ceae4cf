"""What a variant's `kernel.py` is: its Triton functions, for GPUs.

It has these `triton.jit` functions. `[R]` are the query rows of a program, `[R, N]` their
scores against a tile of keys, `[S]` the parts of a split context; all float32. `params` are the
variant's parameters as compile-time constants, in the order of its dataclass, None as NaN.

`query` is what is known of each row's query (`Query`):

    head, position: integers; the head is this rank's, the position counts from 0.
    n: how many keys it sees. norm: |q|.
    first, second: its head's learned tensors, in the order of `Variant.learned`.

    query_factor(query, scale, head_size, params) -> [R]
        What a row's raw scores q.k are multiplied with, times log2(e): scores are exponents of 2.
    update(s, seen, running_max, denominator, mean, per_spread, query, params)
            -> weights [R, N], rescale [R], running_max, denominator
        The weights, 0 where not `seen`, and the factor of what was summed up so far.
    merge(maxima, denominators) -> factors [S], running_max, denominator
        The parts of a split context as one.
    epilogue(running_max, denominator, query, params) -> factor of the output after the last key.

UNIT_KEYS = True: the scores are also divided by |k|. FIRST_MAX: the running maximum
before the first key; the denominator is 0 there.

A variant that adds something to its scores has one more:

    score_bias(query, distance, params) -> [R, N]
        `distance` [R, N]: how far before the query the key is; anything where it is behind.

A gated variant's is given `score_bias(query, distance, decay, params)`: `decay` [R, N] is what the
gates after the key add up to, up to the query's own.

One that needs statistics of all scores before the first weight has two more:

    update_statistics(s, seen, row_max, row_sum, query) -> row_max, row_sum
        In a first pass over the keys.
    finish_statistics(maxima [R, S], sums [R, S], query) -> mean, per_spread
        What `update` is given, from all parts of the first pass.

A stateful variant has one more:

    selection(x) -> of the same shape, at least 0
        What head 0's raw scores (in units of 1) add to the accumulators.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from attn_kernels.variant import Variant


class Constants(NamedTuple):
    """What is constant of a variant, as compile-time arguments."""

    unit_keys: bool
    first_max: float
    num_learned: int
    gated: bool


class Query(NamedTuple):
    """What is known of each row's query, `[R]` each."""

    head: Any
    position: Any
    n: Any
    norm: Any
    first: Any
    second: Any


@functools.cache
def functions(variant: Variant) -> dict[str, Any]:
    """Return what the variant gives to the kernels, by the names of their arguments; None for a
    function that it needs none of.

    Raises:
        ValueError: it has no Triton kernel.
    """
    if not (variant.folder() / "kernel.py").exists():
        raise ValueError(f"{variant.name} has no Triton kernel ({variant.folder() / 'kernel.py'})")
    package = sys.modules[type(variant).__module__].__package__
    module = importlib.import_module(f"{package}.kernel")
    always = ("query_factor", "update", "merge", "epilogue")
    return {
        **{name.upper(): getattr(module, name) for name in always},
        "SCORE_BIAS": getattr(module, "score_bias", None),
        "UPDATE_STATISTICS": getattr(module, "update_statistics", None),
        "FINISH_STATISTICS": getattr(module, "finish_statistics", None),
        "SELECTION": module.selection if variant.stateful else None,
        "PARAMS": tuple(variant.numbers()),
        "VARIANT": Constants(
            module.UNIT_KEYS, module.FIRST_MAX, len(variant.learned), variant.gated
        ),
    }


def constants(kernel: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given compile-time arguments that a kernel takes."""
    return {name: given[name] for name in kernel.arg_names if name in given}
