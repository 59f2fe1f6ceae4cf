"""What servers say that they run, against labels: believed, noticed when it changes, shown."""

import json
import logging
from typing import Any

import pytest

from serving.config import ModelEntry
from serving.upstream.vllm_metrics import (
    UNKNOWN,
    ServerInfo,
    describe_model,
    describe_server,
    numbers,
    parse_info,
)
from tests.serving.helpers import Running, ask, request_lines, running
from tests.serving.standin import StandIn, standin, wait_for

SOFTPICK = {
    "model_name": "m",
    "variant": "softpick",
    "weight_bits": "4",
    "embedding_bits": "8",
    "weight_method": "compressed-tensors",
    "kv_cache_dtype": "bfloat16",
    "kv_budgets": "64,32",
}
BODY = {"model": "m", "prompt": "x", "max_tokens": 3}


def entry(url: str = "http://127.0.0.1:1", **labels: Any) -> dict[str, Any]:
    """Return a model of a configuration."""
    return {"name": "m", "replicas": [url], **labels}


def known(gateway: Running, name: str = "m") -> dict[str, Any]:
    """Return what /v1/models says of a model."""
    answer = ask(gateway.url, "GET", f"/v1/models/{name}").json()
    found: dict[str, Any] = answer["attnserve"]
    return found


def mismatches(gateway: Running) -> float:
    """Replicas with a wrong label, by the metrics."""
    return gateway.metric("attnserve_replica_label_mismatch{")


def says(upstream: StandIn, gateway: Running, **changes: str) -> None:
    """Have a server say something else, as another that was started at its address would."""
    upstream.runs = {**SOFTPICK, **changes}
    (replica,) = gateway.state.replicas.values()
    expected = ServerInfo(**upstream.runs)
    wait_for(lambda: replica.info == expected, "it is noticed")
    (model,) = gateway.state.router.models.values()
    wait_for(lambda: model.description.info == expected, "by the model")


@pytest.mark.parametrize(
    ("labels", "expected", "errors"),
    [
        ({}, ("softpick", "4"), []),
        ({"variant": "softpick", "bits": 4}, ("softpick", "4"), []),
        ({"variant": "softpik"}, ("softpick", "4"), ["variant softpik, the server softpick"]),
        ({"bits": 16}, ("softpick", "4"), ["bits 16, the server 4"]),
        ({"bits": 4.25}, ("softpick", "4"), ["bits 4.25, the server 4"]),
    ],
)
def test_server_is_believed(
    labels: dict[str, Any], expected: tuple[str, str], errors: list[str]
) -> None:
    found = describe_server(ModelEntry(**entry(**labels)), ServerInfo(**SOFTPICK))
    assert (found.variant, found.bits) == expected
    assert found.unconfirmed == ()
    assert [e.removeprefix("the label says ") for e in found.errors] == errors


@pytest.mark.parametrize(
    ("bits", "good"), [(2, True), (3.1, True), (8, True), (16, False), (1.5, False)]
)
def test_mixed_widths_may_be_labelled_with_their_mean(bits: float, good: bool) -> None:
    found = describe_server(ModelEntry(**entry(bits=bits)), ServerInfo(weight_bits="2,3,8"))
    assert found.bits == "2,3,8" and found.as_json()["bits"] == [2, 3, 8]
    assert (found.errors == ()) == good


def test_label_that_nobody_confirms() -> None:
    labelled = ModelEntry(**entry(variant="softpick", bits=4))
    silent = describe_server(labelled, UNKNOWN)
    assert (silent.variant, silent.bits, silent.errors) == ("softpick", "4", ())
    assert silent.unconfirmed == ("variant", "bits")
    # A method of quantization whose bits the plugin does not know.
    half = describe_server(labelled, ServerInfo(variant="softpick", weight_method="quark"))
    assert (half.bits, half.unconfirmed, half.errors) == ("4", ("bits",), ())
    assert describe_server(ModelEntry(**entry()), UNKNOWN).unconfirmed == ()


