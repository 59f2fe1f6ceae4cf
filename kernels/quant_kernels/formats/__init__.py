"""Quantized weights as other programs store them.

Each format is a module: `reader(config)` takes the entry `quantization_config` of a config.json and
returns how that checkpoint's layers are read (`Reader`), as `QuantizedWeight`s. `packed` is the
format that is served and written, `gguf` has files of its own. To add one: a module, and an entry
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_kernels.formats import awq, bitsandbytes, gptq
from quant_kernels.formats.reader import Reader

READERS = {"gptq": gptq.reader, "awq": awq.reader, "bitsandbytes": bitsandbytes.reader}
"""By `quant_method`."""


def reader_of(config: Mapping[str, Any]) -> Reader:
    """Return the reader for an entry `quantization_config` whose `quant_method` is in `READERS`.

    Raises:
        ValueError: with one line: it cannot be read.
    """
    method = config["quant_method"]
    try:
        return READERS[method](config)
    except KeyError as error:
        raise ValueError(
            f"quantization_config of config.json has no {error}: it is incomplete"
        ) from None
    except (TypeError, AttributeError) as error:  # a value of another kind than the format has
        raise ValueError(
            f"quantization_config of config.json is not {method}'s ({error}): copy it again"
        ) from None


__all__ = ["READERS", "Reader", "reader_of"]
