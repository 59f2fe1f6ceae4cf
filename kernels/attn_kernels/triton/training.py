"""Differentiable attention of whole sequences on GPUs: `attention`, for training.

Memory grows with the length, not with its square. It is two operators of torch, so that
`torch.compile` takes them as they are: `attnserve::attention` and its backward.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attn_kernels.triton import backward, dense, forward, selecting
from attn_kernels.triton.tuning import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    LARGEST_HEAD_SIZE,
    SELECTIONS,
    training_tile,
)
from attn_kernels.triton.variant import constants, functions, missing_derivative, missing_kernel
from attn_kernels.variant import Variant, get_variant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    learned: Mapping[str, Tensor] | None = None,
    window: int | None = None,
    rows: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """Return the output of attention of whole sequences, `[batch, num_heads, num_tokens,
    head_size]` in the dtype of `q`: what `attn_kernels.attend` returns, without its weights.

    Scores, weights and all sums are float32. Weights, and the derivatives of scores, are rounded to
    the dtype of `q` before they meet values, keys and queries, as in FlashAttention. Gradients are
    the same at each run, but for a stateful variant's, whose head 0 adds up in any order.

    Args:
        variant: the attention function. Where gradients are wanted, `missing_derivative` is empty
            for it, else `missing_kernel`.
        q: `[batch, num_heads, num_tokens, head_size]`, after RoPE; float32, bfloat16 or float16,
            as are `k` and `v`.
        k, v: `[batch, num_kv_heads, num_tokens, head_size]`.
        scale: factor of the raw scores, 1/sqrt(head_size) if None.
        learned: the variant's per-head tensors, each `[num_heads]`.
        window: sliding window of causal attention; None is unlimited.
        rows: which keys each query sees, in place of causal attention (`dense.py`).
        gates: `[batch, num_heads, num_tokens]` float32 or float64, of a gated variant.

    Raises:
        ValueError: shapes that do not fit, or a variant that does not say its derivatives.
        TypeError: another dtype, or several.
    """
    learned = learned or {}
    _check(variant, q, k, v, learned, rows, window, gates)
    if rows is None:
        rows = causal_rows(q.shape[0], q.shape[-2], window, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = [learned[name].float().contiguous() for name in variant.learned]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    decays = None if gates is None else _decays(gates, rows)
    out: Tensor = _attention(q, k, v, rows, tensors, decays, _spec(variant), scale)[0]
    return out


def _decays(gates: Tensor, rows: Tensor) -> Tensor:
    """Return `[2, batch, num_heads, num_tokens]` float64: what the gates add up to, up to the last
    key that each query sees, and up to each key. Between the two lies the decay of a score."""
    sums = gates.double().cumsum(-1)
    last = (rows[1].long() - 1).clamp_min(0)[:, None].expand_as(sums)
    return torch.stack((sums.gather(-1, last), sums))


def causal_rows(
    batch: int, num_tokens: int, window: int | None, device: torch.device | None = None
) -> Tensor:
    """Return the `rows` of causal attention, `[3, batch, num_tokens]` int32."""
    position = torch.arange(num_tokens, dtype=torch.int32, device=device)
    begin = torch.zeros_like(position)
    if window is not None:
        begin = (position - window + 1).clamp_min(0)
    return torch.stack((begin, position + 1, position))[:, None].expand(-1, batch, -1).contiguous()


def _check(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learned: Mapping[str, Tensor],
    rows: Tensor | None,
    window: int | None,
    gates: Tensor | None,
) -> None:
    trained = (q, k, v, *learned.values(), *([] if gates is None else [gates]))
    if torch.is_grad_enabled() and any(x.requires_grad for x in trained):
        missing, what = missing_derivative(variant), "trained"
    else:
        missing, what = missing_kernel(variant), "computed"
    if missing:
        raise ValueError(
            f"{variant.name} cannot be {what} by kernels: it has no {missing}; use "
            "attn_kernels.attend"
        )
    if variant.kv_budgets:
        raise ValueError(f"all tokens are kept in training: leave out {variant.name}'s kv_budgets")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise TypeError(
            "q, k and v must have one dtype, float32, bfloat16 or float16, not "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    same = q.dim() == 4 and k.shape == v.shape and k.shape[::2] == q.shape[::2]
    if not same or k.shape[-1] != q.shape[-1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must be [batch, num_heads, num_tokens, head_size], and k and v the same with a "
            f"divisor of its heads, not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.shape[-1] > LARGEST_HEAD_SIZE:
        raise ValueError(
            f"a head size of {q.shape[-1]} is too large for the kernels (they take up to "
            f"{LARGEST_HEAD_SIZE}): use attn_kernels.attend"
        )
    for name in variant.learned:
        if name not in learned or learned[name].shape != (q.shape[1],):
            raise ValueError(f"{variant.name} learns {name}: pass it as [{q.shape[1]}]")
    if variant.gated and (gates is None or gates.shape != q.shape[:3]):
        raise ValueError(f"{variant.name} needs gates, {list(q.shape[:3])}")
    if gates is not None and not variant.gated:
        raise ValueError(f"{variant.name} has no gates: leave them out")
    if rows is not None and window is not None:
        raise ValueError("rows say all that queries see: leave out the window")
    if rows is not None and (
        rows.shape != (3, q.shape[0], q.shape[2]) or rows.dtype != torch.int32
    ):
        raise ValueError(
            f"rows must be int32 [3, batch, num_tokens], not {rows.dtype} {list(rows.shape)}"
        )


@torch.compiler.assume_constant_result
def _spec(variant: Variant) -> str:
    """Return a variant as an operator's argument."""
    return json.dumps({"name": variant.name, **dataclasses.asdict(variant)})


