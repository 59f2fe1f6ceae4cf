"""Python, YAML and JSON that the texts show: it runs, is accepted, or is looked at elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from attn_kernels import variant_from_config
from tests.docs.clone import Clone
from tests.docs.prepare import gateway_example
from tests.docs.rules import CHECKPOINTS
from tests.docs.table import YOUR_LLAMA
from tests.docs.test_servers import GATEWAY
from tests.docs.text import TEXTS, Block, all_blocks, blocks

pytestmark = pytest.mark.integration

ELSEWHERE = {Path("docs/VARIANT.md"): "tests/attn_kernels/test_example.py"}
OTHER_CARDS = set(CHECKPOINTS) - {"softpick"}
PREPARED = {
    "your-llama": YOUR_LLAMA,
    "softpick-340M-4096-model": "python -m tests.docs.prepare published softpick-340M-4096-model",
}
"""What a program needs that is not in the checkout, and how it is made."""


def programs() -> list[object]:
    """Return the Python programs that ask no server; the cards' differ by a name only."""
    return [
        pytest.param(
            block,
            id=str(block.text),
            marks=[pytest.mark.slow] if block.text.parent.name in OTHER_CARDS else [],
        )
        for block in all_blocks("python")
        if GATEWAY not in block.content and block.text not in ELSEWHERE
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", programs())
def test_python(block: Block, clone: Clone, record_property: Callable[[str, object], None]) -> None:
    record_property("command", f"{block.text}: {block.content.splitlines()[0]} ...")
    for name, command in PREPARED.items():
        if name in block.content and not (clone.root / name).exists():
            done = clone.run(command)
            assert done.returncode == 0, done.stdout
    (clone.root / "snippet.py").write_text(block.content, encoding="utf-8")
    done = clone.run("python snippet.py")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: str(block.text))
def test_yaml(block: Block, clone: Clone, record_property: Callable[[str, object], None]) -> None:
    """A configuration of the gateway, whole or to be added to the page's example."""
    record_property("command", "attnserve-gateway --check-config")
    config = {**yaml.safe_load(gateway_example()), **yaml.safe_load(block.content)}
    (clone.root / "snippet.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = clone.run("attnserve-gateway --config snippet.yaml --check-config")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("block", all_blocks("json"), ids=lambda block: str(block.text))
def test_json(block: Block) -> None:
    """JSON, or a part of an object; what names a variant names one that there is."""
    content = block.content.strip()
    value = json.loads(content if content.startswith("{") else f"{{{content}}}")
    if "attention_variant" in value:
        assert variant_from_config(value) is not None


def test_every_language_is_looked_at() -> None:
    """`cpp` by tests/attn_kernels/test_example.py; without a language: formulas and drawings."""
    known = {"", "sh", "python", "yaml", "json", "cpp"}
    assert {block.language for text in TEXTS for block in blocks(text)} <= known
