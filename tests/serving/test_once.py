"""A request runs once: it is sent again only where it is sure that no server has read it, and after
a crash to one other server."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import uvloop

from serving.upstream.http import Connection
from serving.upstream.pool import ConnectionPool
from tests.serving.helpers import HttpAnswer, ask, error_of, open_request, running
from tests.serving.scripted import BODY, OK, Next, listening
from tests.serving.standin import StandIn, standin, wait_for, wait_for_value


@pytest.fixture
def three() -> Iterator[list[StandIn]]:
    """Three servers for the model "m"."""
    with ExitStack() as stack:
        yield [stack.enter_context(standin()) for _ in range(3)]


class OneRequestEach:
    """A server that answers one request on each connection and closes it when it is told to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.close = threading.Event()
        self.closed = threading.Event()
        self.read: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            self.read.append(connection.recv(65536))
            connection.sendall(OK)
            self.close.wait()
            connection.close()
            self.closed.set()


async def post(pool: ConnectionPool) -> Connection:
    return await pool.send("POST", "/", [], b"", connect_timeout=9, read_timeout=9, total_timeout=9)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("seen", [True, False], ids=["before", "too late"])
def test_connection_that_was_closed_before_the_request(
    seen: bool, loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's close is in the kernel, but the loop has not been told: it is looked for right
    before a request is sent; and where that is too early still, the request is sent again, for the
    server's kernel has not acknowledged a byte of it."""
    check = Connection.check_open
    found = []

    def check_open(connection: Connection) -> bool:
        found.append(check(connection))
        return found[-1] if seen else True

    monkeypatch.setattr(Connection, "check_open", check_open)

    async def twice(server: OneRequestEach) -> None:
        pool = ConnectionPool(server.url, 60.0)
        first = await post(pool)
        await first.rest(9)
        pool.put(first)
        server.close.set()
        server.closed.wait(10)  # the loop stands still
        second = await post(pool)
        assert (second.status, second.uses) == (200, 1)
        assert first.uses == (1 if seen else 2)
        pool.put(second)
        pool.close()

    server = OneRequestEach()
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(twice(server))
    assert found == [False]
    assert len(server.read) == 2


def linger_not(writer: asyncio.StreamWriter) -> None:
    """Have the connection's end be a reset."""
    own = writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("all_of_it", [True, False], ids=["all", "a byte"])
def test_request_that_may_have_been_read_is_not_sent_again(
    reset: bool, all_of_it: bool, retries: int
) -> None:
    """Neither to the server whose kept connection has broken, which lives, nor to another one."""
    read = 0

    async def read_and_leave(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal read
        await following()
        writer.write(OK)
        read += 1
        if all_of_it:
            await following()
        else:
            await reader.readexactly(1)
        read += 1
        if reset:
            linger_not(writer)

    async def run() -> list[HttpAnswer]:
        def ask_all(*urls: str) -> list[HttpAnswer]:
            routing = {"retries": retries, "policy": "least_loaded"}
            health = {"every": 60.0}  # one between the two would take the kept connection
            with running(*urls, routing=routing, health=health) as gateway:
                found = [ask(gateway.url, "POST", "/v1/completions", BODY) for _ in range(2)]
                assert (
                    gateway.metric(
                        'attnserve_upstream_errors_total{bits="8",model="m",reason="broken"'
                    )
                    == 1
                )
                assert gateway.metric("attnserve_retries_total{") == 0
                return found

        async with listening(read_and_leave) as one, listening(read_and_leave) as other:
            return await asyncio.to_thread(ask_all, one, other)

    first, second = asyncio.run(run())
    assert first.status == 200
    assert (second.status, error_of(second)["code"]) == (502, "upstream_broken")
    assert read == 2


@pytest.mark.parametrize(("retries", "killed"), [(0, 1), (2, 2), (9, 2)])
@pytest.mark.parametrize("stream", [True, False])
def test_request_that_kills_servers_gets_two_of_them_at_most(
    three: list[StandIn], retries: int, killed: int, stream: bool
) -> None:
    for server in three:
        server.before_s = 60.0
    routing = {"retries": retries, "policy": "least_loaded"}
    with running(*(s.url for s in three), routing=routing) as gateway:
        client = open_request(gateway.url, {**BODY, "stream": stream})
        for victim in three[:killed]:
            wait_for_value(lambda: sum(s.running for s in three), 1, "it runs")
            assert victim.running == 1
            victim.kill()
        answer = HttpAnswer(client.getresponse())
        assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")
        crashed = 'attnserve_upstream_errors_total{bits="8",model="m",reason="crashed"'
        assert gateway.metric(crashed) == killed
    assert [s.started for s in three] == [1] * killed + [0] * (3 - killed)


def test_server_that_was_never_reached_costs_no_try(three: list[StandIn]) -> None:
    """After a crash, one other server may run the request, however many do not answer."""
    three[0].before_s = 60.0
    routing = {"policy": "least_loaded"}
    seldom = {"every": 600}
    with running(*(s.url for s in three), routing=routing, health=seldom) as gateway:
        client = open_request(gateway.url, BODY)
        wait_for(lambda: three[0].running == 1, "it runs")
        three[1].kill()
        three[0].kill()
        assert client.getresponse().status == 200
    assert three[2].started == 1
