"""Which replica gets a request, and what happens when one fails: on real servers."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from serving.config import Config
from serving.state import GatewayState
from tests.serving.helpers import HttpAnswer, Running, ask, error_of, leave, open_request, running
from tests.serving.standin import StandIn, standin, wait_for, wait_for_value


@pytest.fixture
def three() -> Iterator[list[StandIn]]:
    """Three servers for the model "m"."""
    with ExitStack() as stack:
        yield [stack.enter_context(standin()) for _ in range(3)]


def urls(servers: list[StandIn]) -> list[str]:
    return [server.url for server in servers]


def complete(gateway: Running, prompt: str = "x", **fields: Any) -> HttpAnswer:
    body = {"model": "m", "prompt": prompt, "max_tokens": 2, **fields}
    return ask(gateway.url, "POST", "/v1/completions", body)


def choose(names: list[str], prompts: list[str], **routing: Any) -> list[str]:
    """Return the replicas that an idle gateway gives these prompts to."""
    entry = {"name": "m", "replicas": [f"http://{name}" for name in names]}
    gateway = GatewayState(Config.model_validate({"models": [entry], "routing": routing}))
    model = gateway.router.model("m")
    return [model.choose(model.usable(), p.encode()).url.removeprefix("http://") for p in prompts]


PROMPTS = [f"{i}: a prompt that is long enough to have a cache" for i in range(600)]


def test_prefixes_are_spread_evenly_and_the_same_everywhere() -> None:
    first = choose(["a", "b", "c"], PROMPTS)
    assert first == choose(["c", "a", "b"], PROMPTS)
    assert all(150 < n < 250 for n in Counter(first).values())


def test_a_replica_that_goes_moves_only_its_own_prompts() -> None:
    before, after = choose(["a", "b", "c"], PROMPTS), choose(["a", "c"], PROMPTS)
    moved = [(x, y) for x, y in zip(before, after, strict=True) if x != y]
    assert {x for x, _ in moved} == {"b"}
    assert {y for _, y in moved} == {"a", "c"}


def test_same_prefix_same_replica(three: list[StandIn]) -> None:
    with running(*urls(three)) as gateway:
        for i in range(9):
            assert complete(gateway, "the same beginning " * 20 + f"and end {i}").status == 200
    assert sorted(s.started for s in three) == [0, 0, 9]


def test_overloaded_replica_loses_the_prefix(three: list[StandIn]) -> None:
    for server in three:
        server.before_s = 60.0
    with running(*urls(three)) as gateway:
        body = {"model": "m", "prompt": "the same beginning " * 20}
        clients = []
        for i in range(12):
            clients.append(open_request(gateway.url, body))
            wait_for_value(lambda: sum(s.running for s in three), i + 1, "it runs")
        # No more than 1.5 times the mean of 4, and no more servers than that takes.
        assert max(s.running for s in three) <= 7
        assert sum(s.running > 0 for s in three) == 2
        for client in clients:
            leave(client)


def test_least_loaded(three: list[StandIn]) -> None:
    for server in three:
        server.before_s = 60.0
    with running(*urls(three), routing={"policy": "least_loaded"}) as gateway:
        clients = []
        for i in range(9):
            clients.append(open_request(gateway.url, {"model": "m", "prompt": "x" * 400}))
            wait_for_value(lambda: sum(s.running for s in three), i + 1, "it runs")
        assert [s.running for s in three] == [3, 3, 3]
        for client in clients:
            leave(client)


def test_load_of_other_clients_counts(three: list[StandIn]) -> None:
    three[0].waiting = three[1].waiting = 5
    with running(*urls(three), routing={"policy": "least_loaded"}) as gateway:
        for _ in range(4):
            complete(gateway)
    assert [s.started for s in three] == [0, 0, 4]


def fail(server: StandIn, status: int, how: str) -> None:
    """Have a server fail requests: in its answer's head, or, as vLLM does where it finds a mistake
    after it has begun a stream, in the one event of it."""
    if how == "event":
        error = {"message": "no", "type": "x", "param": None, "code": status}
        server.first_event = json.dumps({"error": error})
    else:
        server.status = status


HOW = ["whole", "stream", "event"]


@pytest.mark.parametrize(("status", "failing"), [(502, 1), (503, 2)])
@pytest.mark.parametrize("how", HOW)
def test_failing_replica_is_replaced(
    three: list[StandIn], status: int, failing: int, how: str
) -> None:
    """Once after a 502, behind which a server may have crashed."""
    for server in three[:failing]:
        fail(server, status, how)
    with running(*urls(three), routing={"policy": "least_loaded"}) as gateway:
        answer = complete(gateway, stream=how != "whole")
        assert answer.status == 200
        assert sum(s.started for s in three) == failing + 1
        assert gateway.metric("attnserve_retries_total{") == failing
        assert gateway.metric("attnserve_upstream_errors_total{") == failing


@pytest.mark.parametrize("how", HOW)
def test_500_of_a_dying_replica_is_tried_again(three: list[StandIn], how: str) -> None:
    """vLLM's, when its engine has died: 500, or a stream with nothing in it but an error."""
    dying = three[0]
    seldom = {"every": 600}  # so that the gateway believes that it is well
    routing = {"policy": "least_loaded"}
    with running(*urls(three), routing=routing, health=seldom) as gateway:
        fail(dying, 500, how)
        dying.healthy = False
        answer = complete(gateway, stream=how != "whole")
        assert answer.status == 200
        assert b"error" not in answer.body
    assert [s.started for s in three] == [1, 1, 0]


