"""Special functions as fast as the hardware has them."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which knows no instructions of a GPU."""


@triton.jit
def log2(x):
    """Return the logarithm of float32 numbers of at least 1, wrong by 2^-22 of it or, below 2,
    by 2^-22: an instruction on NVIDIA's GPUs, where `tl.log2` is twenty."""
    if INTERPRETED:
        result = tl.log2(x)
    elif is_cuda():
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result
