"""The least time that each variant's GPU kernels can take on a chip, counted, not measured."""
