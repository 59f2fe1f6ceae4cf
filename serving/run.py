"""The running gateway: one process, or several workers."""

import ctypes
import gc
import pickle
import resource
import socket
import sys
from functools import partial
from pathlib import Path

import uvicorn

from serving.app import App
from serving.config import Config
from serving.connection import Clients, Protocol
from serving.observability.logging import configure
from serving.state import GatewayState, kept_config
from serving.workers import listenable, run_workers


def run(config: Config, path: Path | None, workers: int) -> None:
    """Run the gateway until SIGINT or SIGTERM, then let what runs finish.

    Raises:
        UserError: the address cannot be listened on, or workers cannot be had or kept.
    """
    configure(config.logging.level)
    if workers == 1:
        listenable(config.host, config.port)
        run_process(config, path)
    else:
        config.check_workers()
        run_workers(workers, config.host, config.port, partial(run_process, config, path))


def run_process(
    config: Config,
    path: Path | None,
    listening: socket.socket | None = None,
    metrics_file: Path | None = None,
) -> None:
    """Run one process of the gateway; a worker of several has a socket and a file for metrics."""
    configure(config.logging.level)
    return_large_blocks()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    kept = kept_config(metrics_file) if metrics_file else None
    if kept is not None and kept.exists():  # of the worker in whose place this one is
        config = pickle.loads(kept.read_bytes())
    server = make_server(GatewayState(config, path, metrics_file))
    # What is there by now stays: a full collection that looked through it would hold up every
    # stream for some 70 ms.
    gc.collect()
    gc.freeze()
    server.run(None if listening is None else [listening])
    if not server.started:
        sys.exit(1)


def return_large_blocks() -> None:
    """Have glibc give what a large body took back to the system, as soon as it is free. By itself
    it would raise this threshold with the first one, and keep what the others leave."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD, at its default


def make_server(state: GatewayState) -> uvicorn.Server:
    """Return the HTTP server of one process."""
    settings = uvicorn.Config(
        App(state),
        host=state.config.host,
        port=state.config.port,
        http=partial(Protocol, Clients(state)),  # type: ignore[arg-type]  # any callable will do
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing asks for the client's address
        timeout_graceful_shutdown=state.config.timeouts.drain,
    )
    return uvicorn.Server(settings)