def test_servers_of_one_model_that_differ() -> None:
    labelled = ModelEntry(**entry())
    parts = [
        describe_server(labelled, ServerInfo(variant=v, kv_cache_dtype="fp8")) for v in ("a", "b")
    ]
    both = describe_model(parts)
    assert both.variant == "a,b" and both.info.kv_cache_dtype == "fp8"
    assert both.errors == ("the servers differ in variant: a and b",)
    assert describe_model(parts[:1]) == parts[0]
    aliases = [describe_server(labelled, ServerInfo(model_name=name)) for name in ("m", "alias")]
    assert describe_model(aliases).errors == () and describe_model(aliases).info.model_name == ""


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"vllm:num_requests_running 0\n",
        b"attnserve:server_info\n",
        b'attnserve:server_info{variant="a"} 1.0\nattnserve:server_info{variant="b"} 1.0\n',
        b"\xff\xfeattnserve:server_info{",
    ],
)
def test_pages_that_say_nothing_clear(page: bytes) -> None:
    assert parse_info(page) == UNKNOWN


def test_vllm_says_its_name_without_the_plugin() -> None:
    lines = (
        b'vllm:cache_config_info{block_size="16"} 1.0\nvllm:x{engine="0",model_name="a\\"b"} 0\n'
    )
    assert parse_info(lines) == ServerInfo(model_name='a"b')
    assert parse_info(lines + b'attnserve:server_info{variant="v"} 1.0\n').variant == "v"


def test_page_with_odd_values() -> None:
    line = rb'attnserve:server_info{model_name="a\"}\\b\nc",variant="x",weight_bits="many"} 1.0'
    assert parse_info(line) == ServerInfo(model_name='a"}\\b\nc', variant="x")
    assert numbers("4.25,8") == [4.25, 8] and numbers("4,") == []


