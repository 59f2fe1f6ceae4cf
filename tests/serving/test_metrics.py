"""Metrics, logs and traces: what was counted by real requests, and a dashboard that asks for it."""

import http.server
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Theirs
from prometheus_client.parser import text_string_to_metric_families

from serving.auth import digest, new_key
from serving.compare.kl import Drift
from serving.compare.shadow import observe
from serving.observability.histogram import Histogram
from serving.observability.logging import JsonLines
from serving.observability.metrics import MAX_MODELS, SECONDS, Metrics
from tests.serving.helpers import (
    Running,
    ask,
    configured,
    leave,
    open_request,
    request_lines,
    running,
)
from tests.serving.standin import standin, wait_for

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docker/grafana/attnserve.json").read_text())
BODY = {"model": "m", "prompt": "x", "max_tokens": 3}


@pytest.fixture(scope="module")
def used() -> Iterator[Running]:
    """Yield a gateway that has seen everything once: streams, aborts, retries, errors, a key."""
    key = new_key()
    keys = [{"name": "alice", "sha256": digest(key)}]
    routing = {"policy": "least_loaded"}
    with standin() as bad, standin() as good:
        bad.kv_usage = good.kv_usage = 0.25
        bad.kv_bytes = good.kv_bytes = 4096
        with running(bad.url, good.url, keys=keys, routing=routing) as gateway:
            bearer = {"authorization": f"Bearer {key}"}
            ask(gateway.url, "POST", "/v1/completions", BODY, **bearer)
            ask(gateway.url, "POST", "/v1/completions", {**BODY, "stream": True}, **bearer)
            bad.status = 503
            ask(gateway.url, "POST", "/v1/completions", BODY, **bearer)
            ask(gateway.url, "POST", "/v1/completions", {**BODY, "model": "q"}, **bearer)
            good.before_s = bad.before_s = 60.0
            bad.status = 200
            held = open_request(gateway.url, BODY, **bearer)
            wait_for(lambda: good.running + bad.running == 1, "it runs")
            leave(held)
            wait_for(lambda: gateway.metric("attnserve_aborts_total{") == 1, "it has left")
            metrics = gateway.state.metrics
            metrics.reloads.labels("used")  # nothing is reloaded here, nor read by other models
            metrics.shadow_answers.labels("m", "v", "8", "busy")
            observe(metrics, ("m", "v", "8"), [Drift(0.0, 0.0, 1.0, agrees=True)])
            yield gateway


def families(gateway: Running) -> dict[str, Any]:
    """Return the metrics by their names, parsed by Prometheus' own parser."""
    text = ask(gateway.url, "GET", "/metrics").body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_counts(used: Running) -> None:
    m = 'bits="8",model="m"'
    for line, value in {
        f'attnserve_requests_total{{{m},route="/v1/completions",status="200",variant="v"}}': 3,
        f'attnserve_requests_total{{{m},route="/v1/completions",status="499",variant="v"}}': 1,
        f'attnserve_prompt_tokens_total{{{m},variant="v"}}': 7 * 3 + 1,
        f'attnserve_completion_tokens_total{{{m},variant="v"}}': 3 * 3,
        f'attnserve_time_to_first_token_seconds_count{{{m},variant="v"}}': 1,
        f'attnserve_request_duration_seconds_count{{{m},variant="v"}}': 4,
        f'attnserve_queue_seconds_count{{{m},variant="v"}}': 4,
        f'attnserve_aborts_total{{{m},stage="whole",variant="v"}}': 1,
        f'attnserve_retries_total{{{m},reason="unavailable",variant="v"}}': 1,
        f'attnserve_upstream_errors_total{{{m},reason="unavailable",variant="v"}}': 1,
        'attnserve_errors_total{bits="",code="model_not_found",model="",variant=""}': 1,
        'attnserve_key_requests_total{key="alice"}': 5,
        'attnserve_key_tokens_total{key="alice"}': 10 * 3 + 1,
        "attnserve_replica_healthy{": 2,
        "attnserve_replica_kv_cache_usage_ratio{": 0.5,
        "attnserve_replica_kv_cache_used_bytes{": 2048,
        "attnserve_replica_kv_cache_size_bytes{": 8192,
    }.items():
        assert used.metric(line) == value, line


