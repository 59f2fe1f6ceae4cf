"""The running gateway: one process, or several workers."""

import gc
import resource
import socket
import sys
from functools import partial
from pathlib import Path

import uvicorn

from serving.app import App
from serving.client import Protocol
from serving.config import Config
from serving.observability.logging import configure
from serving.state import GatewayState
from serving.workers import run_workers

KEEP_ALIVE_SECONDS = 75
"""How long a client's idle connection is kept: longer than clients do (aiohttp 15 s, a load
balancer 60 s), so that it is they who close it and none sends into one just being closed."""


def run(config: Config, path: Path | None, workers: int) -> None:
    """Run the gateway until SIGINT or SIGTERM, then let what runs finish."""
    configure(config.logging.level)
    if workers == 1:
        run_process(config, path)
    else:
        run_workers(workers, config.host, config.port, partial(run_process, config, path))


def run_process(
    config: Config,
    path: Path | None,
    listening: socket.socket | None = None,
    metrics_file: Path | None = None,
) -> None:
    """Run one process of the gateway; a worker of several has a socket and a file for metrics."""
    configure(config.logging.level)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    app = App(GatewayState(config, path, metrics_file))
    # What is there by now stays: a full collection that looked through it would hold up every
    # stream for some 70 ms.
    gc.collect()
    gc.freeze()
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=Protocol,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=config.timeouts.drain,
    )
    server = uvicorn.Server(settings)
    server.run(None if listening is None else [listening])
    if not server.started:
        sys.exit(1)
