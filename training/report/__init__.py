"""docs/RESULTS.md: what the papers claim beside what the reference checkpoints show.

Whether a claim agrees is decided by the rules in `figures` and the ranges in claims.yaml, never by
hand.
"""
