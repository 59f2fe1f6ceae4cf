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

On Hopper the first, the second and the fourth may run in Gluon, too, where tables say so
(`triton/hopper.py`), if they use no `tl.full`, `tl.zeros` and `tl.zeros_like`: `x * 0.0 + 1.0`.

UNIT_KEYS = True: the scores are also divided by |k|. FIRST_MAX: the running maximum
before the first key; the denominator is 0 there.

A variant that adds something to its scores has one more:

    score_bias(query, distance, params) -> [R, N]
        `distance` [R, N]: how far before the query the key is; anything where it is behind.

A gated variant's is given `score_bias(query, distance, decay, params)`: `decay` [R, N] is what the
gates after the key add up to, up to the query's own. It adds that to the scores as it is, times
log2(e): its derivative in training is the scores'.

One that needs statistics of all scores before the first weight has two more:

    update_statistics(s, seen, row_max, row_sum, query) -> row_max, row_sum
        In a first pass over the keys.
    finish_statistics(maxima [R, S], sums [R, S], query) -> mean, per_spread
        What `update` is given, from all parts of the first pass.

A stateful variant has one more:

    selection(x) -> of the same shape, at least 0
        What head 0's raw scores (in units of 1) add to the accumulators.

To be trained on a GPU (`triton/training.py`) a variant says its derivatives; one that does not is
trained with torch operations. `saved` is what the forward leaves of each row (`Saved`), `dp` the
loss's derivative by each weight. Where there are scores they may be [N, R], too: what is known of
rows is shaped to broadcast to them here.

    weights_backward(s, seen, dp, saved, query, params) -> weights, ds
        The weights once more, and the loss's derivative by the scores (in units of 1), all through
        the weights; 0 where not `seen`.
    row_backward(d_factor, factor, saved, query, scale, params) -> d_norm, d_first, d_second [R]
        Where `query_factor` depends on the query's length or on a learned tensor, or `epilogue` on
        a learned tensor: the loss's derivative by these, given that by the factor without
        log2(e).
    statistics_backward(s, seen, dp, saved, query, params) -> of the same shape
        Of a variant that needs statistics: what is summed up over a row's keys ahead, for
        `weights_backward`, which finds the sum in `saved.through`.
    selection_backward(x) -> of the same shape
        Of a stateful variant: the derivative of `selection`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

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


class Saved(NamedTuple):
    """What the forward leaves of each row for its derivatives."""

    running_max: Any
    denominator: Any
    factor: Any
    """What `epilogue` gives."""
    log_total: Any
    """`running_max - log2(factor)`."""
    mean: Any
    per_spread: Any
    delta: Any
    """The sum of weights times `dp`."""
    through: Any


DERIVATIVES = ("weights_backward", "row_backward", "statistics_backward", "selection_backward")


def has_kernel(variant: Variant) -> bool:
    """Return whether a variant says what it is to GPUs."""
    return (variant.folder() / "kernel.py").exists()


@functools.cache
def functions(variant: Variant) -> dict[str, Any]:
    """Return what the variant gives to the kernels, by the names of their arguments; None for a
    function that it needs none of.

    Raises:
        ValueError: it has no Triton kernel.
    """
    if not has_kernel(variant):
        raise ValueError(f"{variant.name} has no Triton kernel ({variant.folder() / 'kernel.py'})")
    module = _module_of(variant)
    always = ("query_factor", "update", "merge", "epilogue")
    return {
        **{name.upper(): getattr(module, name) for name in always},
        "SCORE_BIAS": getattr(module, "score_bias", None),
        "UPDATE_STATISTICS": getattr(module, "update_statistics", None),
        "FINISH_STATISTICS": getattr(module, "finish_statistics", None),
        "SELECTION": module.selection if variant.stateful else None,
        **{name.upper(): getattr(module, name, None) for name in DERIVATIVES},
        "PARAMS": tuple(variant.numbers()),
        "VARIANT": Constants(
            module.UNIT_KEYS, module.FIRST_MAX, len(variant.learned), variant.gated
        ),
    }


def is_plain(given: Mapping[str, Any]) -> bool:
    """Return whether a variant is nothing but `query_factor`, `update`, `merge` and `epilogue`, of
    what `functions` returns."""
    more = ("SCORE_BIAS", "UPDATE_STATISTICS", "SELECTION")
    constant = given["VARIANT"]
    return not (constant.unit_keys or constant.gated or any(given[name] for name in more))


def _module_of(variant: Variant) -> Any:
    package = sys.modules[type(variant).__module__].__package__
    return importlib.import_module(f"{package}.kernel")


@torch.compiler.assume_constant_result
def missing_kernel(variant: Variant) -> str:
    """Return what a variant lacks to be computed by kernels, whole sequences at once; empty:
    nothing."""
    if not has_kernel(variant):
        return "kernel.py"
    if len(variant.learned) > 2:
        return f"place for {variant.learned[2]}, a third learned tensor"
    return ""


@torch.compiler.assume_constant_result
def missing_derivative(variant: Variant) -> str:
    """Return what a variant lacks to be trained by kernels: a function; empty: nothing."""
    if missing := missing_kernel(variant):
        return missing
    found = functions(variant)
    needed = {
        "weights_backward": True,
        "row_backward": bool(variant.learned) or not variant.plain_scores,
        "statistics_backward": found["UPDATE_STATISTICS"] is not None,
        "selection_backward": variant.stateful,
    }
    return next((name for name in needed if needed[name] and found[name.upper()] is None), "")


def constants(kernel: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given compile-time arguments that a kernel takes."""
    return {name: given[name] for name in kernel.arg_names if name in given}
