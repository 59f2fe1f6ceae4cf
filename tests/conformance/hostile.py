"""Hostile requests and hostile answers: a corpus of both, mutated at random, against one gateway.

Each request goes out on a connection of its own, or after another one on a kept one, and the model
server answers it with one of the hostile answers or a good one; so it does with the gateway's own
requests: health checks, lists of models, comparisons of two models and shadow scoring. Whatever
happens, the gateway must not answer 500, log a traceback, or grow; and /health must answer all the
while.
"""

import asyncio
import gzip
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Thread
from urllib.parse import urlsplit

import psutil

from serving.auth import digest
from tests.servers import Server, free_port
from tests.serving.helpers import configured

SEED = 1
AT_ONCE = 16
LOOK_SECONDS = 0.15
"""How long a client waits for the next bytes of an answer before it hangs up."""
WARM_UP = 2000
"""Requests after which memory may not grow any more."""
GROWTH_MB = 5.0
KEY = "attnserve-" + "k" * 43


def post(body: bytes, *lines: str, path: str = "/v1/completions") -> bytes:
    """Return a POST request; `lines` are further header lines."""
    head = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {KEY}"]
    if not any(line.lower().startswith("content-type") for line in lines):
        head.append("content-type: application/json")
    if not any(line.lower().startswith(("content-length", "transfer")) for line in lines):
        head.append(f"content-length: {len(body)}")
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


def fields(**more: object) -> bytes:
    """Return the body of a completion."""
    return json.dumps({"model": "m", "prompt": "x", "max_tokens": 3, **more}).encode()


GOOD, STREAM = fields(), fields(stream=True)
CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n" % (len(GOOD), GOOD)
TE = "transfer-encoding: chunked"

