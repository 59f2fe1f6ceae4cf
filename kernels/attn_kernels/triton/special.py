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


@triton.jit
def log2_1p(x):
    """Return log2(1 + x) of float32 numbers of at least 0, wrong by 1.5e-6 of it: of small ones
    1 + x would keep little."""
    series = ((-0.297839030 * x + 0.476213618) * x - 0.721232998) * x + 1.44269460
    return tl.where(x < 0.125, x * series, log2(1.0 + x))