def test_last_failure_is_passed_on(three: list[StandIn]) -> None:
    for server in three:
        server.status = 503
    with running(*urls(three)) as gateway:
        answer = complete(gateway)
        error = error_of(answer)
        assert (answer.status, error["message"], error["code"]) == (503, "no", None)
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("status", [400, 404, 429, 500])
@pytest.mark.parametrize("how", HOW)
def test_other_errors_are_not_tried_again(three: list[StandIn], status: int, how: str) -> None:
    for server in three:
        fail(server, status, how)
    with running(*urls(three)) as gateway:
        answer = complete(gateway, stream=how != "whole")
        assert (answer.status, error_of(answer)["message"]) == (status, "no")
        assert ("retry-after" in answer.headers) == (status == 429)
    assert sum(s.started for s in three) == 1


def test_stream_that_has_begun_is_not_tried_again(three: list[StandIn]) -> None:
    for server in three:
        server.break_after = 1
    with running(*urls(three)) as gateway:
        answer = complete(gateway, stream=True)
        events = answer.body.decode().strip().split("\n\n")
        assert len(events) == 2
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "upstream_broken"
    assert sum(s.started for s in three) == 1


@pytest.mark.parametrize("alive", [True, False])
def test_stream_that_breaks_before_its_first_token(three: list[StandIn], alive: bool) -> None:
    """It is tried again where the server has crashed; one that lives may still be at it."""
    three[0].break_after = 0
    seldom = {"every": 600}  # so that the gateway believes that it is well
    routing = {"policy": "least_loaded"}
    with running(*urls(three), routing=routing, health=seldom) as gateway:
        three[0].healthy = alive
        answer = complete(gateway, stream=True)
        assert answer.status == (502 if alive else 200)
    assert [s.started for s in three] == ([1, 0, 0] if alive else [1, 1, 0])


def test_circuit_opens_and_one_request_tries_it() -> None:
    breaker = {"failures": 2, "open_seconds": 2}
    with standin() as only, running(only.url, breaker=breaker, limits={"queue_size": 0}) as gateway:
        only.status = 503
        for _ in range(2):
            complete(gateway)
        answer = complete(gateway)  # not sent
        assert (answer.status, error_of(answer)["code"]) == (503, "upstream_unreachable")
        assert 0 < int(answer.headers["retry-after-ms"]) <= 2000
        assert only.started == 2
        assert gateway.metric("attnserve_replica_circuit_open{") == 1
        only.status, only.before_s = 200, 3.0
        time.sleep(2.1)
        trial = open_request(gateway.url, {"model": "m", "prompt": "x"})
        wait_for(lambda: only.running == 1, "one tries")
        assert complete(gateway).status == 503  # others wait for what it finds
        assert trial.getresponse().status == 200
        only.before_s = 0.0
        assert complete(gateway).status == 200
        assert gateway.metric("attnserve_replica_circuit_open{") == 0


def test_trial_whose_client_leaves_blocks_nobody() -> None:
    with standin() as only, running(only.url, breaker={"failures": 1, "open_seconds": 0.1}) as g:
        only.status = 503
        complete(g)
        only.status, only.before_s = 200, 60.0
        time.sleep(0.15)
        trial = open_request(g.url, {"model": "m", "prompt": "x"})
        wait_for(lambda: only.running == 1, "one tries")
        leave(trial)
        wait_for(lambda: only.aborted == 1, "it has left")
        only.before_s = 0.0
        wait_for(lambda: complete(g).status == 200, "the next one may try")


def test_unhealthy_replica_gets_nothing_until_it_is_well(three: list[StandIn]) -> None:
    three[0].healthy = False
    with running(*urls(three), routing={"policy": "least_loaded"}) as gateway:
        for _ in range(4):
            complete(gateway)
        assert three[0].started == 0
        health = ask(gateway.url, "GET", "/health").json()
        assert health["models"] == {"m": {"replicas": 3, "healthy": 2, "label_errors": []}}
        three[0].healthy = True
        wait_for(lambda: gateway.metric("attnserve_replica_healthy{") == 3, "it is well")
        complete(gateway)
        assert three[0].started == 1