def test_wrong_label_is_shown_and_logged_once(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def logged(start: str) -> list[str]:
        messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
        return [m for m in messages if m.startswith(start)]

    caplog.set_level(logging.INFO, "attnserve")
    with standin() as upstream:
        upstream.runs = SOFTPICK
        models = [entry(upstream.url, variant="softmax", bits=4)]
        with running(models=models) as gateway:
            error = "the label says variant softmax, the server softpick"
            assert known(gateway) == {
                "variant": "softpick",
                "bits": 4,
                "embedding_bits": 8,
                "weight_method": "compressed-tensors",
                "kv_cache_dtype": "bfloat16",
                "kv_budgets": [64, 32],
                "unconfirmed": [],
                "errors": [error],
            }
            health = ask(gateway.url, "GET", "/health")
            assert (health.status, health.json()["models"]["m"]["label_errors"]) == (200, [error])
            assert mismatches(gateway) == 1
            ask(gateway.url, "POST", "/v1/completions", BODY)
            (line,) = request_lines(capsys)
            assert line["variant"] == "softpick"  # the server's, not the label's
            assert gateway.metric("attnserve_completion_tokens_total") == 3

            # A health check later nothing has changed; then the label does, then the server.
            says(upstream, gateway, kv_cache_dtype="float32")
            assert logged("model m: ") == [f"model m: {error}"]
            gateway.apply(models=[entry(upstream.url, variant="softpick", bits=4)])
            assert mismatches(gateway) == 0 and known(gateway)["errors"] == []
            assert logged("model m: ")[1:] == ["model m: labels and servers agree now"]
            says(upstream, gateway, weight_bits="16")
            assert mismatches(gateway) == 1
            assert logged("model m: ")[2:] == ["model m: the label says bits 4, the server 16"]
            assert len(logged("replica says what it runs")) == 3
            text = ask(gateway.url, "GET", "/metrics").body.decode()
    assert 'attnserve_completion_tokens_total{bits="4",model="m",variant="softpick"} 3.0' in text
    assert 'variant="softmax"' not in text


def test_every_name_gets_the_servers_own() -> None:
    """What `make serve` configures: one server, no labels."""
    with standin("m", "other") as upstream:
        upstream.runs = SOFTPICK
        with running(models=[{"name": "*", "replicas": [upstream.url]}]) as gateway:
            assert list(ask(gateway.url, "GET", "/health").json()["models"]) == ["m"]
            assert known(gateway)["variant"] == known(gateway, "other")["variant"] == "softpick"
            ask(gateway.url, "POST", "/v1/completions", BODY)
            ask(gateway.url, "POST", "/v1/completions", {**BODY, "model": "nobody"})
            text = ask(gateway.url, "GET", "/metrics").body.decode()
    labels = 'bits="4",model="m",variant="softpick"'
    assert f"attnserve_completion_tokens_total{{{labels}}} 3.0" in text
    info = 'bits="4",embedding_bits="8",kv_budgets="64,32",kv_cache_dtype="bfloat16",model="m"'
    assert f"attnserve_replica_info{{{info}" in text
    assert 'attnserve_queue_length{bits="4",model="m",variant="softpick"} 0.0' in text
    assert 'model="nobody"' not in text


def test_servers_name_may_have_an_entry_of_its_own() -> None:
    """Beside the one for every name: no sample of the metrics comes twice."""
    with standin("m") as upstream:
        upstream.runs = SOFTPICK
        every = {"name": "*", "replicas": [upstream.url]}
        with running(models=[entry(upstream.url), every]) as gateway:
            assert list(ask(gateway.url, "GET", "/health").json()["models"]) == ["m", "*"]
            lines = ask(gateway.url, "GET", "/metrics").body.decode().splitlines()
    samples = [line.rsplit(" ", 1)[0] for line in lines if line.startswith("attnserve_")]
    assert len(set(samples)) == len(samples)


def test_server_that_says_nothing() -> None:
    with standin() as upstream, running(upstream.url) as gateway:
        assert known(gateway) == {
            "variant": "v",
            "bits": 8,
            "embedding_bits": None,
            "weight_method": None,
            "kv_cache_dtype": None,
            "kv_budgets": None,
            "unconfirmed": ["variant", "bits"],
            "errors": [],
        }
        text = ask(gateway.url, "GET", "/metrics").body.decode()
        assert 'unconfirmed="variant,bits",variant="v",weight_method=""} 1.0' in text
        assert mismatches(gateway) == 0


def test_restart_with_something_else() -> None:
    """The address stays, the process does not; meanwhile nothing is forgotten."""
    with standin() as upstream:
        upstream.runs = SOFTPICK
        with running(models=[entry(upstream.url)]) as gateway:
            assert known(gateway)["bits"] == 4
            upstream.kill()
            wait_for(lambda: gateway.metric("attnserve_replica_healthy{") == 0, "it is down")
            assert gateway.metric('attnserve_replica_info{bits="4"') == 1
            again = StandIn(port=upstream.port)
            again.runs = {**SOFTPICK, "variant": "softmax", "weight_bits": "16"}
            again.start()
            try:
                info = 'attnserve_replica_info{bits="16"'
                wait_for(lambda: gateway.metric(info) == 1, "it is noticed")
                assert known(gateway)["variant"] == "softmax"
            finally:
                again.kill()


def test_comparison_says_what_was_compared() -> None:
    with standin("a", "b") as upstream:
        upstream.runs = SOFTPICK
        models = [{"name": n, "variant": n, "replicas": [upstream.url]} for n in ("a", "b")]
        with running(models=models) as gateway:
            asked = {"reference": "a", "prompt": [1, 2], "max_tokens": 2}
            answer = json.loads(ask(gateway.url, "POST", "/v1/compare", asked).body)
    for name, side in (("a", answer["reference"]), ("b", answer["models"][0])):
        assert (side["variant"], side["bits"], side["kv_budgets"]) == ("softpick", 4, [64, 32])
        assert side["errors"] == [f"the label says variant {name}, the server softpick"]
