"""Several processes of one gateway, its workers: they share a port, and one keeps them running."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from attnserve.errors import UserError

log = logging.getLogger("attnserve")

YOUNG_SECONDS = 10.0
"""A worker that ends by itself (no signal killed it) before this age would do so again: the gateway
ends, too. One that is killed before it is started anew after a while."""

BACKOFF_SECONDS = 0.5
"""How long a worker is left alone that was killed young; doubled each time in a row."""

MAX_BACKOFF_SECONDS = 8.0

MAX_YOUNG_DEATHS = 6
"""After so many in a row of one worker, the gateway ends."""

Work = Callable[[socket.socket, Path], None]
"""What a worker does, given its socket and the file for its metrics."""


def run_workers(count: int, host: str, port: int, work: Work) -> None:
    """Run `work`, which has to be picklable, in so many processes until SIGINT or SIGTERM.

    SIGHUP goes on to all of them. Each has a socket of its own on the port, among which Linux
    divides the connections evenly. One that ends is started anew, on the same socket, where
    connections have waited meanwhile.

    Raises:
        UserError: the port cannot be listened on, or a worker ended as soon as it began, or was
            killed young again and again.
    """
    context = multiprocessing.get_context("spawn")
    sockets = shared_sockets(count, host, port)
    stopping = False
    processes: dict[int, tuple[BaseProcess, float]] = {}
    waiting: dict[int, float] = {}  # for their start, until when
    young_deaths = [0] * count  # in a row

    def pass_on(number: int, _: object) -> None:
        """Send a signal on to all workers; all but SIGHUP end them."""
        nonlocal stopping
        stopping = stopping or number != signal.SIGHUP
        for process, _began in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGTERM if stopping else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    with tempfile.TemporaryDirectory(prefix="attnserve-gateway-") as folder:

        def start(index: int) -> None:
            file = Path(folder, f"{index}.prom")
            process = context.Process(target=worker, args=(work, sockets[index], file))
            # Which would end it; it comes through once the worker can read its file again.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            processes[index] = process, time.monotonic()
            if stopping:  # since before it was there
                process.terminate()

        for index in range(count):
            start(index)
        failure = ""
        while processes or waiting:
            now = time.monotonic()
            for index in [index for index, due in waiting.items() if stopping or due <= now]:
                del waiting[index]
                if not stopping:
                    start(index)
            sentinels = [process.sentinel for process, _ in processes.values()]
            wait(sentinels, 0.1 if waiting or not sentinels else None)
            for index, (process, began) in list(processes.items()):
                if process.is_alive():
                    continue
                process.join()
                del processes[index]
                if stopping:
                    continue
                log.error("worker %d ended with %s", index, process.exitcode)
                killed = process.exitcode is not None and process.exitcode < 0
                young = time.monotonic() - began <= YOUNG_SECONDS
                deaths = young_deaths[index] = young_deaths[index] + 1 if young else 0
                if young and not killed:
                    failure = "a worker of the gateway ended as soon as it began"
                elif deaths >= MAX_YOUNG_DEATHS:
                    failure = f"a worker of the gateway was killed {deaths} times as it began"
                else:
                    waiting[index] = time.monotonic() + backoff(deaths)
                if failure:
                    pass_on(signal.SIGTERM, None)
        if failure:
            raise UserError(failure)


def backoff(deaths: int) -> float:
    """Return the seconds to wait after so many deaths of a young worker in a row."""
    return min(BACKOFF_SECONDS * 2 ** (deaths - 1), MAX_BACKOFF_SECONDS) if deaths else 0.0


def shared_sockets(count: int, host: str, port: int) -> list[socket.socket]:
    """Return listening sockets of the same port.

    Raises:
        UserError: it cannot be listened on, or another process does.
    """
    # Alone first: a port that may be shared would be shared with another gateway, too.
    family = listenable(host, port)
    return [
        socket.create_server((host, port), family=family, reuse_port=True, backlog=2048)
        for _ in range(count)
    ]


def listenable(host: str, port: int) -> int:
    """Return the family of an address that can be listened on.

    Raises:
        UserError: it is none of this machine, or another process listens on it.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # behind which is the address once more
        raise UserError(f"cannot listen on {host}:{port}: {why}") from None
    return family


def worker(work: Work, sock: socket.socket, file: Path) -> None:
    """Do the work, and end when the process that started this one is gone."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    work(sock, file)


def end_with_parent() -> None:
    """Wait for the end of the parent process, then stop this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
