"""The GPU kernels compiled ahead of time, for GPUs that are not here."""
