"""What is timed: this project's kernels, vLLM's C++ softmax and torch's dense softmax.

Each candidate attends with the same queries to its own copies of the same keys and values. Before
each call it moves on to its next copy and writes the new tokens' keys and values there, as a
serving step does; both are not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_kernels import Variant, get_variant
from attn_kernels.batch import Batch
from attn_kernels.dense import causal_mask
from attn_kernels.paged import STATE_BYTES
from benchmarks.kernels.case import DTYPES, Inputs, Paging

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`(key, value, kv_cache, slot_mapping)`, as `attn_kernels.paged.write_cache`."""


class Layer(Protocol):
    """What `attn_kernels.cpu.CPULayer` is."""

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store keys and values."""

    def attend(self, query: Tensor, batch: Batch, out: Tensor) -> None:
        """Attention of a batch."""


class Kernel(Protocol):
    """What `attn_kernels.cpu.CPUKernel` is."""

    isa: str

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        """Why such a cache cannot be served; None if it can."""

    def layer(
        self,
        kv_cache: Tensor,
        *,
        num_heads: int,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> Layer:
        """The kernel bound to a cache."""


class Pool:
    """A paged cache that holds the copies of `paging`, filled by `write`.

    Args:
        inputs: keys and values of every copy.
        paging: where they go.
        write: stores them.
        state_bytes: size of the accumulator in each slot.
    """

    def __init__(
        self, inputs: Inputs, paging: Paging, write: Write, *, state_bytes: int = 0
    ) -> None:
        case = inputs.case
        dtype = DTYPES[case.dtype]
        content = 2 * case.head_dim + state_bytes // dtype.itemsize
        shape = (paging.num_blocks, case.num_kv_heads, case.block_size, content)
        self.kv = torch.zeros(shape, dtype=dtype)
        self._write = write
        self._tables = paging.tables
        self._copy = 0
        key, value = inputs.key.flatten(0, 1), inputs.value.flatten(0, 1)
        for copy in range(len(paging.tables)):
            write(key, value, self.kv, paging.slots(copy, 0))
        first = case.seq_len - case.new_tokens
        self._new_key = inputs.key[:, first:].flatten(0, 1).contiguous()
        self._new_value = inputs.value[:, first:].flatten(0, 1).contiguous()
        self._new_slots = [paging.slots(copy, first) for copy in range(len(paging.tables))]

    @property
    def table(self) -> Tensor:
        """Block table of the copy whose turn it is, int32 `[batch, blocks]`."""
        return self._tables[self._copy]

    def next_copy(self) -> None:
        """Go to the next copy and write its new tokens."""
        self._copy = (self._copy + 1) % len(self._tables)
        self._write(self._new_key, self._new_value, self.kv, self._new_slots[self._copy])


class Ours:
    """One variant's kernel.

    Args:
        variant: the variant.
        kernel: its kernel.
        inputs: the case.
        paging: where its copies lie.
        pools: made so far for this case. Variants without state pack blocks alike, so they share a
            pool, and take its copies in turn.

    Raises:
        ValueError: the kernel does not serve such a cache.
    """

    def __init__(
        self,
        variant: Variant,
        kernel: Kernel,
        inputs: Inputs,
        paging: Paging,
        pools: dict[str, Pool],
    ) -> None:
        self.variant = variant
        self.learned: Mapping[str, Tensor] = {
            name: torch.full((inputs.case.num_heads,), variant.initial(name))
            for name in variant.learned
        }
        self.out = torch.zeros_like(inputs.query)
        self._inputs = inputs
        case = inputs.case
        if why := kernel.unsupported(case.head_dim, case.block_size, inputs.key.dtype):
            raise ValueError(f"no {why}")

        def bind(kv: Tensor) -> Layer:
            return kernel.layer(
                kv, num_heads=case.num_heads, scale=inputs.scale, learned=self.learned
            )

        def write(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
            bind(kv).write_cache(key, value, slots)

        name = variant.name if variant.stateful else "stateless"
        if name not in pools:
            state_bytes = STATE_BYTES if variant.stateful else 0
            pools[name] = Pool(inputs, paging, write, state_bytes=state_bytes)
        self._pool = pools[name]
        self._layer = bind(self._pool.kv)
        self._batch = self._batch_of_copy()

    def _batch_of_copy(self) -> Batch:
        return Batch(self._pool.table, self._inputs.query_start_loc, self._inputs.seq_lens)

    def prepare(self) -> None:
        self._pool.next_copy()
        self._batch = self._batch_of_copy()

    def run(self) -> None:
        self._layer.attend(self._inputs.query, self._batch, self.out)


class VllmSoftmax:
    """vLLM's `cpu_attention_with_kv_cache`, its scheduler's metadata made once as vLLM makes it
    once for all layers.

    Args:
        inputs: the case.
        paging: where its copies lie.
        isa: one of `peer.ISAS`; the kernels must be loaded (`peer.load_vllm`).
    """

    def __init__(self, inputs: Inputs, paging: Paging, isa: str) -> None:
        from vllm import _custom_ops as ops

        self.variant: Variant = get_variant("softmax")
        self.learned: Mapping[str, Tensor] = {}
        self._ops, self._isa, self._inputs = ops, isa, inputs
        self.out = torch.zeros_like(inputs.query)
        self._pool = Pool(inputs, paging, self._write)
        self._keys, self._values = self._halves(self._pool.kv)
        self._metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=inputs.case.batch,
            num_heads=inputs.case.num_heads,
            num_kv_heads=inputs.case.num_kv_heads,
            head_dim=inputs.case.head_dim,
            seq_lens=inputs.seq_lens,
            dtype=inputs.query.dtype,
            query_start_loc=inputs.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

    @staticmethod
    def _halves(kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_blocks, num_kv_heads, block_size, head_dim]`: in vLLM's cache a
        block's keys come before its values."""
        blocks, heads, size, content = kv.shape
        key, value = kv.view(blocks, heads, 2 * size, content // 2).chunk(2, dim=2)
        return key, value

    def _write(self, key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
        self._ops.cpu_attn_reshape_and_cache(key, value, *self._halves(kv), slots, self._isa)

    def prepare(self) -> None:
        self._pool.next_copy()

    def run(self) -> None:
        inputs = self._inputs
        self._ops.cpu_attention_with_kv_cache(
            query=inputs.query,
            key_cache=self._keys,
            value_cache=self._values,
            output=self.out,
            query_start_loc=inputs.query_start_loc,
            seq_lens=inputs.seq_lens,
            scale=inputs.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._pool.table,
            softcap=0,
            scheduler_metadata=self._metadata,
            s_aux=None,
        )


class TorchSdpa:
    """torch's `scaled_dot_product_attention` on keys and values that are dense already.

    Args:
        inputs: the case.
        copies: dense copies of its keys and values.
    """

    def __init__(self, inputs: Inputs, copies: int) -> None:
        self.variant: Variant = get_variant("softmax")
        self.learned: Mapping[str, Tensor] = {}
        case = inputs.case
        self._scale, self._copy = inputs.scale, 0
        self._new = slice(case.seq_len - case.new_tokens, case.seq_len)
        self._query = inputs.query.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous()
        self._key, self._value = inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)
        # [copies, batch, num_kv_heads, seq_len, head_dim]
        self._keys = self._key.repeat(copies, 1, 1, 1, 1)
        self._values = self._value.repeat(copies, 1, 1, 1, 1)
        self._causal = case.phase == "prefill" and case.ctx == 0
        self._mask: Tensor | None = None
        if case.phase == "prefill" and case.ctx > 0:
            positions = torch.arange(case.seq_len)
            mask = causal_mask(positions[self._new], positions)
            self._mask = torch.zeros(mask.shape, dtype=inputs.query.dtype)
            self._mask.masked_fill_(~mask, -torch.inf)
        self._out: Tensor | None = None

    @property
    def out(self) -> Tensor:
        """Output of the last call, `[batch * new_tokens, num_heads, head_dim]`."""
        assert self._out is not None, "run() comes first"
        return self._out.transpose(1, 2).flatten(0, 1)

    def prepare(self) -> None:
        self._copy = (self._copy + 1) % len(self._keys)
        self._keys[self._copy, :, :, self._new] = self._key[:, :, self._new]
        self._values[self._copy, :, :, self._new] = self._value[:, :, self._new]

    def run(self) -> None:
        self._out = scaled_dot_product_attention(
            self._query,
            self._keys[self._copy],
            self._values[self._copy],
            attn_mask=self._mask,
            is_causal=self._causal,
            scale=self._scale,
            enable_gqa=True,
        )
