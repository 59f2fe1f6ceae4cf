"""The attention backend of every variant: what vLLM asks of it, metadata, and the impl; and what is
checked after a model is loaded.

One backend class a variant, made from the registry. The KV cache is vLLM's logical
`[num_blocks, num_kv_heads, block_size, content]`, laid out inside each block as the kernels like
it: `attn_kernels.triton` on a GPU, `attn_kernels.cpu` (or, where that cannot be built,
`attn_kernels.paged`) on a CPU.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from attn_kernels import Variant, cpu, get_variant, variant_from_config, variant_names
from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KV_FORMATS
from attn_kernels.paged import Layer, heads_of
from attn_kernels.pruning import PageShape, PrunedLayer
from vllm_attn import head_0, kv_dtypes, names, pruned
from vllm_attn.pruned import PageSpec
from vllm_attn.report import StartupError

if TYPE_CHECKING:
    from attn_kernels.triton import TritonLayer, TritonPrunedLayer

logger = init_logger(f"vllm.{__name__}")


class VariantBackend(AttentionBackend):
    """What vLLM asks of an attention backend; subclasses below name the variant."""

    variant_name: ClassVar[str]

    # One custom operator a layer rather than two: on a CPU each costs as much as attention to a
    # short context.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*kv_dtypes.supported("cuda")]

    @classmethod
    def get_name(cls) -> str:
        return cls.variant_name.upper()

    @staticmethod
    def get_impl_cls() -> type[VariantImpl]:
        return VariantImpl

    @staticmethod
    def get_builder_cls() -> type[VariantMetadataBuilder]:
        return VariantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Return the tokens of a block where --block-size does not say them."""
        if not current_platform.is_cuda_alike():
            return default_block_size
        from attn_kernels.triton.tuning import BLOCK_SIZE

        return max(default_block_size, BLOCK_SIZE)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8  # Triton's bfloat16; None: a CPU

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return "sinks" in get_variant(cls.variant_name).learned

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.state_content_bytes is not None:  # a layer of ours says it (gated.py, pruned.py)
            return spec
        return kv_dtypes.packed(spec, get_variant(cls.variant_name))


class VariantMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """Reads vLLM's batch once a step; all layers share the result.

    On a GPU it refers to vLLM's persistent buffers, copies nothing and waits for nothing, and what
    is launched depends on the numbers of tokens and requests only, and on the longest context,
    which is the model's while a graph is captured: a captured CUDA graph serves every batch of its
    size.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: AttentionSpec, *others: Any, **named: Any) -> None:
        super().__init__(kv_cache_spec, *others, **named)
        if self.device.type != "cpu":  # requests with one query first, for `Batch.num_decodes`
            self.reorder_batch_threshold = 1
        if isinstance(kv_cache_spec, PageSpec):
            pruned.announce(self.vllm_config, kv_cache_spec)
        if self.device.type != "cpu":
            self.compile_launches()

    def compile_launches(self) -> None:
        """Compile what the layers can launch, before the first request; what a disk's cache has is
        read there.

        Raises:
            StartupError: a table of tiles cannot be read.
        """
        from attn_kernels.triton import launch, tuned, warm

        logger.info("Compiling attention kernels, or reading them from Triton's cache")
        began = time.monotonic()
        spec, config = self.kv_cache_spec, self.vllm_config
        states = spec.get_num_kernel_states(spec.block_size)
        size = 1, spec.num_heads, states, spec.state_content_size_bytes
        cache = torch.zeros(size, dtype=torch.uint8, device=self.device).view(spec.dtype)
        layers: dict[str, Any] = get_layers_from_vllm_config(
            config, AttentionLayerBase, self.layer_names
        )
        unlike = {layer.impl.kind: layer for layer in layers.values()}
        try:
            with launch.compile_only():
                for layer in unlike.values():
                    warm.compile_launches(
                        layer.impl.bind_triton(layer, cache),
                        config.model_config.dtype,
                        max_num_reqs=config.scheduler_config.max_num_seqs,
                        max_num_tokens=config.scheduler_config.max_num_batched_tokens,
                        max_seq_len=config.model_config.max_model_len,
                    )
        except tuned.TableError as error:
            raise StartupError(str(error)) from None
        logger.info("Attention kernels took %.1f s", time.monotonic() - began)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("attention variants are causal only")
        common = common_attn_metadata
        num_decodes = 0
        if self.device.type != "cpu" and common.max_query_len > 1:
            lens = common.query_start_loc_cpu.diff()
            num_decodes = int((lens == 1).cumprod(0).sum())
        return Batch(
            common.block_table_tensor,
            common.query_start_loc_cpu if self.device.type == "cpu" else common.query_start_loc,
            common.seq_lens,
            common.slot_mapping,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            num_decodes=num_decodes,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Batch:
        batch = self.build(0, common_attn_metadata)
        batch.halves = ()  # of other sizes in each step
        batch.max_seq_len = self.vllm_config.model_config.max_model_len
        # The longest contexts would make the capture slow; none is shorter than its queries.
        batch.seq_lens.copy_(batch.query_start_loc.diff().clamp_min(1))
        return batch


def asks_for_something(argument: str, value: Any) -> bool:
    """Return whether an argument that a model passes through vLLM's layer changes its attention:
    most models pass None, and Rnj-1 a `chunk_lookback` of -1, for what a layer does not have."""
    if argument == "layer_idx":
        return False
    return value is not None and value is not False and (argument, value) != ("chunk_lookback", -1)


class VariantImpl(AttentionImpl[Batch]):
    """Attention of one layer.

    Models pass arguments of their own through vLLM's layer (`sinks`, say), often as None: those are
    taken, as is a tensor that the variant learns, and any other that asks for something is refused
    by its name.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        vllm_config = get_current_vllm_config()
        name = names.variant_of(vllm_config.attention_config.backend)
        if name is None:
            raise StartupError("an attnserve backend was made without --attention-backend")
        declared = variant_from_config(vllm_config.model_config.hf_config)
        self.variant: Variant = declared or get_variant(name)
        self.kv_cache_dtype, self.kv_format = kv_cache_dtype, KV_FORMATS.get(kv_cache_dtype)
        self.prepare_kernels()
        self.learned: dict[str, Tensor] = {
            tensor: others.pop(tensor)
            for tensor in self.variant.learned
            if others.get(tensor) is not None
        }
        """The variant's per-head tensors, `[num_heads]` each; the model class may add some."""
        plain = self.variant.takes_modifiers
        unsupported = {
            **{
                f"`{argument}`": asks_for_something(argument, value)
                for argument, value in others.items()
            },
            "ALiBi": alibi_slopes is not None and not plain,
            "a soft cap on the scores": bool(logits_soft_cap) and not plain,
            "KV sharing between layers": kv_sharing_target_layer_name is not None
            and (self.variant.stateful or self.variant.gated),
        }
        for what, present in unsupported.items():
            if present:
                raise StartupError(f"{name} attention does not support {what}, which the model has")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.owns_cache = kv_sharing_target_layer_name is None
        self.cache: Tensor | None = None
        self.soft_cap = logits_soft_cap or None
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes)
        self.selector = head_0.is_remote(self.variant)
        self.budget: int | None = None
        """Tokens of a request that the layer keeps; None: all. The model class sets it."""
        self.gates: Tensor | None = None
        """Of a step's tokens, `[>= num_tokens, num_heads]` float32. The model class sets it."""
        self.layer: Layer | PrunedLayer | None = None
        """Attention bound to the layer's cache, which exists only when vLLM has sized it."""

    def prepare_kernels(self) -> None:
        """Find or build them now rather than in the first request.

        Raises:
            StartupError: there are none for this device.
        """
        if not current_platform.is_cuda_alike():
            cpu.load(self.variant, quantized=self.kv_format is not None)
            return
        from attn_kernels import triton

        try:
            triton.functions(self.variant)
        except ValueError as error:
            raise StartupError(f"{error}: serve it on a CPU") from None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.variant.gated and self.gates is None:
            raise StartupError(
                f"this model class computes no gates, which {self.variant.name} attention needs: "
                "serve a checkpoint trained with it"
            )
        for name in self.variant.learned:
            if name not in self.learned:
                raise StartupError(
                    f"this model class has no {name}, which {self.variant.name} attention learns: "
                    "serve a checkpoint trained with it, or fix its parameters with --hf-overrides "
                    '\'{"attention_variant": {"name": "%s", ...}}\'' % self.variant.name
                )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What kernels are compiled for; layers of one kind run the same ones."""
        sizes = self.num_heads, self.num_kv_heads, self.head_size, self.sliding_window
        modifiers = self.soft_cap, self.alibi_slopes is not None
        return *sizes, *modifiers, self.kv_cache_dtype, self.budget

    def bind(self, layer: Any, kv_cache: Tensor) -> Layer | PrunedLayer:
        """Return attention bound to the cache of vLLM's `layer`."""
        if kv_cache.device.type != "cpu":
            return self.bind_triton(layer, kv_cache)
        if self.budget is not None:
            options = {"num_heads": self.num_heads, "scale": self.scale}
            return pruned.bind(self.variant, kv_cache, self.page(kv_cache.dtype), **options)
        return cpu.bind(self.variant, self.heads(kv_cache), **self.options(kv_cache))

    def bind_triton(self, layer: Any, kv_cache: Tensor) -> TritonLayer | TritonPrunedLayer:
        """Return attention by the kernels for GPUs, bound to the cache of vLLM's `layer`."""
        from attn_kernels import triton

        if self.budget is not None:
            return triton.TritonPrunedLayer(
                self.variant,
                pruned.pages_of(kv_cache),
                self.page(kv_cache.dtype),
                num_heads=self.num_heads,
                scale=self.scale,
            )
        quantized = self.kv_cache_dtype in kv_dtypes.FP8
        return triton.TritonLayer(
            self.variant,
            self.heads(kv_cache.view(torch.float8_e4m3fn) if quantized else kv_cache),
            key_scale=layer._k_scale,
            value_scale=layer._v_scale,
            **self.options(kv_cache),
        )

    def page(self, dtype: torch.dtype) -> PageShape:
        """Return the page of a layer with a budget."""
        assert self.budget is not None
        sizes = self.budget, self.num_kv_heads, self.head_size
        return PageShape(*sizes, dtype, self.selector)

    def heads(self, kv_cache: Tensor) -> Tensor:
        """Return the heads of a cache that may have selecting keys behind them."""
        if not self.selector:
            return kv_cache
        return heads_of(kv_cache, self.num_kv_heads, self.head_size)

    def options(self, kv_cache: Tensor) -> dict[str, Any]:
        """Return the options of a `Layer`."""
        slopes = self.alibi_slopes
        return {
            "num_heads": self.num_heads,
            "scale": self.scale,
            "window": self.sliding_window,
            "learned": self.learned,
            "kv_format": self.kv_format,
            "soft_cap": self.soft_cap,
            "alibi_slopes": None if slopes is None else slopes.to(kv_cache.device),
            "selector": self.selector,
        }

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the step's keys and values, then attention of every request against its own.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            key, value: `[num_tokens, num_kv_heads, head_size]`; None, or not to be stored, where
                the cache is another layer's.
            kv_cache: `[num_blocks, num_kv_heads, block_size, content]`, with selecting keys
                `[num_blocks, 1, block_size, total]`, or `[num_pages, 1, budget, content]`.
            attn_metadata: the step's batch; None while vLLM profiles its memory.
            output: `[num_tokens, num_heads, head_size]`, written in place.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported")
        if attn_metadata is None:
            return output.zero_()
        if self.layer is None or self.cache is not kv_cache:
            if key is not None and len(key) != len(query):  # vLLM has cut it into heads
                raise StartupError(
                    f"{layer.layer_name}: the model makes other keys than the {self.num_kv_heads} "
                    f"heads of {self.head_size} that config.json says: correct num_key_value_heads"
                )
            self.layer, self.cache = self.bind(layer, kv_cache), kv_cache
        selecting = head_0.share(query, key) if self.selector else None
        if self.owns_cache:
            if self.gates is not None:
                assert isinstance(self.layer, Layer)
                self.layer.write_gates(self.gates, attn_metadata)
            self.layer.step(query, key, value, attn_metadata, output, selecting)
        else:
            assert isinstance(self.layer, Layer)
            self.layer.attend(query, attn_metadata, output)
        return output


