"""The recipe of the reference checkpoints: a plain, resumable torch loop over hf_attn models.

`python -m training.tokenizer` trains a tokenizer, `python -m training.train` a model,
`attnserve evaluate` measures one, and `python -m training.checkpoints` does all of it for
the checkpoints that this repository carries.
"""
