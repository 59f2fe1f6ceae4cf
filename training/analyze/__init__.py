"""What the papers of the variants report, measured on checkpoints: `python -m training.analyze`.

One measure a file (`attention`, `length`, `passkey`, `lambada`, `blimp`, `perplexity`). All but the
first ask a `Scorer` for log-probabilities, and transformers and vLLM are two of those.
`python -m training.report` writes docs/RESULTS.md from the results.
"""