def test_kill_under_load_fails_nothing_that_had_not_begun(three: list[StandIn]) -> None:
    """Three waves of requests, a server killed in each of the first two, and one comes back."""
    answers: list[HttpAnswer] = []
    with running(*urls(three), routing={"policy": "least_loaded"}) as gateway:

        def wave() -> list[threading.Thread]:
            for server in three:
                server.before_s = 4.0  # all begin before the first ends
            calls = [
                threading.Thread(
                    target=lambda s=i % 2: answers.append(complete(gateway, stream=bool(s)))
                )
                for i in range(12)
            ]
            for call in calls:
                call.start()
            return calls

        for victim in three[:2]:
            calls = wave()
            wait_for(lambda: sum(s.running for s in three) == 12, "all run")
            assert victim.running >= 4
            for server in three:
                server.before_s = 0.0
            victim.kill()
            for call in calls:
                call.join()
        assert [a.body for a in answers if a.status != 200] == []
        assert len(answers) == 24
        assert gateway.metric("attnserve_retries_total{") > 0
        back = StandIn(port=three[0].port)
        back.start()
        try:
            wait_for(lambda: bool(complete(gateway) and back.started), "traffic returns")
        finally:
            back.kill()


def test_server_that_ends_in_the_middle(three: list[StandIn]) -> None:
    """uvicorn, when it is not given the time to finish, answers 500 to what it is doing."""
    for server in three:
        server.before_s = 4.0
    answers: list[HttpAnswer] = []
    with running(*urls(three), routing={"policy": "least_loaded"}) as gateway:
        calls = [
            threading.Thread(target=lambda: answers.append(complete(gateway))) for _ in range(6)
        ]
        for call in calls:
            call.start()
        wait_for(lambda: sum(s.running for s in three) == 6, "all run")
        assert three[0].running > 0
        three[0].server.should_exit = three[0].server.force_exit = True
        for call in calls:
            call.join()
        assert [(a.status, a.body) for a in answers if a.status != 200] == []
        assert gateway.metric("attnserve_retries_total{") > 0


def test_removed_replica_finishes_its_streams(three: list[StandIn]) -> None:
    gone, stays = three[:2]
    gone.between_s = 0.05
    with running(gone.url) as gateway:
        body = {"model": "m", "prompt": "x", "max_tokens": 20, "stream": True}
        stream = open_request(gateway.url, body).getresponse()
        stream.readline()
        gateway.apply(models=[{"name": "m", "replicas": [stays.url]}])
        assert complete(gateway).status == 200
        assert (gone.started, stays.started) == (1, 1)
        assert stream.read().endswith(b"data: [DONE]\n\n")
        wait_for(lambda: gone.finished == 1, "the stream is written to its end")
        wait_for(lambda: not gone.server.server_state.connections, "no connection is left")


def test_two_models_and_a_shared_server() -> None:
    with standin("a", "adapter") as base, standin("b") as other:
        entries = [
            {"name": "a", "replicas": [base.url]},
            {"name": "adapter", "replicas": [base.url]},
            {"name": "b", "replicas": [other.url]},
        ]
        with running(models=entries) as gateway:
            for name in ("a", "adapter", "b"):
                assert complete(gateway, model=name).status == 200
            assert complete(gateway, model="c").status == 404
            assert (base.started, other.started) == (2, 1)
            listed = ask(gateway.url, "GET", "/v1/models").json()["data"]
            assert [entry["id"] for entry in listed] == ["a", "adapter", "b"]


def test_full_kv_cache_and_queue() -> None:
    """A server whose cache is full gets nothing; requests wait, in order, and not for ever."""
    limits = {"queue_size": 2, "queue_seconds": 30.0}
    with standin() as server:
        server.kv_usage = 0.99
        with running(server.url, limits=limits) as gateway:
            usage = "attnserve_replica_kv_cache_usage_ratio{"
            wait_for(lambda: gateway.metric(usage) == 0.99, "the gateway knows")
            waiting = [open_request(gateway.url, {"model": "m", "prompt": p}) for p in "ab"]
            wait_for(lambda: gateway.metric("attnserve_queue_length{") == 2, "two wait")
            third = complete(gateway)
            assert (third.status, error_of(third)["code"]) == (503, "engine_overloaded")
            assert third.headers["retry-after-ms"] == "1000"
            server.kv_usage = 0.5
            assert [w.getresponse().status for w in waiting] == [200, 200]
            assert sorted(s["body"]["prompt"] for s in server.seen) == ["a", "b"]
            server.kv_usage = 0.99
            wait_for(lambda: gateway.metric(usage) == 0.99, "it is full again")
            limits["queue_seconds"] = 1.0
            gateway.apply(models=[{"name": "m", "replicas": [server.url]}], limits=limits)
            assert complete(gateway).status == 503  # after a second
            assert server.started == 2


def test_servers_own_queue() -> None:
    with standin() as server:
        server.waiting = 33
        with running(server.url, limits={"queue_size": 0}) as gateway:
            assert complete(gateway).status == 503
            server.waiting = 3
            wait_for(lambda: complete(gateway).status == 200, "there is room")
