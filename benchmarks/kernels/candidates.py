"""What is timed: this project's kernels, vLLM's C++ softmax and torch's dense softmax.

Each candidate attends with the same queries to its own copies of the same keys and values. Before
each call it moves on to its next copy and writes the new tokens' keys and values there, as a
serving step does; both are not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_kernels import Variant, get_variant
from attn_kernels.cpu import CPUKernel, CPULayer
from attn_kernels.dense import causal_mask
from attn_kernels.kv_quant import KVFormat
from attn_kernels.paged import content_bytes
from attnserve.errors import UserError
from benchmarks.kernels.case import DTYPES, Inputs, Paging

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`(key, value, kv_cache, slot_mapping)`, as `attn_kernels.paged.write_cache`."""


class Timed(Protocol):
    """What is timed."""

    def prepare(self) -> None:
        """Do what comes before each call and is not timed."""

    def run(self) -> object:
        """Do what is timed."""


class Candidate(Timed, Protocol):
    """One way to compute attention."""

    variant: Variant
    learned: dict[str, Tensor]
    """The variant's per-head tensors."""

    def write(self) -> None:
        """Go to the next copy and write its new tokens."""

    def run(self) -> Tensor:
        """Attend, and return `[batch * new_tokens, num_heads, head_dim]`."""


class Writing:
    """A candidate's writing, without attention."""

    def __init__(self, candidate: Candidate) -> None:
        self.run = candidate.write

    def prepare(self) -> None:
        """Do nothing."""


class QuantizedKernel:
    """A variant's kernel on a quantized cache, with a `CPUKernel`'s interface."""

    def __init__(self, kernel: CPUKernel, kv_format: KVFormat) -> None:
        self.kernel, self.kv_format = kernel, kv_format
        self.variant, self.isa = kernel.variant, kernel.isa

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        return self.kernel.unsupported(head_size, block_size, dtype, self.kv_format)

    def layer(self, kv_cache: Tensor, **options: Any) -> CPULayer:
        return self.kernel.layer(kv_cache, kv_format=self.kv_format, **options)


class CopyPool:
    """A paged cache that holds the copies of `paging`, filled by `write`, in a variant's format."""

    def __init__(
        self,
        inputs: Inputs,
        paging: Paging,
        write: Write,
        variant: Variant,
        kv_format: KVFormat | None = None,
    ) -> None:
        case = inputs.case
        dtype = DTYPES[case.dtype]
        group = case.num_heads // case.num_kv_heads
        content = content_bytes(variant, case.head_dim, dtype, kv_format, group=group)
        shape = (paging.num_blocks, case.num_kv_heads, case.block_size, content)
        kv = torch.zeros(shape, dtype=torch.uint8)
        self.kv = kv if kv_format else kv.view(dtype)
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

    def next_copy(self) -> tuple[Tensor, Tensor, Tensor]:
        """Go to the next copy; return its new tokens' keys, values and slots."""
        self._copy = (self._copy + 1) % len(self._tables)
        return self._new_key, self._new_value, self._new_slots[self._copy]


