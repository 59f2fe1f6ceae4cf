"""KV budgets: how many tokens each layer of selective attention keeps, and what that costs.

`texts` (what is read), `eviction` (which token is thrown out), `model` (a model whose layers prune,
and what has been measured of it), `search` (the greedy descent to targets), `result` (the budgets
beside other ways of evicting, as a file), `plot`, `run` and `command`.
"""
