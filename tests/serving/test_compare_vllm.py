"""/v1/compare and shadow scoring on two real vLLM servers, against references of both models: the
float64 formulas, read token by token."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference_model import ReferenceModel
from tests.servers import Server, vllm_server
from tests.serving.helpers import HttpAnswer, Running, ask, error_of, leave, open_request, running
from tests.serving.standin import standin, wait_for

pytestmark = pytest.mark.slow  # two vLLM servers

ROOT = Path(__file__).parents[2]
NAMES = ("softpick", "softmax")
PROMPT = "It was the best of times,"
TOP_K = 8
TOLERANCE = 1e-3
"""Of a logprob: float32 against float64."""


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """Two of the bundled checkpoints in float32, which start at the same time."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def start(name: str) -> Server:
        args = (f"--served-model-name={name}", "--dtype=float32", f"--chat-template={template}")
        return stack.enter_context(vllm_server(ROOT / "checkpoints" / name, *args))

    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield dict(zip(NAMES, pool.map(start, NAMES), strict=True))


@pytest.fixture(scope="module")
def gateway(servers: dict[str, Server]) -> Iterator[Running]:
    """Yield a gateway in front of both."""
    with running(models=entries(servers)) as gateway:
        yield gateway


def entries(servers: dict[str, Server]) -> list[dict[str, Any]]:
    """Return the gateway's models."""
    return [{"name": n, "variant": n, "replicas": [s.url]} for n, s in servers.items()]


def compare(gateway: Running, **fields: Any) -> HttpAnswer:
    """One comparison, greedy."""
    body = {"reference": "softpick", "prompt": PROMPT, "temperature": 0, "top_k": TOP_K, **fields}
    return ask(gateway.url, "POST", "/v1/compare", body)


def expected(name: str, ids: list[int], start: int) -> Tensor:
    """Logprobs `[tokens, vocab_size]` of every token at the places of `ids[start:]`, float64."""
    model = ReferenceModel(ROOT / "checkpoints" / name)
    logits = torch.stack([model.read(id) for id in ids[:-1]])
    return logits[start - 1 :].log_softmax(-1)


def merged(logprobs: Tensor, named: list[int]) -> Tensor:
    """Probabilities of the named tokens, and of all others together."""
    p = logprobs.exp()
    rest = p.sum() - p[named].sum()
    return torch.cat([p[named], rest[None]])


