"""Everything in vLLM that this plugin replaces, with a check at start-up that it is still there.

vLLM has public hooks for the rest: entry points, `AttentionBackendEnum.register`, `ModelRegistry`,
`register_quantization_config`, stat loggers. They do not reach what is here:

- A platform plugin replaces the CPU platform, but only one can be active, vLLM skips them all when
  `VLLM_TARGET_DEVICE=cpu`, and a GPU keeps its own platform. There the class in use gets the same
  three methods (`honour_variants`).
- `register_model_loader` would replace a loader, but it logs a warning for each of eight formats,
  in every process, also where no variant is served. So `load_weights` is replaced
  (`check_every_load`).
- vLLM has no hook between loading a model and sizing its cache. The platform's
  `update_block_size_for_backend` is called there, and `backend.check_layers` with it.

Tried on vLLM 0.32, and on a CPU on 0.33's Python with 0.32's C++ library (`tools/try_vllm.py`),
since 0.33 has no wheel for CPUs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any, TypeVar

from packaging.version import Version
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms.interface import Platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from quant_kernels.formats import Reader
from quant_kernels.formats.packed import packed_tensors
from vllm_attn.report import StartupError

logger = init_logger(f"vllm.{__name__}")

TRIED = ("0.32", "0.33")
"""The first and the last minor version."""

COMPRESSED_TENSORS = "vllm.model_executor.layers.quantization.compressed_tensors"

POINTS = (
    ("vllm.v1.attention.backends.registry:AttentionBackendEnum", "register"),
    ("vllm.platforms.interface:Platform", "check_and_update_config"),
    ("vllm.platforms.interface:Platform", "get_attn_backend_cls"),
    ("vllm.platforms.interface:Platform", "update_block_size_for_backend"),
    ("vllm.model_executor.model_loader:DefaultModelLoader", "load_weights"),
    ("vllm.model_executor.model_loader:RunaiModelStreamerLoader", "load_weights"),
    ("vllm.platforms.interface:Platform", "import_kernels"),
    ("vllm.v1.attention.backend:AttentionBackend", "customize_spec"),
    ("vllm.v1.attention.backend:AttentionBackend", "supported_kv_cache_layouts"),
    ("vllm.v1.attention.backend:AttentionMetadataBuilder", "build_for_cudagraph_capture"),
    ("vllm.v1.attention.backend:AttentionCGSupport", "ALWAYS"),
    ("vllm.v1.kv_cache_interface:KVCacheLayout", "LBHNC"),
    ("vllm.v1.kv_cache_interface:CircularBufferSpec", "get_num_kernel_states"),
    ("vllm.v1.kv_cache_interface:AttentionSpec", "state_content_size_bytes"),
    ("vllm.v1.kv_cache_interface:KVQuantMode", "INT8_PER_TOKEN_HEAD"),
    ("vllm.v1.kv_cache_interface:KVQuantMode", "INT4_PER_TOKEN_HEAD"),
    ("vllm.v1.attention.backend:AttentionBackend", "forward_includes_kv_cache_update"),
    ("vllm.v1.attention.backend:AttentionBackend", "validate_configuration"),
    ("vllm.model_executor.models.registry:ModelRegistry", "register_model"),
    ("vllm.model_executor.layers.attention:Attention", "get_kv_cache_spec"),
    ("vllm.model_executor.layers.linear:QKVParallelLinear", "weight_loader"),
    ("vllm.model_executor.layers.linear:QKVParallelLinear", "weight_loader_v2"),
    (f"{COMPRESSED_TENSORS}.compressed_tensors:CompressedTensorsConfig", "get_scheme_dict"),
    (f"{COMPRESSED_TENSORS}.schemes:compressed_tensors_wNa16", "WNA16_SUPPORTED_TYPES_MAP"),
    (f"{COMPRESSED_TENSORS}.schemes:compressed_tensors_wNa16", "WNA16_ZP_SUPPORTED_TYPES_MAP"),
    ("vllm.v1.metrics.loggers:AggregateStatLoggerBase", "log_engine_initialized"),
    ("vllm.config:CompilationConfig", "static_forward_context"),
    ("vllm.forward_context:ForwardContext", "no_compile_layers"),
)
"""What the plugins override or call in vLLM and would not miss at import: class, attribute."""

P = TypeVar("P", bound=type[Platform])


def missing_points() -> list[str]:
    """Return the `POINTS` that the installed vLLM lacks (some seconds)."""

    def is_there(place: str, attribute: str) -> bool:
        try:
            owner = resolve_obj_by_qualname(place.replace(":", "."))
        except (ImportError, AttributeError):
            return False
        # A dataclass's field without a default is no attribute of the class.
        return hasattr(owner, attribute) or attribute in getattr(owner, "__dataclass_fields__", ())

    return [
        f"{place.partition(':')[2]}.{attribute}"
        for place, attribute in POINTS
        if not is_there(place, attribute)
    ]


def check_version() -> None:
    """Say so when vLLM is outside the tried range.

    Raises:
        StartupError: it lacks one of the `POINTS`.
    """
    installed = version("vllm")
    minor = ".".join(installed.split(".")[:2])
    if Version(TRIED[0]) <= Version(minor) <= Version(TRIED[1]):
        return
    logger.warning(
        "attnserve was tried on vLLM %s to %s, not on %s: if start-up fails below, install "
        "one of those",
        *TRIED,
        installed,
    )
    if missing := missing_points():
        raise StartupError(
            f"vLLM {installed} has no {', '.join(missing)}, which attnserve uses: install a "
            f"version from {TRIED[0]} to {TRIED[1]}"
        )


def stock(owner: type, name: str, *parameters: str) -> Callable[..., Any]:
    """Return a method that is about to be replaced.

    Args:
        owner: its class.
        name: of the method.
        parameters: what it must take, in order.

    Raises:
        StartupError: vLLM has no such method any more, or it takes something else.
    """
    try:
        method: Callable[..., Any] = getattr(owner, name)
        inspect.signature(method).bind(*parameters)
    except (AttributeError, TypeError):
        raise StartupError(
            f"vLLM {version('vllm')} has no {owner.__name__}.{name}({', '.join(parameters)}), "
            f"which attnserve replaces: install a version from {TRIED[0]} to {TRIED[1]}"
        ) from None
    return method


def honour_variants(platform: P) -> P:
    """Class decorator of a platform: check the configuration at start-up, select the variants'
    backends, and check the loaded model."""
    check = stock(platform, "check_and_update_config", "vllm_config")
    select = stock(platform, "get_attn_backend_cls", "backend", "attn_selector_config", "num_heads")
    update = stock(platform, "update_block_size_for_backend", "vllm_config")

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        from vllm_attn import preflight

        preflight.check(vllm_config)
        check(vllm_config)

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm_attn import names, preflight

        if names.variant_of(selected_backend) is None:
            path: str = select(selected_backend, attn_selector_config, num_heads=num_heads)
            return path
        check_every_load()
        preflight.check_layer(selected_backend, attn_selector_config, cls.get_device_capability())
        return str(selected_backend.get_path())

    def update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
        if vllm_config.model_config is not None:
            from vllm_attn import backend

            backend.check_layers(vllm_config)
        update(vllm_config)

    methods = (check_and_update_config, get_attn_backend_cls, update_block_size_for_backend)
    for method in methods:
        setattr(platform, method.__name__, classmethod(method))
    platform.honours_variants = True
    return platform


def ensure_active() -> None:
    """Make the platform in use honour variants if it is not ours."""
    from vllm.platforms import current_platform

    if not getattr(current_platform, "honours_variants", False):
        honour_variants(type(current_platform))


@functools.cache
def check_every_load() -> None:
    """Make vLLM's loaders of checkpoints refuse one that lacks a tensor (`weights`). Idempotent."""
    from vllm.model_executor.model_loader import DefaultModelLoader, RunaiModelStreamerLoader

    for loader in (DefaultModelLoader, RunaiModelStreamerLoader):
        load_weights = stock(loader, "load_weights", "self", "model", "model_config")
        loader.load_weights = checked(load_weights)


