"""What every test gets: no network, and servers that end even when the test run is told to end."""

import importlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ATTNSERVE_CHECKS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What a user has tuned changes no test; benchmarks.gpu_check says which tables its tests read.
os.environ.setdefault("ATTNSERVE_TRITON_CONFIGS", os.devnull)
# Tiny tensors gain nothing from a second thread, and lose much where a server runs beside the test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton decides where a function is defined, so by whichever test imports it first, whether it is
# interpreted. In this process all are, unless TRITON_INTERPRET=0 (`make test-gpu`) says otherwise;
# the programs that tests start decide for themselves.
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    knobs = importlib.import_module("triton.knobs")
    knobs.runtime.interpret = knobs.runtime.interpret  # also without the variable, from now on
    importlib.import_module("triton.language")

# The same examples in each run; HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# The default action ends Python at once and would leave the servers of a test running.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start vLLM through tests/servers.py; others that do so say it."""
    for item in items:
        names = set(vars(getattr(item, "module", item)))
        starters = names & {"vllm_server", "failed_start"}
        fixtures = getattr(item, "fixturenames", ())
        if starters or "upstream" in fixtures:
            item.add_marker("integration")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random Llama checkpoint and its tokenizer."""
    from tests.tiny import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def browser() -> Iterator["Chrome"]:
    """Debian's chromium, without a window."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium not found: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, Service(driver)) as chrome:
        yield chrome


class Commands:
    """Runs commands, functions that typer reads, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def run(self, function: Callable[..., Any], *arguments: object, code: int = 0) -> str:
        """Run a command that must end with an exit code; return its standard output."""
        from attnserve.command import main

        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(function, "the command", [str(argument) for argument in arguments])
        self.printed = self.capsys.readouterr()
        assert (ended.value.code or 0) == code, self.printed.err
        return self.printed.out

    def refused(self, function: Callable[..., Any], *arguments: object, code: int = 2) -> str:
        """Run a command that must refuse its input; return the one line with which it does."""
        assert self.run(function, *arguments, code=code) == ""
        *progress, line = self.printed.err.splitlines()
        assert line.startswith("the command") and not any("Traceback" in text for text in progress)
        return line


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    """Return what runs a command and returns what it prints."""
    return Commands(capsys)
