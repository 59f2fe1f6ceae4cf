"""The recipe of the reference checkpoints: `python -m training` lists its commands."""