def test_figures_are_those_of_the_reference(gateway: Running) -> None:
    answer = compare(gateway, max_tokens=16).json()
    prompt, reference, (model,) = (answer[k] for k in ("prompt_token_ids", "reference", "models"))
    written = [t["id"] for t in reference["tokens"]]
    assert len(written) == 16 and written == reference["generation"]["token_ids"]
    assert "".join(t["token"] for t in reference["tokens"]) == reference["generation"]["text"]
    p, q = (expected(name, prompt + written, len(prompt)) for name in NAMES)

    both = zip(reference["tokens"], model["tokens"], strict=True)
    for i, (token, other) in enumerate(both):
        id = token["id"]
        assert token["logprob"] == pytest.approx(p[i, id].item(), abs=TOLERANCE)
        assert other["logprob"] == pytest.approx(q[i, id].item(), abs=TOLERANCE)
        assert other["delta"] == pytest.approx((q - p)[i, id].item(), abs=TOLERANCE)
        for told, truth in ((token["top"], p[i]), (other["top"], q[i])):
            logprobs = torch.tensor([t["logprob"] for t in told], dtype=torch.float64)
            ids = [t["id"] for t in told]
            torch.testing.assert_close(logprobs, truth[ids], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(logprobs, truth.topk(TOP_K).values, rtol=0, atol=TOLERANCE)
        named = [{id, *(t["id"] for t in told["top"])} for told in (token, other)]
        shared = sorted(named[0] & named[1])
        a, b = merged(p[i], shared), merged(q[i], shared)
        assert other["kl"] == pytest.approx((a * (a / b).log()).sum().item(), abs=TOLERANCE)
        assert other["coverage"] == pytest.approx(a[:-1].sum().item(), abs=TOLERANCE)
        whole = (p[i].exp() * (p[i] - q[i])).sum().item()
        assert other["kl"] <= whole + TOLERANCE
        assert other["agrees"] == (p[i].argmax() == q[i].argmax()).item()

    summary = model["summary"]
    agrees = [t["agrees"] for t in model["tokens"]]
    assert 0 < sum(agrees) < 16, "a test of agreement needs both cases"
    assert summary["first_divergence"] == agrees.index(False)
    assert summary["agreement"] == sum(agrees) / 16
    assert summary["delta_sum"] == pytest.approx(sum(t["delta"] for t in model["tokens"]))
    assert summary["mean_kl"] == pytest.approx(sum(t["kl"] for t in model["tokens"]) / 16)
    # Greedy: a model's own text parts from the reference's where it finds another token likelier.
    assert model["generation"]["first_difference"] == summary["first_divergence"]
    assert len(model["generation"]["token_ids"]) == 16
    for side in (reference, model):
        times = side["generation"]
        assert 0 < times["ttft_ms"] < times["duration_ms"]
        assert side["score_ms"] > 0
        if times["itl_ms"] is not None:  # on a busy machine all tokens may come in one piece
            assert 0 < times["itl_ms"] <= times["itl_max_ms"]
        # Keys and values of 4 layers with 4 heads of 64 dims, in float32; a context of 512 tokens.
        assert side["kv"]["bytes_per_token"] == 2 * 4 * 4 * 64 * 4
        assert side["kv"]["bytes_per_request"] == 512 * side["kv"]["bytes_per_token"]


def test_a_model_is_no_different_from_itself(gateway: Running) -> None:
    sampling = {"temperature": 1.0, "seed": 5}
    (model,) = compare(gateway, models=["softpick"], max_tokens=32, **sampling).json()["models"]
    assert model["summary"]["agreement"] == 1
    assert model["summary"]["max_kl"] < 1e-5
    assert max(abs(t["delta"]) for t in model["tokens"]) < 1e-4
    assert model["generation"]["first_difference"] is None


def test_the_reference_is_the_one_that_writes(gateway: Running) -> None:
    """Messages, through its template; and the same as token ids."""
    messages = [{"role": "user", "content": PROMPT}]
    fields = {"reference": "softmax", "max_tokens": 4, "generate": False}
    body = {**fields, "prompt": None, "messages": messages}
    first = compare(gateway, **body).json()
    again = compare(gateway, **fields, prompt=first["prompt_token_ids"]).json()
    assert first["reference"]["model"] == "softmax"
    assert [m["model"] for m in first["models"]] == ["softpick"]
    assert first["models"][0]["generation"] is None
    for side in ("reference", "models"):
        for answer in (first, again):
            one = answer[side] if side == "reference" else answer[side][0]
            assert len(one["tokens"]) == 4
    assert first["reference"]["generation"]["text"] == again["reference"]["generation"]["text"]
    assert first["models"][0]["summary"] == again["models"][0]["summary"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_k": 21}, ": Requested prompt logprobs of 21"),
        ({"max_tokens": 600}, "softpick: "),
        ({"prompt": [5, 3000]}, "softpick: Token id 3000 is out of vocabulary"),
        ({"temperature": -1}, "softpick: temperature must be non-negative"),
    ],
)
def test_what_the_servers_refuse(gateway: Running, fields: dict[str, Any], said: str) -> None:
    answer = compare(gateway, **fields)
    assert answer.status == 400
    assert said in error_of(answer)["message"]


