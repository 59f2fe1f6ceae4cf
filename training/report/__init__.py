"""docs/RESULTS.md: what the papers claim beside what the reference checkpoints show.

`python -m training.report` reads the results of `training.analyze`, the training curves and the
table of learning rates. Whether a claim agrees is decided by the rules in `rules` and the ranges in
`claims`, never by hand.
"""
