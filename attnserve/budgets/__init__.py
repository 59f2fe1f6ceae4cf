"""Per-layer budgets of selective attention, and what pruning with them costs:
`attnserve budgets`.

One file an idea: texts (what is read), eviction (who is thrown out), forward (a model whose layers
prune), evaluations and measured (what has been measured, kept over a kill), search (the greedy
descent), targets (when it has come far enough), table (beside other ways of evicting), result (the
file), plot.
"""
