"""Checks before any weight is loaded: a checkpoint is never served with the wrong attention.

They run in the API server's process, where an error is one clear line on the terminal, each time
vLLM makes a configuration; so they are idempotent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from attn_kernels import Variant, get_variant, variant_from_config
from attn_kernels.pruning import LARGEST_GPU_BUDGET
from hf_attn.configuration import VariantLlamaConfig
from hf_attn.files import tensor_shapes
from hf_attn.unread import nested_variant, remedy_for
from vllm_attn import kv_dtypes, library, names, report
from vllm_attn.report import StartupError

logger = init_logger(f"vllm.{__name__}")

DRAFTLESS_SPECULATION = ("ngram", "ngram_gpu", "suffix")
LOCAL_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""KV connectors that copy whole blocks, and only bring them back to the engine they came from."""


def check(vllm_config: Any) -> None:
    """Resolve which variant runs, write it into the configuration, refuse what would be wrong.

    Raises:
        StartupError, VariantError: with one line that says what is wrong and what to do.
    """
    if vllm_config.model_config is None:
        return
    report.forget()
    device = vllm_config.device_config.device_type
    if device == "cpu":
        library.check()
        check_fp8(vllm_config.model_config)
        check_pipeline(vllm_config)
    variant = resolve(vllm_config)
    check_format(vllm_config.model_config)
    check_tokenizer(vllm_config.model_config)
    if variant is None:
        return
    if device not in ("cpu", "cuda"):
        raise StartupError(
            f"{variant.name} attention has no kernels for {device}: serve on a CPU or a CUDA device"
        )
    check_options(vllm_config, variant)
    check_budgets(vllm_config, variant)
    check_learned_tensors(vllm_config.model_config, variant)


def check_fp8(model_config: Any) -> None:
    """Refuse fp8 for which vLLM 0.32 asks a CPU for an operator that only GPUs have."""
    entry = getattr(model_config.hf_config, "quantization_config", None) or {}
    whole = not entry.get("weight_block_size")
    dynamic = entry.get("activation_scheme", "dynamic") == "dynamic"
    if model_config.quantization in ("fp8", "fp8_per_tensor") and whole and dynamic:
        raise StartupError(
            "vLLM has no CPU kernel for fp8 with scales that follow the activations: use a "
            "checkpoint with static ones, or quantize the original with python -m quant.quantize"
        )


