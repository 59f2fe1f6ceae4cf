"""Products and lookups with packed matrices on a GPU; the device code.

A matrix is in panels of sixteen rows, as on a CPU (`quant_kernels.panels`): word w of all sixteen
lies side by side, and 32 values of a row take exactly BITS words. Quantized values become floats in
registers, less their midpoint, which is exact in all dtypes. Scales, and how far zero points are
from the midpoint, come after the sums in float32: weights are not rounded a second time.
"""

import triton
import triton.language as tl

PANEL = tl.constexpr(16)
CHUNK = tl.constexpr(32)


@triton.jit
def first_word(words, output, num_chunks, BITS: tl.constexpr):
    """Return each row's first word; its next one is PANEL further."""
    return words + (output // PANEL) * (num_chunks * BITS * PANEL) + output % PANEL


@triton.jit
def less_midpoint(value, BITS: tl.constexpr):
    """Return a quantized value (the low bits) less the midpoint, in float32, by the bits of 2^23 +
    value: a conversion takes more cycles (CUDA's programming guide, throughput of native
    instructions)."""
    shifted = (value & (2**BITS - 1)) | 0x4B000000
    return shifted.to(tl.float32, bitcast=True) - (8388608.0 + 2 ** (BITS - 1))


@triton.jit
def load_values(first, column, inside, BITS: tl.constexpr):
    """Return quantized values of rows and columns that broadcast, less the midpoint; any where not
    `inside`."""
    bit = column * BITS
    place, shift = first + bit // 32 * PANEL, bit % 32
    value = tl.load(place, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS:  # some values lie across two words
        rest = tl.load(place + PANEL, mask=inside & (shift > 32 - BITS), other=0)
        value |= rest.to(tl.uint32, bitcast=True) << ((32 - shift) % 32)
    return less_midpoint(value, BITS)


@triton.jit
def load_groups(of_groups, output, group, inside, num_groups):
    """Return what groups have, 0 where not `inside`."""
    place = ((output // PANEL) * num_groups + group) * PANEL + output % PANEL
    return tl.load(of_groups + place, mask=inside, other=0)


@triton.jit
def load_qparams(scales, zeros, output, group, inside, num_groups, BITS: tl.constexpr):
    """Return scales and zero points of groups in float32. `zeros` are those, or none, or the bytes
    of two-level scales (`quant_kernels.levels`), and `scales` are of rows then."""
    if zeros is None:
        scale = load_groups(scales, output, group, inside, num_groups).to(tl.float32)
        zero = 2.0 ** (BITS - 1)
    elif zeros.dtype.element_ty == tl.int8:
        level = load_groups(zeros, output, group, inside, num_groups).to(tl.int32)
        row = load_groups(scales, output, group * 0, inside, 1).to(tl.float32)
        scale = ((level & 15) + 1).to(tl.float32) / 16 * row
        zero = ((level >> 4) & 15).to(tl.float32) * ((2**BITS - 1) / 15)
    else:
        scale = load_groups(scales, output, group, inside, num_groups).to(tl.float32)
        zero = load_groups(zeros, output, group, inside, num_groups).to(tl.float32)
    return scale, zero


@triton.jit
def few_kernel(
    out, x, words, scales, zeros, rows, outputs, inputs, num_groups, group_size, x_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Compute `x @ weight.T` of ROWS rows. UNIT inputs of a chunk are of one group: 16 or all.
    Grid: (outputs / OUTPUTS,).

    A thread has some outputs of a chunk of 32 inputs: it reads each word once and multiplies each
    value where it unpacked it. The chunks' sums are added up at the end."""
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    num_chunks = tl.cdiv(inputs, CHUNK)
    first = first_word(words, output, num_chunks, BITS)
    zero_sums = tl.zeros([CHUNKS, OUTPUTS], tl.float32)
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (zero_sums,)
    for start in range(0, num_chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < num_chunks)[:, None] & (output < outputs)
        loaded = ()
        for i in tl.static_range(BITS):
            word = tl.load(first + (chunk[:, None] * BITS + i) * PANEL, mask=inside, other=0)
            loaded += (word.to(tl.uint32, bitcast=True),)
        sums = ()
        for _ in tl.static_range(ROWS):
            sums += ((zero_sums, tl.zeros([CHUNKS], tl.float32)),)
        for j in tl.static_range(CHUNK):
            value = loaded[j * BITS // 32] >> (j * BITS % 32)
            if j * BITS % 32 + BITS > 32:
                value |= loaded[j * BITS // 32 + 1] << (32 - j * BITS % 32)
            value = less_midpoint(value, BITS)
            new = ()
            for r in tl.static_range(ROWS):
                at = x + r * x_stride + chunk * CHUNK
                given = tl.load(at + j, mask=chunk * CHUNK < inputs - j, other=0.0).to(tl.float32)
                new += ((sums[r][0] + value * given[:, None], sums[r][1] + given),)
            sums = new
            if j % UNIT == UNIT - 1:  # the end of a group, or of a chunk of it
                group = ((chunk * CHUNK + j) // group_size)[:, None]
                there = inside & (group < num_groups)
                scale, zero = load_qparams(scales, zeros, output, group, there, num_groups, BITS)
                new = ()
                fresh = ()
                for r in tl.static_range(ROWS):
                    products = sums[r][0]
                    if zeros is not None:
                        products += (2 ** (BITS - 1) - zero) * sums[r][1][:, None]
                    new += (totals[r] + products * scale,)
                    fresh += ((zero_sums, tl.zeros([CHUNKS], tl.float32)),)
                totals = new
                sums = fresh
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    for r in tl.static_range(ROWS):
        y = tl.sum(totals[r], 0).to(out.dtype.element_ty)
        tl.store(out + r * outputs + output, y, mask=output < outputs)


@triton.jit
def many_kernel(
    out, x, words, scales, zeros, rows, outputs, inputs, num_groups, group_size, x_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Compute `x @ weight.T` by matrix products of ROWS rows and CHUNKS times UNIT inputs, which
    are of one group. Grid: (outputs / OUTPUTS, rows / ROWS)."""
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    num_chunks = tl.cdiv(inputs, CHUNK)
    first = first_word(words, output, num_chunks, BITS)
    known = output < outputs
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, inputs, CHUNKS * UNIT):
        column = start + tl.arange(0, CHUNKS * UNIT)
        mask = (row < rows) & (column < inputs)[None, :]
        given = tl.load(x + row * x_stride + column[None, :], mask=mask, other=0.0)
        inside = (column < num_chunks * CHUNK)[:, None] & known
        values = load_values(first, column[:, None], inside, BITS).to(given.dtype)
        products = tl.dot(given, values, input_precision="ieee")  # no TF32, which keeps ten bits
        group = start // group_size
        scale, zero = load_qparams(scales, zeros, output, group, known, num_groups, BITS)
        if zeros is not None:
            products += tl.sum(given.to(tl.float32), 1)[:, None] * (2 ** (BITS - 1) - zero)
        total += products * scale
    mask = (row < rows) & known
    tl.store(out + row * outputs + output, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    out, ids, words, scales, zeros, outputs, inputs, num_groups, group_size,
    BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy rows of the matrix, 0 for one that it does not have. Grid: (ids, inputs / COLUMNS)."""
    row = tl.program_id(0).to(tl.int64)
    asked = tl.load(ids + row)
    output = tl.minimum(tl.maximum(asked, 0), outputs - 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inputs
    first = first_word(words, output, tl.cdiv(inputs, CHUNK), BITS)
    value = load_values(first, column, inside, BITS)
    scale, zero = load_qparams(
        scales, zeros, output, column // group_size, inside, num_groups, BITS
    )
    # Values and zero points are exact, and what they differ by is rounded once, as on a CPU.
    if zeros is not None:
        value = (value + 2 ** (BITS - 1)) - zero
    weight = value * scale
    weight = tl.where(asked == output, weight, 0.0)
    tl.store(out + row * inputs + column, weight.to(out.dtype.element_ty), mask=inside)
