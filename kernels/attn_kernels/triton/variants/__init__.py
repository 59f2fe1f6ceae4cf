"""The Triton form of each variant, one file each, named as the variant.

A file has these `triton.jit` functions. `[R]` are the query rows of a program, `[R, N]` their
scores against a tile of keys, `[S]` the parts of a split context; all float32. `params` are the
variant's parameters as compile-time constants, in the order of its dataclass, None as NaN.

    query_factor(n, norm, first, second, scale, head_size, params) -> [R]
        What a row's raw scores q.k are multiplied with, times log2(e): scores are exponents of 2.
        `n` [R]: keys that the row sees; `norm` [R]: |q| (0 unless UNIT_KEYS); `first`, `second`
        [R]: its head's learned tensors, in the order of `Variant.learned`; `scale`: the model's,
        and 1 where a soft cap has had it already.
    start(zeros) -> top, total
        What a row carries along its keys, before the first.
    weigh(s, seen, top, total, mean, per_spread, params) -> weights [R, N], factor [R], top, total
        Weights, 0 where not `seen`; the factor of what was summed up so far.
    merge(tops, totals) -> factors [S], top, total
        Of the parts of a split context.
    finish(top, total, params) -> factor of the output after the last key.

UNIT_KEYS = True: the scores are also divided by |k|.

A variant that must see all scores before it can weigh the first has two more:

    observe(s, seen, top, total) -> top, total
        The first pass.
    settle(tops [R, S], totals [R, S], n) -> mean, per_spread
        What the second pass is given, from all parts of the first.
"""
