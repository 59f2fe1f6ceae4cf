"""How fast the CPU kernels are, against vLLM's, against torch's and against the machine.

`python -m benchmarks.kernels --help`.
"""