@functools.cache
def _variant(spec: str) -> Variant:
    parameters = json.loads(spec)
    return get_variant(parameters.pop("name"), **{k: v for k, v in parameters.items() if v != []})


@dataclasses.dataclass(frozen=True)
class Call:
    """What the launches of one call have in common."""

    variant: Variant
    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    learned: Sequence[Tensor]
    decays: Tensor | None
    scale: float

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of a head, and tokens."""
        return self.q.shape[0] * self.q.shape[1], self.q.shape[2]

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """Compile-time arguments of all kernels but TILE."""
        heads, size = self.q.shape[1], self.q.shape[3]
        dims = max(16, triton.next_power_of_2(size))  # the least that matrices are multiplied with
        shape = dense.Shape(heads, heads // self.k.shape[1], size, dims)
        return {**functions(self.variant), "SHAPE": shape}

    @property
    def two_learned(self) -> tuple[Tensor | None, ...]:
        return (*self.learned, None, None)[:2]

    def options(self, kernel: Any, kind: str) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel."""
        size = self.given["SHAPE"].dims
        tile = training_tile(
            kind,
            current_arch(),
            size,
            self.q.element_size(),
            stateful=self.variant.stateful,
            wide=self.given["VARIANT"].unit_keys or self.variant.gated,
        )
        given = {**self.given, "TILE": dense.Tiling(tile.rows, tile.keys)}
        return constants(kernel, given) | tile.options

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The scale (of raw scores, or of selections alone), sequences and tokens."""
        return self.scale, self.q.shape[0], self.q.shape[2]

    def units(self) -> Tensor | None:
        """Return 1 / |k| `[batch, num_kv_heads, num_tokens]`, if the variant's scores have it."""
        if not self.given["VARIANT"].unit_keys:
            return None
        return 1.0 / self.k.float().norm(dim=-1).clamp_min(1e-12)

    def snapshots(self) -> Tensor | None:
        """Return a stateful variant's accumulators ahead of each tile of queries."""
        if not self.variant.stateful:
            return None
        batch, _, tokens, _ = self.q.shape
        options = self.options(selecting.snapshots_kernel, FORWARD)
        tile = options["TILE"]
        tiles = triton.cdiv(tokens, tile.rows)
        snapshots = torch.empty(batch, tiles, tokens, dtype=torch.float32, device=self.q.device)
        selecting.snapshots_kernel[(batch, triton.cdiv(tokens, tile.keys))](
            snapshots, self.q, self.k, self.rows, *self.numbers,
            self.q.stride(0), self.q.stride(2), self.k.stride(0), self.k.stride(2), **options,
        )  # fmt: skip
        return snapshots

    @functools.cached_property
    def sums(self) -> Tensor | None:
        """What kernels get of `decays`, `[2, 2, batch, num_heads, num_tokens]` float32: of queries
        and of keys, sums and the rests that they round off."""
        if self.decays is None:
            return None
        rounded = self.decays.float()
        return torch.stack((rounded, (self.decays - rounded).float()), 1)

    def strides(self, *tensors: Tensor) -> list[int]:
        """Return those between batches, heads and tokens.

        Raises:
            ValueError: kernels compute places inside a sequence in 32 bits.
        """
        for x in tensors:
            if x.shape[2] * x.stride(2) >= 2**31:
                raise ValueError(f"{x.shape[2]} tokens are too many: train on shorter sequences")
        return [stride for x in tensors for stride in x.stride()[:3]]


def current_arch() -> str:
    """Return the architecture that kernels are compiled for: an H100's where they are
    interpreted."""
    if triton.knobs.runtime.interpret:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _rows_first(x: Tensor) -> Tensor:
    """Return memory of a tensor's shape and dtype in which a token's heads are side by side."""
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _statistics(q: Tensor, variant: Variant) -> Tensor:
    count = 4 if functions(variant)["UPDATE_STATISTICS"] is not None else 2
    return q.new_empty(count, *q.shape[:3], dtype=torch.float32)


