"""Refuse configurations that name a variant which the model does not read."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from attn_kernels import VariantError, variant_from_config, variant_names

ENTRY = "attention_variant"


def refuse_unread_variants() -> None:
    """Make models of transformers check their configuration when they choose an implementation.

    The models of this package override the method and are not asked. Idempotent.
    """
    stock = PreTrainedModel.get_correct_attn_implementation
    if hasattr(stock, "checks_variant"):
        return

    @functools.wraps(stock)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        check_variant_is_read(type(self).__name__, self.config, requested_attention)
        check_variant_is_run(type(self), self.config, requested_attention)
        implementation: str = stock(self, requested_attention, *args, **kwargs)
        return implementation

    vars(checked)["checks_variant"] = True
    PreTrainedModel.get_correct_attn_implementation = checked


def check_variant_is_read(model: str, config: Any, requested: str | None) -> None:
    """Refuse a stock model whose configuration names another attention than it would run.

    Args:
        model: the name of its class.
        config: its configuration.
        requested: the `attn_implementation` that was asked for; None: the default, a softmax.

    Raises:
        VariantError: with one line that says what to write instead.
    """
    if line := nested_variant(config, "attn_implementation"):
        raise VariantError(line)
    declared = variant_from_config(config)
    if declared is None or declared.name in ("softmax", requested):
        return
    remedy = remedy_for(config, f'pass attn_implementation="{declared.name}"')
    if config.model_type == "variant_llama":
        remedy = "use VariantLlamaForCausalLM, or AutoModelForCausalLM"
    raise VariantError(
        f"config.json names {declared.name} attention, which {model} does not read: it would run "
        f"softmax: {remedy}"
    )


def nested_variant(config: Any, option: str) -> str | None:
    """Return the line that refuses a variant in a configuration inside a configuration, or None.

    Args:
        config: a transformers config.
        option: with which a variant can be tried instead.
    """
    nested = [(key, value) for key, value in config.to_dict().items() if key != ENTRY]
    for path, value in nested:  # grows
        if isinstance(value, Mapping):
            if value.get(ENTRY) is not None:
                return (
                    f"config.json names an attention variant in {path}.{ENTRY}, which "
                    "transformers and vLLM do not read: remove it, and try a variant with "
                    f"{option}"
                )
            nested += [(f"{path}.{key}", inner) for key, inner in value.items() if key != ENTRY]
    return None


def remedy_for(config: Any, option: str) -> str:
    """Return what to do about a variant that a model does not read; `option` always works."""
    if config.model_type != "llama":
        return option
    return (
        'write "model_type": "variant_llama" and "architectures": ["VariantLlamaForCausalLM"] '
        f"into it, or {option}"
    )


def check_variant_is_run(model: type, config: Any, requested: str | None) -> None:
    """Refuse a variant for a model with attention code of its own, which never asks for an
    attention function: it would run softmax, often with the variant's bool mask added to the
    scores. transformers' flags do not tell (`_supports_attention_backend` is False for Qwen3-Next,
    which does ask); the model's file does.

    Raises:
        VariantError: with one line.
    """
    name = (requested or "").removeprefix("paged|")
    if name not in variant_names() or getattr(config, "sub_configs", None):
        return  # the parts of a model of several are asked themselves
    files = (
        sys.modules[cls.__module__]
        for cls in model.__mro__
        if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel
    )
    if not any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(file) for file in files):
        raise VariantError(
            f"{model.__name__} computes attention itself and cannot run {name}: leave out "
            "attn_implementation"
        )