def reader_for(loader: Any, model_config: Any) -> Reader | None:
    """Return how layers are read that another library quantized (`vllm_quant.foreign`), if so."""
    if model_config.quantization is None:
        return None
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    return getattr(get_quant_config(model_config, loader.load_config), "reader", None)


def packed(tensors: Iterable[tuple[str, Tensor]], reader: Reader) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of such a checkpoint as ours would have them.

    Raises:
        StartupError: a layer is incomplete, or cannot be read.
    """
    try:
        yield from packed_tensors(tensors, reader)
    except ValueError as error:
        raise StartupError(str(error)) from error


def checked(load_weights: Callable[..., None]) -> Callable[..., None]:
    """Wrap a loader's `load_weights`: mark parameters before it, and look at them afterwards."""
    from vllm_attn import weights

    def load(self: Any, model: Any, model_config: Any) -> None:
        if model_config.runner_type == "draft":  # it may share the target's embeddings
            load_weights(self, model, model_config)
            return
        of_model = model.load_weights

        reader = reader_for(self, model_config)

        def load_and_check(tensors: Iterable[tuple[str, Tensor]]) -> Any:
            seen: dict[str, None] = {}
            if reader is not None:
                tensors = packed(tensors, reader)
            with weights.loading(seen):
                names = of_model(weights.noted(tensors, seen))
            weights.check(model, names, seen)
            return names

        weights.mark(model)
        weights.guard(model)
        model.load_weights = load_and_check
        try:
            load_weights(self, model, model_config)
        finally:
            del model.load_weights

    return load