MESSAGES: list[object] = [
    [], {}, "x", [1], [{}], [{"role": 1, "content": [None]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
]  # fmt: skip

REQUESTS = [
    post(GOOD),
    post(STREAM),
    post(CHAT, path="/v1/chat/completions"),
    post(b'{"model":"m","input":"x"}', path="/v1/embeddings"),
    *(post(body, path="/v1/compare") for body in (
        b'{"models":["m"],"reference":"m","prompt":"x"}',
        b'{"models":["n"],"reference":"m","prompt":"x","max_tokens":2}',
        b'{"models":["n"],"reference":"m","prompt":[1],"max_tokens":2,"generate":false}',
        b'{"models":["m","z"],"reference":"n","messages":[{"role":"u","content":"x"}]}',
        b'{"models":["n"],"reference":"m","prompt":[-1],"top_k":1e9,"temperature":"x"}',
        b'{"models":["n"],"reference":"m","prompt":[1],"logit_bias":%b%b%b}'
        % (b"[" * 800, b" " * 140_000, b"]" * 800),
    )),
    post(GOOD.replace(b'"m"', b'"n"')),
    post(b'{"model":"n","input":["x",[1]],"padding":"max_length"}', path="/v1/embeddings"),
    post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"),
    post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"),
    post(CHUNKED + b"\r\n", TE),
    *(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
      for path in ("/health", "/v1/models", "/v1/models/m", "/playground", "/openapi.json", "/%0")),
    b"OPTIONS /v1/completions HTTP/1.1\r\nhost: x\r\norigin: http://evil.example\r\n"
    b"access-control-request-method: POST\r\n\r\n",
    # Heads
    post(GOOD, *["x-a: b"] * 20000),
    post(GOOD, "x-a: " + "b" * 100_000),
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    post(GOOD)[:60],
    post(GOOD)[:-3],
    post(GOOD, "content-type: text/plain"),
    post(GOOD).replace(b"host: 127.0.0.1", b"host: evil.example"),
    post(GOOD, "upgrade: h2c", "connection: upgrade, http2-settings", "http2-settings: AAMAAABk"),
    post(GOOD, "upgrade: websocket", "connection: upgrade"),
    post(GOOD, f"authorization: Bearer {KEY}x"),
    post(GOOD, "expect: 100-continue"),
    post(GOOD, "x-request-id: " + "\xff" * 20),
    post(GOOD, "connection: close, content-length"),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health\r\n",
    b"HEAD /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    # Where one request ends and the next begins
    post(GOOD, TE, f"content-length: {len(GOOD)}"),
    post(GOOD, f"content-length: {len(GOOD)}", "content-length: 3"),
    post(GOOD, f"content-length: {len(GOOD)}, {len(GOOD)}"),
    post(GOOD, "content-length: -1"),
    post(GOOD, "content-length: +5"),
    post(GOOD, f"content-length: {10**30}"),
    post(GOOD, "content-length: 0x10"),
    post(CHUNKED + b"\r\n", "transfer-encoding: identity, chunked"),
    post(CHUNKED + b"\r\n", "transfer-encoding: xchunked"),
    post(CHUNKED + b"\r\n", "transfer-encoding : chunked"),
    post(CHUNKED + b"\r\n", "transfer-encoding:\r\n chunked"),
    post(CHUNKED + b"authorization: Bearer x\r\nx-b: c\r\n\r\n", TE),
    post(CHUNKED + b"x-a: b\r\n" * 20000 + b"\r\n", TE),
    post(CHUNKED.replace(b"\r\n", b";" + b"e" * 5000 + b"\r\n", 1) + b"\r\n", TE),
    post(CHUNKED.replace(b"\r\n", b"\n") + b"\n", TE),
    post(b"fffffffffffffffff\r\n" + GOOD, TE),
    post(GOOD) * 20,
    post(GOOD).replace(b"\r\n", b"\n"),
    post(GOOD, "x-nul: a\0b"),
    # Bodies
    *(post(body) for body in (
        b"", b"null", b"[]", b"{", b"\xef\xbb\xbf" + GOOD, b"\xff\xfe" + GOOD, b"\x1f\x8b" + GOOD,
        b"[" * 100_000, b'{"a":' * 50_000, fields(prompt=[[]] * 50_000), fields(prompt=[1] * 9000),
        fields(max_tokens="300", n="8"), fields(max_tokens=400.0), fields(max_tokens=10**400),
        fields(max_tokens=True), fields(max_tokens=-1), fields(n=10**9), fields(max_tokens=None),
        fields(max_completion_tokens=1), fields(messages=[]), fields(stream="true"),
        fields(stream=True, stream_options={"continuous_usage_stats": True}),
        fields(stream=True, stream_options=7), fields(prompt=None), fields(prompt={"a": 1}),
        fields(prompt="\ud800"), fields(model="\ud800"), fields(model="x" * 20_000),
        fields(model=["m"]), fields(model="m\n\"'\\\0"), fields(logit_bias={"x": "y"}),
        GOOD.replace(b"3", b"NaN"), GOOD.replace(b"3", b"1e999"), GOOD[:-1] + b',"model":"z"}',
        fields(stream=True)[:-1] + b',"stream_options":{"include_usage":false}}}',
    )),
    *(post(json.dumps({"model": "m", "messages": messages}).encode(), path="/v1/chat/completions")
      for messages in MESSAGES),
]  # fmt: skip


def answer(body: bytes, *lines: str, status: str = "200 OK", framed: bool = True) -> bytes:
    """Return an answer of the model server."""
    head = [f"HTTP/1.1 {status}", *lines]
    if framed and not any(line.startswith(("content-length", "transfer")) for line in lines):
        head.append(f"content-length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def events(*pieces: bytes) -> bytes:
    """Return a stream of pieces, each a chunk of its own."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return answer(chunks + b"0\r\n\r\n", "content-type: text/event-stream", TE)


JSON_LINE = "content-type: application/json"
TOKEN = b'data: {"id":"x","choices":[{"index":0,"text":"t"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ID_TOKEN = b'data: {"choices":[{"text":"t","token_ids":[5],"prompt_token_ids":[1]}]}\n\n'


def whole(**choice: object) -> bytes:
    """Return the body of an answer in one piece."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    return json.dumps({"choices": [{"text": "t", **choice}], "usage": usage}).encode()


def read(*ids: object, **logprob: object) -> bytes:
    """Return what a model says of token ids that it has read."""
    entry = {"logprob": -0.5, "rank": 1, "decoded_token": "t", **logprob}
    return whole(prompt_logprobs=[None, *({str(i): entry, "7": entry} for i in ids)])


WHOLE = whole()
IDS = whole(token_ids=[5], prompt_token_ids=[1])
OK = answer(WHOLE, JSON_LINE)
GOOD_READ = answer(read(5), JSON_LINE)
GOOD_IDS = [answer(IDS, JSON_LINE), events(ID_TOKEN, DONE)]
TOKENIZED = answer(b'{"tokens":[1],"count":1}', JSON_LINE)

ANSWERS = [
    OK,
    events(TOKEN, TOKEN, DONE),
    b"",
    b"\0" * 1000,
    b"HTTP/1.1 200",
    OK[:-5],
    OK + OK,
    OK + b"garbage",
    *(answer(WHOLE, JSON_LINE, status=s)
      for s in ("600 X", "099 X", "0 X", "99999 X", "200", "204 X", "304 X", "101 X", "429 X",
                "500 X", "503 X", "400 X", "302 X")),
    b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + OK,
    answer(WHOLE, JSON_LINE, *["x-a: b"] * 50_000),
    answer(WHOLE, JSON_LINE, "x-a: " + "b" * 1_000_000),
    answer(WHOLE, JSON_LINE, "content-length: 5"),
    answer(WHOLE, JSON_LINE, "content-length: 5", f"content-length: {len(WHOLE)}"),
    answer(WHOLE, JSON_LINE, f"content-length: {10**30}"),
    answer(WHOLE, JSON_LINE, TE),
    answer(WHOLE, JSON_LINE, "content-encoding: gzip"),
    answer(gzip.compress(WHOLE), JSON_LINE, "content-encoding: gzip"),
    answer(WHOLE, JSON_LINE, framed=False),
    answer(TOKEN + TOKEN[:20], "content-type: text/event-stream", framed=False),
    answer(b"[" * 100_000, JSON_LINE),
    answer(b"[" * 100_000, JSON_LINE, status="400 Bad Request"),
    answer(b"\xff" * 100, JSON_LINE),
    answer(b"x" * 5_000_000, JSON_LINE, status="500 X"),
    answer(b'{"usage":{"prompt_tokens":"x","completion_tokens":-1e99}}', JSON_LINE),
    answer(b'{"usage":{"prompt_tokens":-5,"completion_tokens":1e400}}', JSON_LINE),
    answer(b'{"detail":[{"loc":["body"],"msg":"x"}]}', JSON_LINE, status="422 X"),
    answer(b'{"error":{"message":1,"code":[]}}', JSON_LINE, status="400 X"),
    events(TOKEN, b'data: {"error":{"message":"x","code":500}}\n\n', DONE),
    events(b'data: {"error":1}\n\n', DONE),
    events(TOKEN, TOKEN[:20]),
    events(TOKEN, b"data: {\n\n", DONE),
    events(b'data: {"usage":[],"choices":[]}\n\n', b'data: {"usage":{"prompt_tokens":1e999}}\n\n'),
    events(b"x" * 5_000_000),
    events(TOKEN)[:-6],
    events(TOKEN).replace(b"\r\n0\r\n", b"\r\nzz\r\n"),
    events(*[TOKEN] * 2000, DONE),
]  # fmt: skip


READS = [
    GOOD_READ,
    *(answer(body, JSON_LINE) for body in (
        read(), read(5, 5), read("x"), read(10**30), read(5, logprob="NaN"),
        read(5, logprob=1e308), read(5, logprob=None), read(5, decoded_token=["x"]),
        read(5, decoded_token="\ud800"), read(*range(20_000)), whole(prompt_logprobs={}),
        whole(prompt_logprobs=[[]]), whole(prompt_logprobs=[None, None]),
    )),
    answer(b'{"error":{"message":"out of vocabulary","code":400}}', JSON_LINE, status="400 X"),
]  # fmt: skip

TOKENS = [
    TOKENIZED,
    *(answer(body, JSON_LINE) for body in (
        b'{"tokens":[]}', b'{"tokens":"x"}', b'{"tokens":[-1,1e9,true]}', b'{"tokens":null}',
        b'{"tokens":[' + b"1," * 200_000 + b"1]}",
    )),
]  # fmt: skip


def page(*lines: bytes) -> bytes:
    """Return a page of metrics."""
    return answer(b"\n".join((*lines, b"")), "content-type: text/plain")


GOOD_PAGE = page(
    b'vllm:num_requests_waiting{model_name="m"} 0', b'vllm:kv_cache_usage_perc{engine="0"} 0.1',
    b'attnserve:server_info{model_name="m",variant="softpick",weight_bits="16"} 1.0',
)  # fmt: skip
PAGES = [
    GOOD_PAGE,
    page(b"vllm:kv_cache_usage_perc NaN", b"vllm:num_requests_waiting -1e999"),
    page(b"vllm:num_requests_running " + b"9" * 5000),
    page(b'attnserve:server_info{variant="' + b"x" * 5000 + b'",weight_bits="nan"} 1.0'),
    page(b'attnserve:server_info{variant="a\\"b\xff",weight_bits="4,4,x"} 1.0'),
    page(*[b'attnserve:server_info{variant="softmax"} 1.0'] * 5000),
    page(b'vllm:cache_config_info{kv_cache_memory_bytes="' + b"9" * 400 + b'"} 1.0'),
    page(b'vllm:x{model_name="' + b"\\" * 100_000 + b'"} 1'),
    page(b"{" * 300_000),
    page(b"\0" * 300_000),
]


def listed(*entries: object) -> bytes:
    """Return a list of models."""
    return answer(json.dumps({"object": "list", "data": entries}).encode(), JSON_LINE)


GOOD_LIST = listed({"id": "m", "object": "model", "max_model_len": 99}, {"id": "n"})
LISTS = [
    GOOD_LIST,
    listed(*({"id": f"{i}"} for i in range(5000))),
    listed({"id": "m", "max_model_len": -1}, {"id": "n", "max_model_len": 10**40}),
    listed({"id": "\ud800"}),
    listed({"id": "x" * 100_000}),
    listed({"id": None}, {}, [], 7),
    answer(b'{"data":{}}', JSON_LINE),
    answer(b'{"data":[{"id":"m","x":NaN}]}', JSON_LINE),
]
HEALTH = [answer(b""), answer(b"", status="503 X"), answer(b"x" * 100_000), b"HTTP/1.1 200 OK\r\n"]


def answers_to(method: bytes, path: bytes, body: bytes) -> tuple[bytes, list[bytes]]:
    """Return the good answer to a request of the gateway's, and the hostile ones of its kind."""
    if method == b"GET":
        by_path = {b"/metrics": (GOOD_PAGE, PAGES), b"/v1/models": (GOOD_LIST, LISTS)}
        return by_path.get(path, (HEALTH[0], HEALTH))
    if path == b"/tokenize":
        return TOKENIZED, TOKENS
    if b'"prompt_logprobs"' in body:
        return GOOD_READ, READS
    if b'"return_token_ids"' in body:
        return GOOD_IDS[b'"stream": true' in body or b'"stream":true' in body], GOOD_IDS
    return OK, ANSWERS


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return data as it is, or with a few bytes or lines changed, repeated, swapped or cut."""
    for _ in range(chance.choice((0, 0, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[at + chance.randrange(20) :]
            case 2:
                data = (
                    data[:at] + chance.choice((b"\r\n", b"\0", b":", b",", b'"', b"9")) + data[at:]
                )
            case 3:
                lines = data[:5000].split(b"\r\n")
                lines.insert(chance.randrange(len(lines)), chance.choice(lines))
                data = b"\r\n".join(lines) + data[5000:]
            case _:
                data = data[:at]
    return data


@dataclass
class Found:
    """What was seen."""

    sent: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)
    rss_mb: list[tuple[int, float]] = field(default_factory=list)
    """After so many requests, so much."""

    def growth_mb(self) -> float:
        """Return how much more memory is used at the end than after the warm-up, in medians."""
        steady = [mb for sent, mb in self.rss_mb if sent >= WARM_UP]
        part = max(1, len(steady) // 5)
        return median(steady[-part:]) - median(steady[:part]) if steady else 0.0


class ModelServer:
    """Answers most requests, also those of the gateway's own, by one of the hostile answers."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                method, _, path = head.partition(b"\r\n")[0].rpartition(b" ")[0].partition(b" ")
                good, hostile = answers_to(method, path, body)
                data = good
                if self.chance.random() < (0.7 if method == b"POST" else 0.4):
                    kind = hostile if self.chance.random() < 0.7 else ANSWERS
                    data = mutated(self.chance.choice(kind), self.chance)
                writer.write(data)
                await writer.drain()
                if data is not good:
                    return
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass
        finally:
            writer.close()


@contextmanager
def hostile_server(chance: random.Random) -> Iterator[str]:
    """Run the model server in a thread; yield its address."""
    loop, port = asyncio.new_event_loop(), free_port()
    start = asyncio.start_server(ModelServer(chance).handle, "127.0.0.1", port, backlog=1000)
    loop.run_until_complete(start)
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def ask(url: str, data: bytes, found: Found) -> None:
    """Send bytes; read what comes until nothing more does, and note the statuses."""
    host, _, port = urlsplit(url).netloc.partition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError as error:
        found.wrong.append(f"no connection: {error}")
        return
    came = b""
    try:
        writer.write(data)
        while piece := await asyncio.wait_for(reader.read(65536), LOOK_SECONDS):
            came += piece if len(came) < 10**6 else b""
    except (TimeoutError, OSError):
        pass
    finally:
        writer.transport.abort()
    found.sent += 1
    for part in came.split(b"HTTP/1.1 ")[1:]:
        if part[:3].isdigit():
            status = int(part[:3])
            found.statuses[status] = found.statuses.get(status, 0) + 1
            if status == 500 and b"The gateway failed" in part:
                found.wrong.append(f"500 for {data[:300]!r}")


async def watch(gateway: Server, found: Found) -> None:
    """Note the time that /health takes, and the gateway's memory, again and again."""
    process = psutil.Process(gateway.pid)
    request = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
    host, _, port = urlsplit(gateway.url).netloc.partition(":")
    while True:
        began = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            async with asyncio.timeout(10):
                if not (await reader.read()).startswith(b"HTTP/1.1 "):
                    found.wrong.append("/health: no answer")
            writer.close()
        except OSError as error:
            found.wrong.append(f"/health: {error!r}")
        found.health_ms.append((time.perf_counter() - began) * 1000)
        found.rss_mb.append((found.sent, process.memory_info().rss / 2**20))
        await asyncio.sleep(0.2)


async def attack(gateway: Server, requests: int) -> Found:
    """Send so many requests, several at a time."""
    found, chance = Found(), random.Random(SEED)

    async def client() -> None:
        while found.sent < requests:
            first = chance.choice((b"", b"", post(GOOD)))
            await ask(gateway.url, first + mutated(chance.choice(REQUESTS), chance), found)

    watcher = asyncio.create_task(watch(gateway, found))
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    watcher.cancel()
    return found


def hostile(requests: int, log_file: Path) -> Found:
    """Attack a gateway of its own with so many requests; return what was seen."""
    with (
        hostile_server(random.Random(SEED)) as upstream,
        tempfile.TemporaryDirectory(prefix="hostile-") as folder,
    ):
        config = {
            "models": [{"name": name, "replicas": [upstream]} for name in ("m", "n", "*")],
            "shadow": {"reference": "m", "models": ["n"], "sample": 0.5, "max_concurrent": 4},
            "health": {"every": 0.1},
            "keys": [{"name": "k", "sha256": digest(KEY)}],
            "timeouts": {"body": 2, "read": 2, "connect": 2},
            "breaker": {"failures": 10**6},
        }  # fmt: skip
        with configured(Path(folder), config) as gateway:
            found = asyncio.run(attack(gateway, requests))
            log = gateway.log()
    log_file.write_text(log)
    for line in log.splitlines():
        if "Traceback" in line or '"level": "critical"' in line:
            found.wrong.append(f"{line[:100]} ... {line[-300:]}")
    if found.growth_mb() > GROWTH_MB:
        found.wrong.append(f"memory grew by {found.growth_mb():.1f} MB")
    return found
