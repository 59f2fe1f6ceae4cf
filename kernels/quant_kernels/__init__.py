"""Products with weights of 2 to 8 bits that stay packed in memory.

`panels` brings a matrix as checkpoints store it (`pack`) into the order that the kernels
read, `multiply` is `x @ weight.T`, `gather` takes rows as an embedding does. On a CPU `packed.cpp`
computes them; where nothing can be compiled, torch operations do the same, slowly. On a GPU it is
`triton`.
"""

from quant_kernels.ops import gather, multiply
from quant_kernels.panels import Panels, panels

__all__ = ["Panels", "gather", "multiply", "panels"]
