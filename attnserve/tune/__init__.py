"""Finding the fastest tiles of a GPU's kernels: the command `attnserve tune`."""
