"""Arguments of several commands; nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer import Option

from attnserve.evaluation.arguments import text_file
from attnserve.files import CHECKOUT

EXAMPLE = '{"name": "lssar", "power": 3}'


def variant_entry(text: str) -> dict[str, Any]:
    """Return the config entry of `softpick`, or of JSON with parameters like `EXAMPLE`.

    Raises:
        typer.BadParameter: there is no such variant or parameter.
    """
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
    """Return the name of a registered variant.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    return str(variant_entry(text)["name"])


def options_of(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a command an option for each field of a dataclass.

    The fields' annotations are typer's; the options replace the command's last parameter, which
    gets the value.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        *own, last = signature.parameters.values()
        hints = get_type_hints(kind, include_extras=True)
        added = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(kind)
        ]
        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *added]

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            value = kind(**{parameter.name: given.pop(parameter.name) for parameter in added})
            return function(**given, **{last.name: value})

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


Variant = Annotated[
    Any,
    Option(
        metavar="NAME",
        parser=variant_entry,
        help=f"A name, or JSON with parameters: '{EXAMPLE}'.",
        show_default=False,
    ),
]
Data = Annotated[
    list[Path],
    Option(metavar="FILE", parser=text_file, help="UTF-8 text files.", show_default=False),
]
Runs = Annotated[Path, Option(metavar="DIR", help="Folder of the training states.")]
RUNS = CHECKOUT / "runs"