def expressions() -> list[str]:
    """Every query of the dashboard, of panels and of variables."""
    found = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    return found + [v["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]


def test_dashboard_asks_for_what_exists_and_shows_all_of_it(used: Running) -> None:
    samples = {s.name: s for f in families(used).values() for s in f.samples}
    asked = set()
    for expression in expressions():
        for name, labels in re.findall(
            r"\b((?:attnserve|process)_\w+)(?:\{([^}]*)\})?", expression
        ):
            assert name in samples, f"{expression}: there is no {name}"
            asked.add(name)
            for label in re.findall(r"(\w+)=~", labels):
                assert label == "job" or label in samples[name].labels, expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            (name,) = re.findall(r"\battnserve_\w+", expression)
            assert set(by.split(", ")) <= set(samples[name].labels), expression
    own = {n.removesuffix("_total").removesuffix("_bucket") for n in asked}
    missing = {n for n in families(used) if n.startswith("attnserve_")} - own
    assert not missing, f"the dashboard shows nothing of {missing}"


def test_docs_name_every_metric(used: Running) -> None:
    text = (ROOT / "docs/GATEWAY.md").read_text()
    for name in families(used):
        assert name.startswith("process_") or f"`{name}" in text


def every(url: str) -> dict[str, Any]:
    """Return an entry for every name."""
    return {"name": "*", "replicas": [url]}


def test_names_that_nobody_serves_make_no_metrics() -> None:
    with standin("m") as upstream, running(models=[every(upstream.url)]) as gateway:
        for name in ("m", "x", "y"):
            ask(gateway.url, "POST", "/v1/completions", {**BODY, "model": name})
        text = ask(gateway.url, "GET", "/metrics").body.decode()
    assert 'model="m"' in text and 'model="*"' in text
    assert 'model="x"' not in text and 'model="y"' not in text


def test_labels_without_end_have_an_end() -> None:
    """Of a server that says another variant each time."""
    metrics = Metrics()
    for i in range(MAX_MODELS + 100):
        metrics.of_model(("m", f"variant-{i}", "4")).requests("/v1/completions", 200).inc()
    page = generate_latest(metrics.registry).decode().splitlines()
    counts = [line for line in page if line.startswith("attnserve_requests_total{")]
    assert len(counts) == MAX_MODELS + 1
    other = next(line for line in counts if 'model="*"' in line)
    assert float(other.rpartition(" ")[2]) == 100


def test_histogram_is_prometheus_own() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    a = Histogram("h", "text", ("l",), SECONDS, ours).labels("x")
    b = Theirs("h", "text", ["l"], buckets=SECONDS, registry=theirs).labels("x")
    for value in (0.0, 0.001, 0.0011, 0.3, 300.0, 1e6):
        a.observe(value)
        b.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_log_line_of_a_request(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "attnserve")
    with standin() as upstream, running(upstream.url) as gateway:
        body = {**BODY, "stream": True}
        ask(gateway.url, "POST", "/v1/completions", body, x_request_id="my-id")
        (line,) = request_lines(capsys)
    times = {k: line.pop(k) for k in ("time", "queue_ms", "ttft_ms", "duration_ms")}
    assert line == {
        "level": "info",
        "message": "request",
        "request_id": "my-id",
        "route": "/v1/completions",
        "model": "m",
        "variant": "v",
        "bits": 8.0,
        "replica": upstream.url,
        "status": 200,
        "prompt_tokens": 7,
        "completion_tokens": 3,
    }
    assert 0 <= times["queue_ms"] <= times["ttft_ms"] <= times["duration_ms"]


def test_what_a_library_puts_on_every_record_is_not_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Marked(logging.LogRecord):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.marked = "by a library"

    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    logging.setLogRecordFactory(Marked)
    record = logging.makeLogRecord({"request_id": "mine"})
    assert "by a library" in vars(record).values()
    line = json.loads(JsonLines().format(record))
    assert line["request_id"] == "mine"
    assert "marked" not in line


def test_stderr_is_json_lines(tmp_path: Path) -> None:
    with standin() as upstream:
        config = {"models": [{"name": "m", "replicas": [upstream.url]}]}
        with configured(tmp_path, config) as gateway:
            ask(gateway.url, "POST", "/v1/completions", BODY)
            wait_for(lambda: '"message": "request"' in gateway.log(), "it is logged")
            lines = [json.loads(line) for line in gateway.log().splitlines()]
    assert all({"time", "level", "message"} <= set(line) for line in lines)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces, as OpenTelemetry's collector does."""

    taken: list[bytes]

    def do_POST(self) -> None:
        self.taken.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_traces(tmp_path: Path) -> None:
    """Under the client's trace, with the upstream below; OpenTelemetry is installed with vLLM."""
    trace_service = pytest.importorskip(
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
        reason="OpenTelemetry's OTLP exporter is not installed",
    )
    Collector.taken = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with standin() as upstream:
        config = {"models": [{"name": "m", "variant": "v", "replicas": [upstream.url]}]}
        with configured(tmp_path, config, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as gateway:
            header = {"traceparent": f"00-{trace}-{parent}-01"}
            assert ask(gateway.url, "POST", "/v1/completions", BODY, **header).status == 200
    server.shutdown()  # the gateway has sent what it had when it ended
    server.server_close()
    (taken,) = Collector.taken
    found = trace_service.ExportTraceServiceRequest.FromString(taken)
    (span,) = found.resource_spans[0].scope_spans[0].spans
    assert (span.name, span.trace_id.hex()) == ("POST /v1/completions", trace)
    assert span.parent_span_id.hex() == parent
    assert {a.key: a.value.string_value for a in span.attributes}["attnserve.variant"] == "v"
    sent = upstream.seen[0]["headers"]["traceparent"]
    assert sent == f"00-{trace}-{span.span_id.hex()}-01"
