"""What a vLLM server says of its KV cache."""

import contextlib
import re
from typing import TYPE_CHECKING, Any

from serving.upstream.http import UpstreamError

if TYPE_CHECKING:
    from serving.upstream.replica import Replica

INFO = re.compile(rb"^vllm:cache_config_info\{([^}\n]*)\}", re.MULTILINE)
NUMBER = re.compile(rb'(\w+)="(\d+(?:\.\d+)?)"')


async def kv_cache(replica: "Replica | None") -> dict[str, Any]:
    """Its size in bytes and in tokens, and what a token and the longest request take of it; None is
    what the server (a worker of it, where several share a model) does not say."""
    page = b""
    if replica is not None:
        with contextlib.suppress(UpstreamError):  # a comparison is good without it
            _, page = await replica.get("/metrics")
    return figures(page)


def figures(page: bytes) -> dict[str, Any]:
    """The same, by the server's /metrics."""
    found = INFO.search(page)
    said = {k: float(v) for k, v in NUMBER.findall(found[1])} if found else {}
    size = said.get(b"kv_cache_memory_bytes")
    tokens = said.get(b"kv_cache_size_tokens")
    requests = said.get(b"kv_cache_max_concurrency")
    return {
        "bytes_per_token": size / tokens if size and tokens else None,
        "bytes_per_request": size / requests if size and requests else None,
        "cache_bytes": None if size is None else int(size),
        "cache_tokens": None if tokens is None else int(tokens),
    }