def check_layers(vllm_config: Any) -> None:
    """Refuse a loaded model in which another attention than the chosen variant would run: a model
    may choose the backend of its layers itself (MiMo-V2 does), and vLLM then never asks the
    platform, which refuses another backend than the chosen one.

    Layers that hold a state of their own (Mamba, linear attention) are no attention to choose.

    Args:
        vllm_config: with the layers that the model registered in it.

    Raises:
        StartupError: with one line that names the first such layer.
    """
    name = names.variant_of(vllm_config.attention_config.backend)
    if name is None:
        return
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    layers = {key: layer for key, layer in layers.items() if not isinstance(layer, MambaBase)}
    for layer_name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, VariantImpl) or impl.variant.name != name:
            raise StartupError(
                f"layer {layer_name} would run {layer.get_attn_backend().get_name()} instead of "
                f"{name} attention: this model chooses its attention itself and cannot be served "
                f"with {name}"
            )
        value_size = getattr(layer, "head_size_v", impl.head_size)
        if value_size != impl.head_size:
            raise StartupError(
                f"layer {layer_name} has values of size {value_size} and keys of size "
                f"{impl.head_size}: {name} attention needs them to be the same"
            )
    if not layers and vllm_config.parallel_config.pipeline_parallel_size == 1:
        raise StartupError(
            f"{vllm_config.model_config.model} has no attention layer that could run {name}: drop "
            "--attention-backend"
        )


@functools.cache
def __getattr__(name: str) -> type[VariantBackend]:
    """Return the backend class of a variant, which `names.register_all` has told vLLM to find
    here."""
    if name not in variant_names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (VariantBackend,), {"variant_name": name, "__module__": __name__})
