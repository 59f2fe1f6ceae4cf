"""Products with weights of 2 to 8 bits that stay packed in memory, on CPUs.

`panels` brings a matrix as checkpoints store it (`quant.pack`) into the order that the C++ kernels
read, `multiply` is `x @ weight.T`, `gather` takes rows as an embedding does. `packed.cpp` says how.
Where nothing can be compiled, torch operations do the same, slowly.
"""

from quant_kernels.ops import gather, multiply
from quant_kernels.panels import Panels, panels

__all__ = ["Panels", "gather", "multiply", "panels"]
