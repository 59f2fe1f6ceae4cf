"""Head 0 of a stateful variant under tensor parallelism: its queries and keys select for all heads,
and vLLM gives it to the first rank alone.

Each rank gets its queries and keys of a step, by one small all-reduce a layer, and keeps the keys
in its own cache. What is selected is then computed on every rank from the same numbers in the same
way, so that accumulators and evictions are the same bits without another word, whatever the model
class and however its weights are stored. (Rows of the projections repeated on every rank would need
no communication, but a loader for each format of weights, and QK-norm and RoPE a second time.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    model_parallel_is_initialized,
    tensor_model_parallel_all_reduce,
)

from attn_kernels import Variant


def is_remote(variant: Variant) -> bool:
    """Return whether some rank of this layer does not have head 0."""
    parallel = model_parallel_is_initialized() and get_tensor_model_parallel_world_size() > 1
    return variant.stateful and parallel


def share(query: Tensor, key: Tensor) -> Tensor:
    """Return head 0's queries and keys on every rank: `[num_tokens, 2, head_size]`.

    Zeros add nothing to them, in any dtype and any order of ranks.

    Args:
        query, key: this rank's, `[num_tokens, heads, head_size]`, of the same dtype.
    """
    if get_tensor_model_parallel_rank() == 0:
        head_0 = torch.stack([query[:, 0], key[:, 0]], 1)
    else:
        head_0 = query.new_zeros(query.shape[0], 2, query.shape[2])
    return tensor_model_parallel_all_reduce(head_0)
