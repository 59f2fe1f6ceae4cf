"""Real servers under load: `python -m benchmarks.serve`."""
