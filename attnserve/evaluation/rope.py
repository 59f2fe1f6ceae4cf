"""RoPE's theta, multiplied: how the SSMax paper asks a trained model for longer contexts."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def rope_parameters(config: PretrainedConfig, factor: float) -> dict[str, Any]:
    """The `rope_parameters` of a configuration with theta times `factor`.

    Raises:
        ValueError: the model has several kinds of RoPE, or none.
    """
    parameters = dict(config.rope_parameters or {})
    if "rope_theta" not in parameters:
        raise ValueError(f"a {config.model_type} has no single rope_theta to multiply")
    return parameters | {"rope_theta": parameters["rope_theta"] * factor}
