"""KV budgets: how many tokens each layer of selective attention keeps, and what that costs.

`texts` (what is read), `eviction` (which token is thrown out), `model` (a model whose layers prune,
and what has been measured of it), `search` (two ways to the targets), `result` (the budgets
beside other ways of evicting, as a file), `plot`, `run` and `command`.
"""

from typing import Literal

Search = Literal["greedy", "threshold", "none"]
"""How budgets are searched (`attnserve.budgets.search`); none: they are the same in all layers."""
GREEDY_LAYERS = 8
GREEDY_LENGTH = 2048
"""Up to here a greedy search is the default; of 30 layers it takes days."""