def check_pipeline(vllm_config: Any) -> None:
    """Refuse pipeline parallelism in which vLLM 0.32's CPU worker dies of the first request: only
    the run that compiles a model makes the tensors that later stages receive into."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1 and vllm_config.model_config.enforce_eager:
        raise StartupError(
            f"vLLM's CPU worker cannot run {stages} pipeline stages with --enforce-eager: drop one "
            "of the two"
        )


def resolve(vllm_config: Any) -> Variant | None:
    """Return the variant to serve with, or None if vLLM's own attention runs a softmax checkpoint.

    The checkpoint's `attention_variant` decides; `--attention-backend` must agree with it. A
    checkpoint that names no variant was trained with softmax; any variant may be tried on it.
    """
    model_config = vllm_config.model_config
    attention_config = vllm_config.attention_config
    declared = variant_from_config(model_config.hf_config)
    backend = attention_config.backend
    asked = names.variant_of(backend)
    check_place(model_config, declared, asked)
    if declared is None:
        if asked is None:
            return None
        # A checkpoint with the variant's learned tensors (gpt-oss) was trained with it.
        if asked != "softmax" and not get_variant(asked).tensors:
            logger.warning(
                "%s was trained with softmax attention; serving it with %s is an experiment",
                model_config.model,
                asked,
            )
        variant = get_variant(asked)
    elif backend is None:
        attention_config.backend = names.backend_for(declared.name)
        logger.info("%s attention, as the checkpoint's config.json says", declared.name)
        variant = declared
    elif asked == declared.name:
        variant = declared
    elif asked is None and declared.name == "softmax":
        return None
    else:
        raise StartupError(
            f"{model_config.model} was trained with {declared.name} attention and answers nonsense "
            f"with {backend.name.lower()}: drop --attention-backend or pass "
            f"--attention-backend {declared.name}"
        )
    others = {
        kind: other.name.lower()
        for kind, other in attention_config.backend_per_kind.items()
        if names.variant_of(other) != variant.name
    }
    if others:
        raise StartupError(
            f"backend_per_kind {others} would run another attention than {variant.name} in some "
            "layers: drop it"
        )
    return variant


def check_place(model_config: Any, declared: Variant | None, asked: str | None) -> None:
    """Refuse a variant that config.json names where transformers would not read it.

    vLLM and transformers must run the same attention. What a command line names is not meant:
    `--attention-backend`, as `attn_implementation` in transformers, and `--hf-overrides`.
    """
    config = model_config.hf_config
    if line := nested_variant(config, "--attention-backend"):
        raise StartupError(line)
    if declared is None and isinstance(config, VariantLlamaConfig):
        raise StartupError(
            "config.json of a variant_llama names no attention function, and transformers refuses "
            'it: write for example "attention_variant": {"name": "softpick"} into it, or make it a '
            "plain llama"
        )
    overrides = model_config.hf_overrides
    overridden = not callable(overrides) and "attention_variant" in overrides
    if declared is None or declared.name in ("softmax", asked) or overridden:
        return
    if isinstance(config, VariantLlamaConfig):
        return
    remedy = remedy_for(config, f"pass --attention-backend {declared.name}")
    raise StartupError(
        f"config.json names {declared.name} attention, but its model_type {config.model_type} does "
        f"not read attention_variant, and transformers would run softmax: {remedy}"
    )


def check_options(vllm_config: Any, variant: Variant) -> None:
    """Refuse options under which this variant's answers would be wrong."""
    cache_config = vllm_config.cache_config
    kv_dtypes.check(vllm_config, variant)
    speculative = vllm_config.speculative_config
    if speculative is not None:
        if variant.stateful:
            raise StartupError(
                f"{variant.name} attention cannot take back a token that speculative decoding "
                "rejects: drop --speculative-config"
            )
        if speculative.method not in DRAFTLESS_SPECULATION:
            raise StartupError(
                f"a draft model would run with {variant.name} attention too: use one of "
                f"{', '.join(DRAFTLESS_SPECULATION)} or drop --speculative-config"
            )
    check_kv_transfer(vllm_config, variant)
    if not variant.stateful:
        return
    if cache_config.enable_prefix_caching:
        cache_config.enable_prefix_caching = False
        logger.warning(
            "prefix caching is off: %s attention's accumulators of a shared block depend on the "
            "queries that came after it",
            variant.name,
        )


def check_kv_transfer(vllm_config: Any, variant: Variant) -> None:
    """Refuse whatever moves cached blocks to where they would be wrong.

    vLLM derives a KV connector from `--kv-offloading-size` after this check.
    """
    transfer = vllm_config.kv_transfer_config
    offloading = vllm_config.cache_config.kv_offloading_size is not None
    if variant.stateful and (transfer is not None or offloading):
        raise StartupError(
            f"{variant.name} attention changes cached tokens after they are written, which KV "
            "connectors do not follow: drop "
            + ("--kv-offloading-size" if offloading else "--kv-transfer-config")
        )
    if vllm_config.device_config.device_type != "cpu":
        return
    connector = getattr(transfer, "kv_connector", None)
    if offloading and vllm_config.cache_config.kv_offloading_backend != "native":
        connector = f"--kv-offloading-backend {vllm_config.cache_config.kv_offloading_backend}"
    if connector is not None and connector not in LOCAL_CONNECTORS:
        raise StartupError(
            f"on a CPU {variant.name} attention stores each block in an order of its own, which "
            f"{connector} would give to an engine with another one: use none, or "
            "--kv-offloading-size"
        )


def check_budgets(vllm_config: Any, variant: Variant) -> None:
    """Refuse what budgets do not go with.

    Raises:
        StartupError: with one line that says what and what to do.
    """
    budgets = variant.kv_budgets
    if not budgets:
        return
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    num_layers = model_config.hf_text_config.num_hidden_layers
    if len(budgets) != num_layers:
        raise StartupError(
            f"kv_budgets has {len(budgets)} entries and the model {num_layers} layers: give one "
            "budget a layer"
        )
    reasons = {
        f"a model of {', '.join(model_config.architectures)}, whose layers cannot have budgets: "
        "convert it to VariantLlamaForCausalLM": (
            "VariantLlamaForCausalLM" not in model_config.architectures
        ),
        f"a KV cache of {cache_dtype}, because what is evicted is decided by keys as they are: use "
        f"one of {', '.join(kv_dtypes.PLAIN)} as --kv-cache-dtype": (
            cache_dtype not in kv_dtypes.PLAIN
        ),
        "a sliding window: drop one of the two": bool(
            getattr(model_config.hf_text_config, "sliding_window", None)
        ),
        "context parallelism: use --decode-context-parallel-size 1 and "
        "--prefill-context-parallel-size 1": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        f"a GPU where one is above {LARGEST_GPU_BUDGET}: lower it, or serve on a CPU": (
            vllm_config.device_config.device_type != "cpu"
            and min(max(budgets), model_config.max_model_len) > LARGEST_GPU_BUDGET
        ),
    }
    for what, present in reasons.items():
        if present:
            raise StartupError(f"kv_budgets do not go with {what}")


