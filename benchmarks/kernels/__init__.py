"""The CPU attention kernels beside vLLM's and torch's: `python -m benchmarks.kernels`."""
