"""python -m serving (or attnserve-gateway): run the gateway. It is set by environment variables:

{settings}
"""

import argparse
import sys

import uvicorn
from pydantic import ValidationError

from serving.app import create_app
from serving.settings import Settings, describe


def help_text() -> str:
    """The module's text with every variable, its default and its meaning."""
    lines = []
    for field in Settings.model_fields.values():
        lines.append(f"  {field.alias}={field.default}\n      {field.description}")
    assert __doc__ is not None
    return __doc__.format(settings="\n".join(lines))


def main() -> None:
    """Run the gateway until SIGINT or SIGTERM; exit 2 on settings that make no sense."""
    argparse.ArgumentParser(
        prog="attnserve-gateway",
        description=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit(f"attnserve-gateway: {describe(error)}")
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )


if __name__ == "__main__":
    main()