def check_tokenizer(model_config: Any) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding table.

    vLLM takes token ids up to the tokenizer's last. Multimodal models have placeholders there,
    which are never looked up, and so have text models that share their tokenizer (Gemma 3 1B):
    added special tokens are only warned of.
    """
    if model_config.skip_tokenizer_init or model_config.is_multimodal_model:
        return
    rows = model_config.get_vocab_size()
    tokenizer = cached_tokenizer_from_config(model_config)
    if not rows or tokenizer.max_token_id < rows:
        return
    added = getattr(tokenizer, "added_tokens_decoder", {})
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows]
    last = max((i for i in beyond if i not in added or not added[i].special), default=None)
    if last is None:
        logger.warning(
            "The tokenizer has special tokens with ids up to %d, beyond the embedding table of %d "
            "rows: no request may use them.",
            tokenizer.max_token_id,
            rows,
        )
    else:
        raise StartupError(
            f"the tokenizer {model_config.tokenizer} has token ids up to {last}, and the model's "
            f"embedding table {rows} rows: it is another model's tokenizer, or tokens were added "
            "to it without resizing the embeddings (resize_token_embeddings in transformers)"
        )


def check_format(model_config: Any) -> None:
    """Refuse a local checkpoint that lacks tensors of its format, or has others (`hf_attn.fla`)."""
    check_tensors = getattr(model_config.hf_config, "check_tensors", None)
    if check_tensors is not None and (names := tensor_names(model_config)):
        check_tensors(names)


def check_learned_tensors(model_config: Any, variant: Variant) -> None:
    """Refuse a local checkpoint with a broken file, or without the variant's learned tensors; those
    of another format have other names (`check_format`)."""
    tensors = tensor_names(model_config)
    if not tensors or hasattr(model_config.hf_config, "check_tensors"):
        return
    num_layers = model_config.hf_text_config.num_hidden_layers
    for layer in range(num_layers):
        for name in variant.tensors:
            if f"model.layers.{layer}.self_attn.{name}" not in tensors:
                raise StartupError(
                    f"the checkpoint has no tensor model.layers.{layer}.self_attn.{name}, which "
                    f"{variant.name} attention learns in every layer: train or convert it with "
                    f"{variant.name}"
                )


def tensor_names(model_config: Any) -> set[str]:
    """Return all tensors of a local folder of safetensors.

    Empty for any other checkpoint, which is checked when its weights are loaded (`vllm_attn.model`,
    `vllm_attn.fla_model`).
    """
    try:
        return set(tensor_shapes(Path(model_config.model)))
    except ValueError as error:
        raise StartupError(str(error)) from None


def check_layer(backend: Any, selector_config: Any, capability: Any = None) -> None:
    """Refuse an attention layer that the backend cannot run, as vLLM's GPU platforms do.

    Args:
        backend: the enum's member.
        selector_config: what vLLM says of the layer.
        capability: the GPU's; None on a CPU.
    """
    if selector_config.has_sink and not backend.get_class().supports_sink():
        raise StartupError(
            f"the model has learned sinks, which {backend.name.lower()} attention has not: pass "
            "--attention-backend sinks"
        )
    reasons = backend.get_class().validate_configuration(
        device_capability=capability, **selector_config._asdict()
    )
    quantized = selector_config.kv_cache_dtype in kv_dtypes.FP8
    if quantized and capability is not None and capability.to_int() < 89:
        reasons.append("float8 needs a GPU of compute capability 8.9 or later")
    if reasons:
        raise StartupError(
            f"--attention-backend {backend.name.lower()} cannot run this model: "
            + "; ".join(reasons)
        )
    logger.info("Using %s backend.", backend.name)
