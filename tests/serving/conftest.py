"""One real vLLM server and one real gateway in front of it, shared by these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server, vllm_server
from tests.serving.helpers import MODEL, gateway_server

CONTEXT = 40_000
"""Tokens; less than fit into `upstream`'s cache."""


@pytest.fixture(scope="session")
def upstream(tiny_llama: Path) -> Iterator[Server]:
    """vLLM with a tiny model and a single seat: what is not aborted keeps the next one waiting."""
    # In bfloat16, vLLM's own CPU attention uses AMX without asking the kernel for it, and dies.
    args = (f"--served-model-name={MODEL}", "--max-num-seqs=1", "--dtype=float32")
    context = f'--hf-overrides={{"max_position_embeddings": {CONTEXT}}}'
    # The gateway does not depend on the plugins, so their mistakes should not show here.
    with vllm_server(tiny_llama, *args, context, env={"VLLM_PLUGINS": ""}) as server:
        yield server


@pytest.fixture(scope="session")
def gateway(upstream: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield the gateway in front of `upstream`."""
    with gateway_server(upstream.url, tmp_path_factory.mktemp("gateway")) as server:
        yield server
