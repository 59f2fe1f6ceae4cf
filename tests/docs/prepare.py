"""What a reader of the texts brings along: `python -m tests.docs.prepare KIND OUT`."""

import sys
from pathlib import Path

import yaml

from tests.docs.text import blocks


def gateway_example(port: int = 8080) -> str:
    """Return the configuration that docs/GATEWAY.md prints, on another port."""
    (example,) = (
        block.content
        for block in blocks(Path("docs/GATEWAY.md"))
        if block.language == "yaml" and "host:" in block.content and "replicas:" in block.content
    )
    config = yaml.safe_load(example)
    return yaml.safe_dump({**config, "port": port})


def main(kind: str, out: str, *rest: str) -> None:
    """Write one of them: a plain Llama, a published softpick checkpoint, a gateway's YAML, the
    variant of docs/VARIANT.md."""
    if kind == "plain-llama":
        from tests.tiny import write_tiny_llama

        write_tiny_llama(Path(out))
    elif kind == "published":
        from tests.fla import fla_checkpoint

        fla_checkpoint(Path(out).parent).rename(out)
    elif kind == "gateway":
        Path(out).write_text(gateway_example(*map(int, rest)), encoding="utf-8")
    elif kind == "relu":
        from tests.attn_kernels.test_example import write_example

        write_example(Path(out))
    else:
        raise SystemExit(f"no such kind: {kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
