"""The sums of gates of a gated variant (`attn_kernels.paged`), on GPUs: two float32 each, the sum
and the rest that it rounds off, since few GPUs are quick at float64.

Behind the values of a KV head, each of its query heads has `block_size` sums in every block, then
as many rests. SHAPE is `tiles.Shape`.
"""

import triton
import triton.language as tl

from attn_kernels.triton.cache import Blocks, find_state, load_blocks


@triton.jit
def load_sums(blocks, block, kv_head, member, offset, inside, SHAPE: tl.constexpr):
    """Return `(sums, rests)` of tokens at `offset` in their blocks, of the KV head's query head
    `member`; the shape is what `block`, `member`, `offset` and `inside` broadcast to."""
    place = find_state(blocks, block, kv_head, SHAPE) + member * (2 * SHAPE.block_size) + offset
    sums = tl.load(place, mask=inside, other=0.0)
    return sums, tl.load(place + SHAPE.block_size, mask=inside, other=0.0)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_table", "query_start_loc", "seq_lens"],
)
def write_gates_kernel(
    gates,  # [num_tokens, num_heads] float32
    cache, block_table, query_start_loc, seq_lens,
    gate_stride, block_stride, head_stride, table_stride,
    SHAPE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Continue the sums of a request and head with its new tokens, in float64. Grid: (num_reqs,
    num_heads)."""
    request, head = tl.program_id(0), tl.program_id(1)
    kv_head, member = head // SHAPE.group, head % SHAPE.group
    start_loc = tl.load(query_start_loc + request)
    num_tokens = tl.load(query_start_loc + request + 1) - start_loc
    if num_tokens == 0:
        return
    first = tl.load(seq_lens + request) - num_tokens
    blocks = Blocks(
        cache, block_table + request.to(tl.int64) * table_stride, block_stride, head_stride
    )
    index = tl.arange(0, TOKENS)
    before = index < tl.minimum(first, 1)  # one, if there is one
    if SHAPE.window == 1:  # the token before is hidden, its block may be another request's
        before = index < 0
    key = tl.where(before, first - 1, 0)
    block = load_blocks(blocks, key, before, SHAPE)
    offset = key % SHAPE.block_size
    sums, rests = load_sums(blocks, block, kv_head, member, offset, before, SHAPE)
    total = tl.sum(sums.to(tl.float64) + rests.to(tl.float64), 0)
    for start in range(0, num_tokens, TOKENS):
        inside = start + index < num_tokens
        token = (start_loc + start + index).to(tl.int64)
        gate = tl.load(gates + token * gate_stride + head, mask=inside, other=0.0).to(tl.float64)
        exact = total + tl.cumsum(gate, 0)
        total += tl.sum(gate, 0)
        rounded = exact.to(tl.float32)
        key = first + start + index
        block = load_blocks(blocks, key, inside, SHAPE)
        place = find_state(blocks, block, kv_head, SHAPE) + member * (2 * SHAPE.block_size)
        place += key % SHAPE.block_size
        tl.store(place, rounded, mask=inside)
        tl.store(place + SHAPE.block_size, (exact - rounded).to(tl.float32), mask=inside)