class Ours:
    """One variant's kernel; `bind` makes the layer of a cache, as `CPUKernel.layer` does.

    `pools` are those made so far for this case: variants without state pack blocks alike, so they
    share one, and take its copies in turn.
    """

    def __init__(
        self,
        variant: Variant,
        bind: Callable[..., Any],
        inputs: Inputs,
        paging: Paging,
        pools: dict[str, CopyPool],
        kv_format: KVFormat | None = None,
    ) -> None:
        case = inputs.case
        self.variant, self.kv_format = variant, kv_format
        self.learned = {
            name: torch.full((case.num_heads,), variant.initial(name)) for name in variant.learned
        }
        self.inputs = inputs
        self.out = torch.zeros_like(inputs.query)
        settings = {"num_heads": case.num_heads, "scale": inputs.scale, "learned": self.learned}

        def write(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
            bind(kv, **settings).write_cache(key, value, slots)

        own = variant.stateful or variant.gated
        name = f"{variant.name if own else 'stateless'} {self.kv_format}"
        if name not in pools:
            pools[name] = CopyPool(inputs, paging, write, variant, self.kv_format)
        self.pool = pools[name]
        self.layer = bind(self.pool.kv, **settings)
        self.batch = inputs.batch(self.pool.table)

    def write(self) -> None:
        self.layer.write_cache(*self.pool.next_copy())

    def prepare(self) -> None:
        self.write()
        self.batch = self.inputs.batch(self.pool.table)

    def run(self) -> Tensor:
        self.layer.attend(self.inputs.query, self.batch, self.out)
        return self.out


def format_of(it: Any) -> KVFormat | None:
    """Return how a kernel's cache, or a candidate's, is quantized, if it is."""
    return getattr(it, "kv_format", None)


class VllmSoftmax:
    """vLLM's `cpu_attention_with_kv_cache` (`load_vllm`); its scheduler's metadata are made once,
    as vLLM does for all layers."""

    def __init__(self, inputs: Inputs, paging: Paging, isa: str) -> None:
        from vllm import _custom_ops as ops

        self.variant, self.learned = get_variant("softmax"), dict[str, Tensor]()
        self.ops, self.isa, self.inputs = ops, isa, inputs
        self.out = torch.zeros_like(inputs.query)
        self.pool = CopyPool(inputs, paging, self._write, self.variant)
        self.keys, self.values = self._halves(self.pool.kv)
        case = inputs.case
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
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
        """Return keys and values `[num_blocks, num_kv_heads, block_size, head_dim]`: in vLLM's
        cache a block's keys come before its values."""
        blocks, heads, size, content = kv.shape
        key, value = kv.view(blocks, heads, 2 * size, content // 2).chunk(2, dim=2)
        return key, value

    def _write(self, key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
        self.ops.cpu_attn_reshape_and_cache(key, value, *self._halves(kv), slots, self.isa)

    def write(self) -> None:
        key, value, slots = self.pool.next_copy()
        self.ops.cpu_attn_reshape_and_cache(key, value, self.keys, self.values, slots, self.isa)

    prepare = write

    def run(self) -> Tensor:
        inputs = self.inputs
        self.ops.cpu_attention_with_kv_cache(
            query=inputs.query,
            key_cache=self.keys,
            value_cache=self.values,
            output=self.out,
            query_start_loc=inputs.query_start_loc,
            seq_lens=inputs.seq_lens,
            scale=inputs.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.pool.table,
            softcap=0,
            scheduler_metadata=self.metadata,
            s_aux=None,
        )
        return self.out


class TorchSdpa:
    """torch's `scaled_dot_product_attention` on keys and values that are dense already."""

    def __init__(self, inputs: Inputs, copies: int) -> None:
        self.variant, self.learned = get_variant("softmax"), dict[str, Tensor]()
        case = inputs.case
        self.copy = 0
        self.new = slice(case.seq_len - case.new_tokens, case.seq_len)
        self.query = inputs.query.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous()
        self.key, self.value = inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)
        # [copies, batch, num_kv_heads, seq_len, head_dim]
        self.keys = self.key.repeat(copies, 1, 1, 1, 1)
        self.values = self.value.repeat(copies, 1, 1, 1, 1)
        self.options: dict[str, Any] = {"scale": inputs.scale, "enable_gqa": True}
        if case.phase == "prefill" and case.ctx == 0:
            self.options["is_causal"] = True
        elif case.phase != "decode":
            positions = torch.arange(case.seq_len)
            visible = causal_mask(positions[self.new], positions)
            mask = torch.zeros(visible.shape, dtype=inputs.query.dtype)
            self.options["attn_mask"] = mask.masked_fill_(~visible, -torch.inf)

    def write(self) -> None:
        self.copy = (self.copy + 1) % len(self.keys)
        self.keys[self.copy, :, :, self.new] = self.key[:, :, self.new]
        self.values[self.copy, :, :, self.new] = self.value[:, :, self.new]

    prepare = write

    def run(self) -> Tensor:
        out = scaled_dot_product_attention(
            self.query, self.keys[self.copy], self.values[self.copy], **self.options
        )
        return out.transpose(1, 2).flatten(0, 1)


def load_vllm(isa: str) -> str:
    """Load vLLM's operators, and return the file name of the library that vLLM chose for this
    processor."""
    # torch has no public name for either. Without the second call, the first tile instruction of a
    # process may be SIGILL.
    if isa == "amx" and not (torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()):
        raise UserError("--peer-isa amx: this processor or kernel has no AMX tiles; use vec")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(f"vLLM is not installed ({error}); install attnserve[cpu]") from error
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise UserError("this vLLM has no CPU attention kernel; install attnserve[cpu]")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    loaded = {Path(line.split()[-1]) for line in maps if "/vllm/_C" in line}
    return ", ".join(sorted(path.name for path in loaded))