def test_another_vocabulary_is_refused(servers: dict[str, Server]) -> None:
    with standin("other") as other:
        models = [*entries(servers), {"name": "other", "replicas": [other.url]}]
        with running(models=models) as gateway:
            answer = compare(gateway, models=["softmax", "other"], max_tokens=4)
    error = error_of(answer)
    assert (answer.status, error["code"]) == (400, "vocabulary_mismatch")
    assert error["message"].startswith("other has another vocabulary than softpick")


def test_client_that_leaves_frees_the_server(gateway: Running, servers: dict[str, Server]) -> None:
    def busy() -> float:
        page = ask(servers["softpick"].url, "GET", "/metrics").body.decode().splitlines()
        starts = "vllm:num_requests_running{", "vllm:num_requests_waiting{"
        return sum(float(line.rsplit(" ", 1)[1]) for line in page if line.startswith(starts))

    body = {"reference": "softpick", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
    client = open_request(gateway.url, body, path="/v1/compare")
    wait_for(lambda: busy() == 1, "it writes")
    leave(client)
    stage = 'attnserve_aborts_total{bits="32",model="softpick",stage="whole"'
    wait_for(lambda: gateway.metric(stage) == 1, "the gateway has noticed")
    wait_for(lambda: busy() == 0, "vLLM has stopped", seconds=5)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_shadow_scoring(servers: dict[str, Server], path: str, stream: bool) -> None:
    """The client's answer is the same with it, and its figures are those of a comparison."""
    asked = (
        {"messages": [{"role": "user", "content": PROMPT}]}
        if "chat" in path
        else {"prompt": PROMPT}
    )
    body = {"model": "softpick", **asked, "max_tokens": 12, "temperature": 0, "stream": stream}
    shadow = {"reference": "softpick", "models": ["softmax"], "sample": 1, "top_k": TOP_K}
    with running(models=entries(servers)) as gateway:
        expected = ask(gateway.url, "POST", path, body)
        fields = {"prompt": None, **asked, "max_tokens": 12, "generate": False}
        compared = compare(gateway, **fields).json()
    with running(models=entries(servers), shadow=shadow) as gateway:
        answer = ask(gateway.url, "POST", path, body)
        read = 'attnserve_shadow_answers_total{bits="32",model="softmax",result="read"'
        wait_for(lambda: gateway.metric(read) == 1, "it has been read")
        names = ("kl_count", "kl_sum", "tokens_total", "disagreements_total")
        figures = {name: gateway.metric(f"attnserve_shadow_{name}{{") for name in names}
        bucket = 'attnserve_shadow_logprob_delta_bucket{bits="32",le="-0.3"'
        below = gateway.metric(bucket)
    assert events(answer.body) == events(expected.body)
    assert answer.status == 200
    (model,) = compared["models"]
    summary = model["summary"]
    assert figures["kl_count"] == figures["tokens_total"] == summary["tokens"] == 12
    assert figures["kl_sum"] == pytest.approx(summary["mean_kl"] * 12, abs=TOLERANCE)
    assert below == sum(t["delta"] <= -0.3 for t in model["tokens"])
    assert figures["disagreements_total"] == sum(not t["agrees"] for t in model["tokens"])


def events(body: bytes) -> list[Any]:
    """Return an answer's JSON objects without what differs from request to request, and with
    successive texts of a stream as one: vLLM sends several tokens at once when it is behind."""
    lines = body.decode().split("\n\n") if body.startswith(b"data: ") else [body.decode()]
    found: list[Any] = []
    for line in lines:
        if not (text := line.removeprefix("data: ")).startswith("{"):
            continue
        event = json.loads(text)
        del event["id"], event["created"]
        choice = event["choices"][0]
        part = choice.get("delta", choice)
        key = "content" if "delta" in choice else "text"
        last = found[-1]["choices"][0] if found else {}
        before = last.get("delta", last)
        if part.keys() == before.keys() and "message" not in part:
            part[key] = before[key] + part[key]
            found.pop()
        found.append(event)
    return found
