"""The Triton functions of each variant, one file each, named as the variant.

A file has these `triton.jit` functions. `[R]` are the query rows of a program, `[R, N]` their
scores against a tile of keys, `[S]` the parts of a split context; all float32. `params` are the
variant's parameters as compile-time constants, in the order of its dataclass, None as NaN.

    query_factor(n, norm, first, second, scale, head_size, params) -> [R]
        What a row's raw scores q.k are multiplied with, times log2(e): scores are exponents of 2.
        `n` [R]: keys that the row sees; `norm` [R]: |q| (0 unless UNIT_KEYS); `first`, `second`
        [R]: its head's learned tensors, in the order of `Variant.learned`; `scale`: the model's,
        and 1 where a soft cap has had it already.
    update(s, seen, running_max, denominator, mean, per_spread, params)
            -> weights [R, N], rescale [R], running_max, denominator
        The weights, 0 where not `seen`, and the factor of what was summed up so far.
    merge(maxima, denominators) -> factors [S], running_max, denominator
        The parts of a split context as one.
    epilogue(running_max, denominator, params) -> factor of the output after the last key.

UNIT_KEYS = True: the scores are also divided by |k|. FIRST_MAX: the running maximum
before the first key; the denominator is 0 there.

A variant that needs statistics of all scores before the first weight has two more:

    update_statistics(s, seen, row_max, row_sum) -> row_max, row_sum
        In a first pass over the keys.
    finish_statistics(maxima [R, S], sums [R, S], n) -> mean, per_spread
        What `update` is given, from all parts of the first pass.

A stateful variant has one more:

    selection(x) -> of the same shape, at least 0
        What head 0's raw scores (in units of 1) add to the accumulators.
"""
