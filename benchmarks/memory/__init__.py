"""Memory of real servers, predicted and measured: `python -m benchmarks.memory`."""
