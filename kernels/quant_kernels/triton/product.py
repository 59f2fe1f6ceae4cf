"""Products and lookups with packed matrices on a GPU; the device code.

A matrix is in panels of sixteen rows, as on a CPU (`quant_kernels.panels`): word w of all sixteen
lies side by side, and 32 values of a row take exactly BITS words, each of which a program reads
once. Quantized values become floats in registers, exactly. In a product, scales and zero points
come after the sums, in float32: weights are not rounded a second time.
"""

import triton
import triton.language as tl

PANEL = tl.constexpr(16)
CHUNK = tl.constexpr(32)


@triton.jit
def load_words(words, output, chunk, inside, num_chunks, BITS: tl.constexpr):
    """Return the BITS words of outputs' chunks, which broadcast, 0 where not `inside`."""
    first = words + (output // PANEL) * (num_chunks * BITS * PANEL) + output % PANEL
    loaded = ()
    for k in tl.static_range(BITS):
        word = tl.load(first + (chunk * BITS + k) * PANEL, mask=inside, other=0)
        loaded += (word.to(tl.uint32, bitcast=True),)
    return loaded


@triton.jit
def less_midpoint(words, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Return value INDEX of a chunk less the midpoint, in float32, by the bits of 2^23 + value: a
    conversion takes more cycles (CUDA's programming guide, throughput of native instructions)."""
    SHIFT: tl.constexpr = INDEX * BITS % 32
    value = words[INDEX * BITS // 32] >> SHIFT
    if SHIFT + BITS > 32:
        value |= words[INDEX * BITS // 32 + 1] << (32 - SHIFT)
    shifted = (value & (2**BITS - 1)) | 0x4B000000
    return shifted.to(tl.float32, bitcast=True) - (8388608.0 + 2 ** (BITS - 1))


@triton.jit
def side_by_side(words, BITS: tl.constexpr):
    """Return a chunk's BITS words with 16 bits of its first 16 values below the same 16 bits of its
    last 16 values."""
    both = ()
    for k in tl.static_range(BITS):
        high = words[(k + BITS) // 2]
        low = words[k // 2] >> 16 if k % 2 else words[k // 2] & 0xFFFF
        high = high & 0xFFFF0000 if (k + BITS) % 2 else high << 16
        both += (low | high,)
    return both


@triton.jit
def pair(both, blank, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Return the bits of two 16-bit floats, by the instructions that one takes: values INDEX and
    16 + INDEX of a chunk, of which `both` is `side_by_side`, in the last bits of `blank`."""
    SHIFT: tl.constexpr = INDEX * BITS % 16
    FIRST: tl.constexpr = min(2**BITS, 2 ** (16 - SHIFT)) - 1
    bits = ((both[INDEX * BITS // 16] >> SHIFT) & (FIRST * 0x10001)) | blank
    if SHIFT + BITS > 16:
        rest = both[INDEX * BITS // 16 + 1] << (16 - SHIFT)
        bits |= rest & ((2**BITS - 1 - FIRST) * 0x10001)
    return bits


@triton.jit
def two_by_two(words, nothing, dtype: tl.constexpr, BITS: tl.constexpr):
    """Return values i and 16 + i of chunks for each i, `[..., 2]`, as `to_floats` does. `nothing`:
    0, unknown to the compiler, which would put a constant into a register anew at each use."""
    twos = ()
    if dtype == tl.float32 or (dtype == tl.bfloat16 and BITS == 8):
        for i in tl.static_range(CHUNK // 2):
            low = less_midpoint(words, i, BITS).to(dtype)
            twos += (tl.join(low, less_midpoint(words, CHUNK // 2 + i, BITS).to(dtype)),)
    else:
        both = side_by_side(words, BITS)
        blank = nothing + (0x43004300 if dtype == tl.bfloat16 else 0x64006400)
        for i in tl.static_range(CHUNK // 2):
            bits = pair(both, blank, i, BITS)
            low = bits.to(tl.uint16).to(dtype, bitcast=True)
            high = (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
            if dtype == tl.float16:  # 1024 and the value in its last bits
                low -= 1024 + 2 ** (BITS - 1)
                high -= 1024 + 2 ** (BITS - 1)
            twos += (tl.join(low, high),)
    return twos


@triton.jit
def to_floats(words, nothing, dtype: tl.constexpr, BITS: tl.constexpr):
    """Return chunks' values `[..., 2, 2, 2, 2, 2]`, in order, less the midpoint; in bfloat16, of up
    to 7 bits, plus 128, whose last bits they are then. All are exact. `nothing` is 0."""
    parts = two_by_two(words, nothing, dtype, BITS)
    for level in tl.static_range(4):
        joined = ()
        for i in tl.static_range(8 >> level):
            joined += (tl.join(parts[i], parts[i + (8 >> level)]),)
        parts = joined
    return parts[0]


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
        zero = tl.full(scale.shape, 2.0 ** (BITS - 1), tl.float32)
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
def load_units(
    scales, zeros, output, first, inside, num_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Return the scales of UNITS times UNIT inputs from `first` on, then their zero points; behind
    the last group, that one's."""
    found = ()
    others = ()
    for unit in tl.static_range(UNITS):
        group = first * 0
        if GROUP:
            group = tl.minimum((first + unit * UNIT) // GROUP, num_groups - 1)
        scale, zero = load_qparams(scales, zeros, output, group, inside, num_groups, BITS)
        found += (scale,)
        others += (zero,)
    return found + others


@triton.jit(do_not_specialize=["rows", "part_chunks"])
def few_kernel(
    out, x, words, scales, zeros, rows, outputs, inputs, num_groups, part_chunks, x_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Compute `x @ weight.T` of ROWS rows, or of a part of their inputs, `part_chunks` chunks.
    GROUP: the inputs of a group; 0: all. Grid: (outputs / OUTPUTS, 1, parts).

    A thread has some outputs of a chunk of 32 inputs: it reads each word once and multiplies each
    value where it unpacked it. The chunks' sums are added up at the end."""
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    num_chunks = tl.cdiv(inputs, CHUNK)
    begin = tl.program_id(2) * part_chunks
    end = tl.minimum(begin + part_chunks, num_chunks)
    zero_sums = tl.zeros([CHUNKS, OUTPUTS], tl.float32)
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (zero_sums,)
    for start in range(begin, end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < num_chunks)[:, None] & (output < outputs)
        loaded = load_words(words, output, chunk[:, None], inside, num_chunks, BITS)
        sums = ()
        for _ in tl.static_range(ROWS):
            sums += ((zero_sums, tl.zeros([CHUNKS], tl.float32)),)
        for j in tl.static_range(CHUNK):
            value = less_midpoint(loaded, j, BITS)
            new = ()
            for r in tl.static_range(ROWS):
                at = x + r * x_stride + chunk * CHUNK
                given = tl.load(at + j, mask=chunk * CHUNK < inputs - j, other=0.0).to(tl.float32)
                new += ((sums[r][0] + value * given[:, None], sums[r][1] + given),)
            sums = new
            if j == CHUNK - 1 or (GROUP == 16 and j == 15):  # the end of a group, or of its chunk
                group = (chunk * CHUNK + j)[:, None] // GROUP if GROUP else chunk[:, None] * 0
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
    part = out + tl.program_id(2) * ROWS * outputs
    for r in tl.static_range(ROWS):
        y = tl.sum(totals[r], 0).to(out.dtype.element_ty)
        tl.store(part + r * outputs + output, y, mask=output < outputs)


@triton.jit(do_not_specialize=["rows", "part_chunks"])
def many_kernel(
    out, x, words, scales, zeros, rows, outputs, inputs, num_groups, part_chunks, x_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Compute `x @ weight.T`, or that of a part of the inputs, `part_chunks` chunks, by matrix
    products of ROWS rows and CHUNKS chunks, of one group or of whole ones. GROUP: the inputs of a
    group; 0: all. Grid: (outputs / OUTPUTS, rows / ROWS, parts).

    Products are transposed: a tensor core's side of 64 is that of outputs, since rows are few."""
    dtype: tl.constexpr = x.dtype.element_ty
    ADDED: tl.constexpr = 128 if dtype == tl.bfloat16 and BITS < 8 else -(2 ** (BITS - 1))
    UNIT: tl.constexpr = min(GROUP, CHUNKS * CHUNK) if GROUP else CHUNKS * CHUNK
    UNITS: tl.constexpr = CHUNKS * CHUNK // UNIT
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = output < outputs
    num_chunks = tl.cdiv(inputs, CHUNK)
    begin = tl.program_id(2) * part_chunks
    end = tl.minimum(begin + part_chunks, num_chunks)
    at = x + row.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    nothing = tl.minimum(rows, 0).to(tl.uint32)
    first = begin * CHUNK
    qparams = load_units(scales, zeros, output, first, known, num_groups, BITS, GROUP, UNIT, UNITS)
    for start in range(begin, end, CHUNKS):
        # Those of the next step: they are on their way while this one is computed.
        coming = load_units(
            scales, zeros, output, first + UNITS * UNIT, known, num_groups, BITS, GROUP, UNIT, UNITS
        )
        chunk = (tl.arange(0, CHUNKS) + start)[None, :]
        inside = known[:, None] & (chunk < num_chunks)
        loaded = load_words(words, output[:, None], chunk, inside, num_chunks, BITS)
        weight = to_floats(loaded, nothing, dtype, BITS).reshape(OUTPUTS, UNITS * UNIT)
        place = tl.arange(0, UNITS * UNIT)[None, :]
        mask = (row < rows)[:, None] & (first + place < inputs)
        given = tl.load(at + first + place, mask=mask, other=0.0)
        for unit in tl.static_range(UNITS):
            scale, zero = qparams[unit], qparams[UNITS + unit]
            of_unit = given
            if UNITS > 1:
                of_unit = tl.where(place // UNIT == unit, given, 0.0)
            start_at = tl.zeros([OUTPUTS, ROWS], tl.float32)
            if zeros is not None or ADDED > 0:
                if dtype == tl.float32:
                    sums = tl.sum(of_unit, 1)[None, :]
                else:  # on tensor cores, too
                    sums = tl.dot(tl.full([OUTPUTS, UNITS * UNIT], 1.0, dtype), of_unit.T)
                start_at -= sums * (zero + ADDED)[:, None]
            # No TF32, which keeps ten bits.
            products = tl.dot(weight, of_unit.T, start_at, input_precision="ieee")
            total += products * scale[:, None]
        first += UNITS * UNIT
        qparams = coming
    part = out + (tl.program_id(2) * rows + row.to(tl.int64)) * outputs
    mask = (row < rows)[None, :] & known[:, None]
    tl.store(part[None, :] + output[:, None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "count"])
def add_kernel(out, parts, size, count, BLOCK: tl.constexpr):
    """Add up `count` times `size` sums, always in the same order. Grid: (size / BLOCK,)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, 4):  # four loads under way
        for i in tl.static_range(4):
            other = place + (start + i) * size
            inside = (place < size) & (other < count * size)
            total += tl.load(parts + other, mask=inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def dequantized(
    words, scales, zeros, output, inside, start, inputs, num_groups,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return the weights of OUTPUTS outputs and CHUNKS chunks from `start` in float32, outputs by
    inputs. Values and zero points are exact, and what they differ by is rounded once, as on a
    CPU."""
    UNIT: tl.constexpr = 16 if GROUP == 16 else CHUNK
    UNITS: tl.constexpr = CHUNKS * CHUNK // UNIT
    num_chunks = tl.cdiv(inputs, CHUNK)
    output, inside = output[:, None], inside[:, None]
    chunk = start + tl.arange(0, CHUNKS)[None, :]
    loaded = load_words(words, output, chunk, inside & (chunk < num_chunks), num_chunks, BITS)
    value = to_floats(loaded, 0, tl.float32, BITS).reshape(OUTPUTS, UNITS, UNIT)
    column = tl.arange(0, UNITS)[None, :] * UNIT + start * CHUNK
    group = column // GROUP if GROUP else column * 0
    inside = inside & (column < inputs)
    scale, zero = load_qparams(scales, zeros, output, group, inside, num_groups, BITS)
    if zeros is not None:
        value = (value + 2 ** (BITS - 1)) - zero[:, :, None]
    return (value * scale[:, :, None]).reshape(OUTPUTS, CHUNKS * CHUNK)


@triton.jit
def unpack_kernel(
    out, words, scales, zeros, first, outputs, inputs, num_groups,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write rows of the matrix from the row `first`, a multiple of 16, as many as `out` has,
    `outputs`. Grid: (outputs / OUTPUTS, inputs / CHUNKS)."""
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    start = tl.program_id(1) * CHUNKS
    weight = dequantized(
        words, scales, zeros, first + row, row < outputs, start, inputs, num_groups,
        BITS, CHUNKS, OUTPUTS, GROUP,
    )  # fmt: skip
    column = tl.arange(0, CHUNKS * CHUNK)[None, :] + start * CHUNK
    place = out + row.to(tl.int64)[:, None] * inputs + column
    mask = (row < outputs)[:, None] & (column < inputs)
    tl.store(place, weight.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    out, ids, words, scales, zeros, outputs, inputs, num_groups,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Copy rows of the matrix, 0 for one that it does not have. Grid: (ids, inputs / CHUNKS)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    asked = tl.load(ids + row)
    output = tl.minimum(tl.maximum(asked, 0), outputs - 1)
    start = tl.program_id(1) * CHUNKS
    weight = dequantized(
        words, scales, zeros, output, asked == output, start, inputs, num_groups,
        BITS, CHUNKS, 1, GROUP,
    )  # fmt: skip
    weight = tl.where((asked == output)[:, None], weight, 0.0)
    column = tl.arange(0, CHUNKS * CHUNK)[None, :] + start * CHUNK
    place = out + row[:, None] * inputs + column
    tl.store(place, weight.to(out.dtype.element_ty), mask=column < inputs)