def _all(learned: Sequence[Tensor], decays: Tensor | None) -> list[Tensor]:
    return [*learned] if decays is None else [*learned, decays]


@torch.library.custom_op("attnserve::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    learned: Sequence[Tensor],
    decays: Tensor | None,
    variant: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the statistics that the backward needs."""
    call = Call(_variant(variant), q, k, v, rows, learned, decays, scale)
    out, statistics = _rows_first(q), _statistics(q, call.variant)
    if not q.numel():
        return out, statistics
    heads, tokens = call.grid
    with torch.cuda.device_of(q):
        options = call.options(forward.forward_kernel, FORWARD)
        forward.forward_kernel[(heads, triton.cdiv(tokens, options["TILE"].rows))](
            out, q, k, v, rows, call.units(), call.snapshots(), call.sums, statistics,
            *call.two_learned, *call.numbers, *call.strides(out, q, k, v), **options,
        )  # fmt: skip
    return out, statistics


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    learned: Sequence[Tensor],
    decays: Tensor | None,
    variant: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _rows_first(q), _statistics(q, _variant(variant))


@torch.library.custom_op("attnserve::attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    out: Tensor,
    statistics: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    learned: Sequence[Tensor],
    decays: Tensor | None,
    variant: str,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k, v, the learned tensors and `decays`, if there are any."""
    call = Call(_variant(variant), q, k, v, rows, learned, decays, scale)
    dq, dk, dv = _rows_first(q), _rows_first(k), _rows_first(v)
    if not q.numel():
        return [dq, dk, dv, *map(torch.zeros_like, _all(learned, decays))]
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    row_values = q.new_empty(6, *q.shape[:3], dtype=torch.float32)
    d_learned = q.new_empty(len(learned), *q.shape[:3], dtype=torch.float32)
    d_decays = None if decays is None else torch.empty_like(decays, dtype=torch.float32)
    heads, tokens = call.grid

    with torch.cuda.device_of(q):
        units, snapshots = call.units(), call.snapshots()
        options = call.options(backward.queries_kernel, BACKWARD_QUERIES)
        backward.queries_kernel[(heads, triton.cdiv(tokens, options["TILE"].rows))](
            dq, row_values, d_learned, d_decays, d_out, out, q, k, v, rows, units,
            snapshots, call.sums, statistics, *call.two_learned, *call.numbers,
            *call.strides(dq, d_out, out, q, k, v), **options,
        )  # fmt: skip
        options = call.options(backward.keys_kernel, BACKWARD_KEYS)
        kv_heads = k.shape[0] * k.shape[1]
        backward.keys_kernel[(kv_heads, triton.cdiv(tokens, options["TILE"].keys))](
            dk, dv, d_decays, row_values, d_out, q, k, v, rows, units, snapshots,
            call.sums, statistics, *call.two_learned, *call.numbers,
            *call.strides(dk, dv, d_out, q, k, v), **options,
        )  # fmt: skip
        if snapshots is not None:
            of_head = q.new_zeros(2, q.shape[0], *q.shape[2:], dtype=torch.float32)
            options = call.options(selecting.selections_kernel, SELECTIONS)
            selecting.selections_kernel[(q.shape[0], triton.cdiv(tokens, options["TILE"].keys))](
                *of_head, row_values, d_out, q, k, v, rows, units, snapshots, call.sums, statistics,
                *call.two_learned, *call.numbers, *call.strides(d_out, q, k, v), **options,
            )  # fmt: skip
            dq[:, 0] += of_head[0]
            dk[:, 0] += of_head[1]
    of_decays = None if d_decays is None else d_decays.double()
    return [dq, dk, dv, *_all([x.sum((0, 2)) for x in d_learned], of_decays)]


@_attention_backward.register_fake
def _(
    d_out: Tensor,
    out: Tensor,
    statistics: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    learned: Sequence[Tensor],
    decays: Tensor | None,
    variant: str,
    scale: float,
) -> list[Tensor]:
    return [*map(_rows_first, (q, k, v)), *map(torch.empty_like, _all(learned, decays))]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rows, learned, decays, ctx.variant, ctx.scale = inputs
    ctx.save_for_backward(*output, q, k, v, rows, decays, *learned)


def _backward(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    out, statistics, q, k, v, rows, decays, *learned = ctx.saved_tensors
    dq, dk, dv, *others = _attention_backward(
        d_out, out, statistics, q, k, v, rows, learned, decays, ctx.variant, ctx.scale
    )
    d_decays = None if decays is None else others.pop()
    return dq, dk, dv, None, others, d_decays, None, None


_attention.register_autograd(_backward, setup_context=_keep)
