"""DiffLlamaForCausalLM for vLLM: transformers' `diffllama`, a Llama whose attention is the
difference of two maps (Differential Transformer, arXiv 2410.05258).

Heads come in pairs, `h` and `h + H / 2`, of queries, keys and values alike. The pair's output is
`A(q1, k1) V - lambda A(q2, k2) V`, where `V` is both values side by side. No kernel has to know: a
KV head of twice the size holds `[k1, k2]` and `[v1, v2]`, and the two maps are the query heads
`[q1, 0]` and `[0, q2]`. So everything is cached once, in any format, and read by any backend.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from vllm_attn.backend import VariantImpl
from vllm_attn.report import StartupError


class PairedQKVLinear(QKVParallelLinear):
    """vLLM's projection of heads of twice the size, loaded from one with the two heads of a pair
    apart: so ranks of tensor parallelism get whole pairs."""

    def weight_loader(self, param: Any, loaded_weight: Tensor, shard: Any = None) -> None:
        super().weight_loader(param, self.paired(param, loaded_weight, shard), shard)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor, shard: Any = None) -> None:
        super().weight_loader_v2(param, self.paired(param, loaded_weight, shard), shard)

    def paired(self, param: Any, tensor: Tensor, shard: str | None) -> Tensor:
        """Return a tensor of q, k or v with head `h + pairs` behind head `h`, along the dimension
        of outputs, if it has one.

        Raises:
            StartupError: its format does not keep heads apart.
        """
        dim = getattr(param, "output_dim", None)
        if dim is None or shard is None:
            return tensor
        pairs = self.total_num_heads if shard == "q" else self.total_num_kv_heads
        if tensor.shape[dim] % (2 * pairs):
            raise StartupError(
                f"{self.prefix}: weights of this quantization cannot be brought into the order of "
                "differential attention's pairs of heads: use the unquantized checkpoint"
            )
        return tensor.unflatten(dim, (2, pairs, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


class DiffLlamaAttention(nn.Module):
    """Differential attention; the arguments are those of vLLM's `LlamaAttention`."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        pairs, kv_pairs = num_heads // 2, num_kv_heads // 2
        if num_heads % 2 or num_kv_heads % 2 or pairs % ranks:
            raise StartupError(
                f"differential attention takes heads in pairs: {num_heads} heads and "
                f"{num_kv_heads} KV heads cannot be divided over {ranks} ranks"
            )
        self.head_dim: int = config.head_dim
        self.qkv_proj = PairedQKVLinear(
            hidden_size,
            2 * self.head_dim,
            pairs,
            kv_pairs,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim, max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            num_heads // ranks,
            2 * self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            attn_type=attn_type,
            prefix=f"{prefix}.attn",
        )
        impl = self.attn.impl
        if isinstance(impl, VariantImpl) and not impl.variant.takes_modifiers:
            raise StartupError(
                f"{impl.variant.name} attention does not run as a difference of two maps, which "
                "share a KV head here: its scores are not the model's"
            )
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * extract_layer_index(prefix))
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(self.head_dim), requires_grad=False) for _ in range(4)
        )
        self.groupnorm = nn.RMSNorm(
            2 * self.head_dim, eps=config.rms_norm_eps, elementwise_affine=False
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend with `hidden_states [num_tokens, hidden_size]` at `positions [num_tokens]`."""
        qkv, _ = self.qkv_proj(hidden_states)
        kv_size = self.qkv_proj.num_kv_heads * 2 * self.head_dim
        q, k, v = qkv.split([qkv.shape[-1] - 2 * kv_size, kv_size, kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        # [num_tokens, pairs, head_dim, 2] -> [num_tokens, pairs, 2, 2, head_dim], the maps' queries
        q = q.unflatten(-1, (-1, 2, self.head_dim)).transpose(-1, -2)
        output = self.attn(torch.diag_embed(q, dim1=-3, dim2=-2).flatten(1), k, v)
        first, second = output.unflatten(-1, (-1, 2, 2 * self.head_dim)).unbind(-2)
        minuend = (self.lambda_q1 * self.lambda_k1).sum(dtype=torch.float32).exp()
        subtrahend = (self.lambda_q2 * self.lambda_k2).sum(dtype=torch.float32).exp()
        factor = (minuend - subtrahend + self.lambda_init).to(first.dtype)
        heads = self.groupnorm(first - factor * second) * (1 - self.lambda_init)
        output, _ = self.o_proj(heads.flatten(1))
        return output


class DiffLlamaForCausalLM(LlamaForCausalLM):
    """Model class of checkpoints with `"architectures": ["DiffLlamaForCausalLM"]`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.lora_config is not None:
            raise StartupError(
                "adapters of a diffllama have their heads in another order than its weights have "
                "here: merge them into the weights, or drop --enable-lora"
            )
        layer_type = functools.partial(LlamaDecoderLayer, attn_layer_type=DiffLlamaAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
