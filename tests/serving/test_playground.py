"""The web page, in a real browser, in front of real gateways."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from serving.auth import digest, new_key
from serving.playground import FOLDER
from tests.servers import Server
from tests.serving.helpers import MODEL, Running, ask, error_of, running
from tests.serving.standin import StandIn, standin, wait_for

pytestmark = pytest.mark.integration  # a browser

EVIL = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"


def piece(text: str, *tokens: tuple[str, float]) -> dict[str, Any]:
    """Return a choice of a streamed completion, in vLLM's shape."""
    logprobs = {
        "tokens": [token for token, _ in tokens],
        "token_logprobs": [logprob for _, logprob in tokens],
        "top_logprobs": [{token: logprob, "<b>other": -2.5} for token, logprob in tokens],
        "text_offset": [0] * len(tokens),
    }
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}


class Talker(StandIn):
    """A model server that says what a test decides, one event for each piece."""

    says: tuple[dict[str, Any], ...] = ()

    async def _stream(self, _: Any, body: Any, tokens: int, usage: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        end = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
        for choice in (*self.says, end):
            data = f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.sleep(self.between_s)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@pytest.fixture
def talker() -> Iterator[Talker]:
    """One that runs, with two models."""
    server = Talker("a", "b")
    server.says = tuple(piece(f" {i}", (f" {i}", -0.01 * i * i)) for i in range(30))
    server.start()
    yield server
    if server.thread.is_alive():
        server.kill()


def entries(server: StandIn) -> list[dict[str, Any]]:
    """Return the models of a server, for a gateway's configuration."""
    return [
        {"name": name, "variant": f"v{i}", "bits": 16 >> i, "replicas": [server.url]}
        for i, name in enumerate(server.models)
    ]


class BrowserPage:
    """The page of a gateway, open in the browser."""

    def __init__(self, browser: webdriver.Chrome, gateway: Running | Server) -> None:
        self.browser = browser
        browser.get(gateway.url)
        self.wait("the models are there", lambda: "…" not in self["model-list"].text)

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def all(self, css: str) -> list[WebElement]:
        """Return the elements that a selector finds."""
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        """Their texts, as of one moment."""
        code = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        found: list[str] = self.browser.execute_script(code, css)
        return found

    def wait(self, what: str, condition: Any) -> None:
        """Wait until `condition` holds."""
        wait_for(condition, what)

    def js(self, code: str) -> Any:
        """Return the value of a JavaScript function's body."""
        return self.browser.execute_script(code)

    def run(self, *states: str) -> None:
        """Press Run, and wait until the columns say these."""
        self["run"].click()
        self.wait(f"{states}", lambda: self.texts(".state") == list(states))


@contextmanager
def opened(
    browser: webdriver.Chrome, complaints: str | None = None, **config: Any
) -> Iterator[tuple[BrowserPage, Running]]:
    """Yield the page of a gateway. The browser may complain of nothing but `complaints`."""
    with running(**config) as gateway:
        browser.get_log("browser")  # which forgets what it has told
        page = BrowserPage(browser, gateway)
        yield page, gateway
        said = [entry["message"] for entry in browser.get_log("browser")]
        assert [m for m in said if complaints is None or not re.search(complaints, m)] == []
        browser.get("about:blank")


def test_files_need_nothing_else_and_may_do_nothing_else() -> None:
    with running("http://127.0.0.1:1", keys=[{"name": "k", "sha256": digest("x")}]) as gateway:
        assert ask(gateway.url, "GET", "/").headers["location"] == "playground"
        page = ask(gateway.url, "GET", "/playground")  # without a key
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        files = [f for f in FOLDER.iterdir() if f.suffix in (".html", ".js", ".css")]
        assert len(files) > 2
        for file in files:
            answer = ask(gateway.url, "GET", f"/playground/{file.name}")
            assert (answer.status, answer.body) == (200, file.read_bytes())
            assert answer.headers["x-content-type-options"] == "nosniff"
            text = file.read_text()
            assert not re.search(r"https?:|//\w+\.|innerHTML|outerHTML|insertAdjacent|eval\(", text)
        for other in ("__init__.py", "nothing.js", "..%2fapp.py"):
            assert ask(gateway.url, "GET", f"/playground/{other}").status == 404


def test_switched_off() -> None:
    with running("http://127.0.0.1:1", playground=False) as gateway:
        for path in ("/", "/playground", "/playground/playground.js"):
            answer = ask(gateway.url, "GET", path)
            assert (answer.status, error_of(answer)["code"]) == (404, "unknown_url")


def test_streams_side_by_side(browser: webdriver.Chrome, talker: Talker) -> None:
    with opened(browser, models=entries(talker)) as (page, _):
        assert page.texts("#model-list label") == ["av016 bitsunconfirmed", "bv18 bitsunconfirmed"]
        page["prompt"].clear()
        page["prompt"].send_keys("Once", Keys.CONTROL, Keys.ENTER)
        page.wait("both end", lambda: page.texts(".state") == ["done (length)"] * 2)
        body = talker.seen[0]["body"]
        assert (body["prompt"], body["max_tokens"], body["logprobs"]) == ("Once", 64, 5)
        assert page.texts("h2") == ["av016 bitsunconfirmed", "bv18 bitsunconfirmed"]
        assert page.texts(".answer") == ["".join(f" {i}" for i in range(30))] * 2

        # exp(-0.01 i^2) falls below 0.5 at 9, 0.2 at 13, 0.05 at 18, 0.01 at 22, 0.001 at 27.
        classes = [t.get_attribute("class") for t in page.all(".column:first-child .token")]
        levels = [0] * 9 + [1] * 4 + [2] * 5 + [3] * 4 + [4] * 5 + [5] * 3
        assert classes == [f"token p{level}" for level in levels]
        title = page.all(".answer .token")[10].get_attribute("title")
        assert title is not None
        assert title.splitlines()[0] == '" 10"  logprob -1.000 (36.8 %)'
        assert title.splitlines()[-1].split() == ["8.21", "%", '"<b>other"']
        names = page.texts(".column:first-child dt")
        figures = dict(zip(names, page.texts(".column:first-child dd"), strict=True))
        assert re.fullmatch(r"[\d.]+ ms", figures["TTFT"]) and float(figures["tokens/s"]) > 0
        assert (figures["tokens"], figures["mean logprob"]) == ("30", "-2.852")

        # The same without a pointer.
        answer = page.all(".answer")[0]
        answer.send_keys(Keys.ARROW_RIGHT * 3, Keys.ARROW_LEFT)
        assert page.texts(".chosen") == [" 1"]
        assert page.texts(".detail")[0].startswith('" 1"  logprob -0.010 (99.0 %)')


def test_what_a_server_runs(browser: webdriver.Chrome, talker: Talker) -> None:
    """What it says, with the labels that say something else; as of each run, and in the strip."""
    told = {"variant": "v0", "weight_bits": "2,4", "kv_cache_dtype": "fp8", "kv_budgets": "64,32"}
    talker.runs = told
    with opened(browser, models=entries(talker)) as (page, _):
        shown = "2, 4 bitsKV fp8KV budgets 32–64"
        a = ["the label says bits 16, the server 2,4"]
        b = ["the label says variant v1, the server v0", "the label says bits 8, the server 2,4"]
        assert page.texts("#model-list label") == ["av0" + shown + a[0], "bv0" + shown + "".join(b)]
        assert page.texts("#model-list .error") == [*a, *b]
        page.wait(
            "the strip shows it",
            lambda: page.texts("#replicas .error") == ["wrong label: it runs v0, 2,4 bits"],
        )
        talker.runs = {**told, "weight_bits": "16"}
        page.wait("it is noticed", lambda: page.texts("#replicas .error")[0].endswith("16 bits"))
        page.run("done (length)", "done (length)")
        assert page.texts("h2")[0] == "av016 bitsKV fp8KV budgets 32–64"


def test_characters_of_several_tokens(browser: webdriver.Chrome, talker: Talker) -> None:
    """vLLM sends their text with the last token, or with the one that they break off at."""
    talker.says = (
        piece("", ("", -3.0)),
        piece("é", ("é", -0.5)),
        piece("\n x", ("\n", -0.1), (" x", -0.2)),
        piece("", ("", -1.0)),
        piece("\ufffdet", ("et", -2.0)),
        piece("", ("</s>", -0.3)),
        piece("", ("", -0.4)),
    )
    with opened(browser, models=entries(talker)[:1]) as (page, _):
        page.run("done (length)")
        texts = ["é", "\n", " x", "\ufffdet", "</s>", "\ufffd"]
        assert page.texts(".answer .token") == texts
        titles = [span.get_attribute("title") or "" for span in page.all(".answer .token")]
        for i, logprob in ((0, "-3.000"), (3, "-2.000")):
            assert logprob in titles[i] and "2 tokens" in titles[i]
        assert titles[5].startswith('"\ufffd"  logprob -0.400')
        assert "newline" in str(page.all(".answer .token")[1].get_attribute("class"))


def test_stop_frees_the_model_servers(browser: webdriver.Chrome, talker: Talker) -> None:
    talker.says *= 100
    talker.between_s = 0.02
    with opened(browser, models=entries(talker)) as (page, gateway):
        page["run"].click()
        page.wait(
            "both stream", lambda: len(page.all(".answer .token")) > 20 and talker.running == 2
        )
        assert not page["run"].is_enabled()
        page["stop"].click()
        wait_for(lambda: talker.aborted == 2, "both are aborted upstream")
        assert page.texts(".state") == ["stopped"] * 2
        assert page["run"].is_enabled() and not page["stop"].is_enabled()
        stage = 'attnserve_aborts_total{bits="16",model="a",stage="mid_stream"'
        assert gateway.metric(stage) == 1


def test_what_models_say_is_never_html(browser: webdriver.Chrome, talker: Talker) -> None:
    talker.models = (EVIL, "b")
    talker.says = (piece(EVIL, (EVIL, -1.0)),)
    with opened(browser, models=entries(talker)) as (page, _):
        page.run("done (length)", "done (length)")
        page.all(".answer .token")[0].click()
        assert EVIL in page.texts("#model-list .model span")
        assert EVIL in page.texts("h2 .name")
        assert page.texts(".answer") == [EVIL] * 2
        # Its JSON in the details, as it would stand in a script.
        assert page.texts(".detail")[0].startswith(json.dumps(EVIL))
        page.wait("the metrics name it", lambda: EVIL in page.texts("#replicas")[0])
        assert not page.all("img, main script, main b")
        assert page.js("return window.pwned") is None


def test_errors_are_the_servers_own_line(browser: webdriver.Chrome, talker: Talker) -> None:
    complaints = r"status of 400|ERR_CONNECTION_REFUSED"
    with opened(browser, complaints, models=entries(talker)) as (page, gateway):
        talker.status = 400
        page.run("400: no", "400: no")
        assert len(page.all(".state.error")) == 2
        talker.status = 200
        page["prompt"].clear()
        page["run"].click()  # a field that must not be empty
        assert page.texts(".state") == ["400: no", "400: no"]
        for box in page.all("#model-list :checked"):
            box.click()
        page["prompt"].send_keys("x")
        page["run"].click()
        assert page["error"].text == "Pick a model."
        gateway.server.should_exit = True
        gateway.thread.join()
        page.all("#model-list input")[0].click()
        page.run("The gateway cannot be reached.")


def test_stream_that_breaks_off(browser: webdriver.Chrome, talker: Talker) -> None:
    talker.says *= 100
    talker.between_s = 0.02
    with opened(browser, models=entries(talker)[:1]) as (page, _):
        page["run"].click()
        page.wait("it streams", lambda: len(page.all(".answer .token")) > 10)
        talker.kill()
        page.wait("it says so", lambda: page.texts(".state.error") != [])
        assert page.texts(".state") == ["The model server broke off its answer."]
        assert len(page.all(".answer .token")) > 10  # what has come stays


def test_compare_on_the_same_tokens(browser: webdriver.Chrome) -> None:
    with standin("a") as a, standin("b") as b:
        a.probabilities, b.probabilities = (0.6, 0.3, 0.1), (0.25, 0.5, 0.1)
        with opened(browser, models=entries(a) + entries(b)) as (page, _):
            page["max-tokens"].clear()
            page["max-tokens"].send_keys("3")
            page.all("#mode option")[1].click()
            wrote, parted = "the reference: it wrote these tokens", "first divergence at token 1"
            page.run(wrote, parted)
            assert page.texts(".answer") == ["t0t1t2"] * 2
            classes = [t.get_attribute("class") for t in page.all(".answer .token")]
            assert classes == ["token p0"] * 3 + ["token m2 diverges"] + ["token m2"] * 2
            title = page.all(".diverges")[1].get_attribute("title")  # the first is the legend's
            assert title is not None
            assert title.startswith(
                '"t0"  logprob -1.386 (25.0 %)\ndelta −0.875 (reference -0.511)'
            )
            figures = dict(zip(page.texts(".figures dt"), page.texts(".figures dd"), strict=True))
            assert (figures["sum of deltas"], figures["top-1 agreement"]) == ("−2.626", "0 %")
            assert page.texts("details .own") == [" 0 1 2"]

            page.all("#reference option")[1].click()
            page.run(wrote, parted)
            assert page.texts("h2 .name") == ["b", "a"]
            assert len(page.all(".answer .d2")) == 3

            a.before_s = 60
            page["run"].click()
            wait_for(lambda: a.running == 1, "the model server works")
            page["stop"].click()
            wait_for(lambda: a.aborted == 1, "it is freed")
            assert page.texts(".state") == ["stopped"] * 2


def test_key(browser: webdriver.Chrome, talker: Talker) -> None:
    key = new_key()
    keys = [{"name": "k", "sha256": digest(key)}]
    config = {"models": entries(talker), "keys": keys, "protect_metrics": True}
    with opened(browser, "status of 401", **config) as (page, _):
        assert page["key-form"].is_displayed()
        assert "API key" in page["error"].text
        page["key"].send_keys("wrong", Keys.ENTER)
        page.wait("it is refused", lambda: "Incorrect API key" in page["error"].text)
        page["key"].send_keys(key, Keys.ENTER)
        page.wait("the models are there", lambda: len(page.all("#model-list input")) == 2)
        assert not page["key-form"].is_displayed() and not page["error"].is_displayed()
        page.run("done (length)", "done (length)")
        page.wait("there are metrics", lambda: page["in-flight"].text == "0")
        assert page.js("return [localStorage.length, document.cookie]") == [0, ""]
        assert key not in page.browser.page_source
        page.browser.refresh()
        page.wait("the tab knows it", lambda: len(page.all("#model-list input")) == 2)
        page["forget"].click()
        page.wait("it is asked for again", lambda: page["key-form"].is_displayed())
        assert page.js("return sessionStorage.length") == 0


def test_live_metrics(browser: webdriver.Chrome, talker: Talker) -> None:
    talker.says *= 100
    talker.between_s, talker.kv_usage, talker.waiting = 0.02, 0.125, 3
    with opened(browser, models=entries(talker)) as (page, gateway):
        page["run"].click()
        page.wait("two are in flight", lambda: page["in-flight"].text == "2")
        page.wait("TTFT is shown", lambda: page["live-ttft"].text.endswith(" ms"))
        assert page.texts("#replicas span") == ["up", "a, b", "KV 12.5 %", "2 running", "3 waiting"]
        page["stop"].click()
        wait_for(lambda: talker.running == 0, "both are aborted")
        talker.kv_usage = 0.5
        page.wait("it follows", lambda: "KV 50.0 %" in page.texts("#replicas span"))
        page.wait("none is in flight", lambda: page["in-flight"].text == "0")
        page.wait("tokens were counted", lambda: float(page["live-rate"].text) > 0)

        def polls() -> float:
            return gateway.metric('attnserve_requests_total{bits="",model="",route="/metrics"')

        seen = page.browser.current_window_handle
        page.browser.switch_to.new_window("tab")
        before = polls()
        page.browser.execute_async_script("setTimeout(arguments[0], 2200)")
        assert polls() == before + 1  # this test's own: nothing polls for a page that is not seen
        page.browser.close()
        page.browser.switch_to.window(seen)
        talker.healthy = False
        page.wait("it polls again", lambda: page.texts("#replicas span")[0] == "down")


CONTRAST = """
const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const back = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return rgb(colour)[3] === 0 ? back(e.parentElement) : rgb(colour);
};
return [...document.querySelectorAll("h1, label, .badge, .token, .state, dt, button, .detail p")]
  .filter((e) => e.checkVisibility() && !e.disabled)
  .map((e) => {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
    return [`${e.tagName} ${e.className}`, (a + 0.05) / (b + 0.05)];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in(browser: webdriver.Chrome, talker: Talker, scheme: str) -> None:
    """WCAG's contrast of 4.5 for text, on a screen of 400 pixels, that need no scrolling aside."""
    talker.says = (*talker.says, piece("x" * 200, ("x" * 200, -1.0)))
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        with opened(browser, models=entries(talker)) as (page, _):
            page.run("done (length)", "done (length)")
            page.all(".answer .token")[0].click()
            assert page.js("return document.documentElement.scrollWidth") == 400
            page.all("#mode option")[1].click()  # with the other legend
            found = page.js(CONTRAST)
            assert {f"SPAN token {c}" for c in ("p5", "m3", "m1", "d0", "d3")} <= {
                n for n, _ in found
            }
            assert [(name, ratio) for name, ratio in found if ratio < 4.5] == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_in_front_of_vllm(browser: webdriver.Chrome, gateway: Server) -> None:
    page = BrowserPage(browser, gateway)
    assert page.texts("#model-list label") == [MODEL]
    page.run("done (length)")
    spans = page.all(".answer .token")
    assert page.texts(".figures dd")[2] == "64" and spans
    assert all(re.match(r'".+"  logprob -', s.get_attribute("title") or "", re.S) for s in spans)
    # vLLM names its five likeliest, and the token itself; two without a text count as one.
    assert len((spans[0].get_attribute("title") or "").splitlines()) in (5, 6, 7)
    assert browser.get_log("browser") == []
