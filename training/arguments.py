"""Arguments of several commands; nothing heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from attnserve.errors import UserError
from attnserve.files import CHECKOUT

EXAMPLE = '{"name": "lssar", "power": 3}'


def variant_entry(text: str) -> dict[str, Any]:
    """Return the config entry of `softpick`, or of JSON with parameters like `EXAMPLE`."""
    from attn_kernels import VariantError, get_variant

    try:
        entry = json.loads(text) if text.lstrip().startswith("{") else {"name": text}
        parameters = dict(entry)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            raise typer.BadParameter(f"{text} names no variant: write it as {EXAMPLE}")
        get_variant(name, **parameters)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON ({error}): write it as {EXAMPLE}") from None
    except VariantError as error:
        raise typer.BadParameter(str(error)) from None
    return dict(entry)


def variant_name(text: str) -> str:
    """Return the name of a registered variant."""
    return str(variant_entry(text)["name"])


def device_of(named: str | None) -> str:
    """Return the device that is named, else cuda if there is one, else cpu."""
    import torch

    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda") or (
        device != "cpu" and not torch.cuda.is_available()
    ):
        raise UserError(f"there is no device {device}: leave out --device")
    return device


Variant = Annotated[
    Any, Option(metavar="NAME", parser=variant_entry, help=f"A name, or JSON such as '{EXAMPLE}'.")
]
Data = Annotated[list[Path], Option(metavar="FILE", help="UTF-8 text files.", show_default=False)]
Runs = Annotated[Path, Option(metavar="DIR", help="Folder of the training states.")]
RUNS = CHECKOUT / "runs"
