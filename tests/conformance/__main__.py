"""python -m tests.conformance: suites against the gateway; those that others wrote, with real vLLM.

  openai       openai-python's own tests of completions, chat, models and embeddings, out of its
               source distribution; what is deselected is in deselected.yaml, with reasons
  llm-comply   its checks of OpenAI's chat completions: answers against OpenAI's schema, streams
  schemathesis requests made up from the gateway's own OpenAPI document; no answer may be a 500
  hostile      20,000 hostile requests with hostile answers of a model server (hostile.py)

`make conformance` installs them (requirements/conformance.txt) beside this file and calls this. Two
vLLM servers with tiny random models start, one for text and images and one for embeddings.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tests.conformance.checkpoint import write_tiny_blip2
from tests.conformance.hostile import hostile
from tests.servers import vllm_server
from tests.serving.helpers import configured
from tests.tiny import write_tiny_llama

HERE = Path(__file__).parent
TOOLS = HERE / ".venv"
Command = list[str | Path]
CHAT_NAMES = ("gpt-6-astra", "gpt-3.5-turbo-instruct", "gpt-5-mini")
"""What the suites call their models; llm-comply checks reasoning only under such a name."""
EMBEDDING_NAME = "text-embedding-3-small"
OPENAI_TESTS = ("test_completions.py", "chat", "test_models.py", "test_embeddings.py")


@dataclass
class Outcome:
    """What a suite said."""

    suite: str
    passed: int
    failed: int
    left_out: int
    seconds: float
    note: str = ""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Run the gateway in front of two real vLLM servers; yield its address."""
    for name in ("chat", "embed"):
        (folder / name).mkdir()
    common = ("--dtype=float32", "--max-num-seqs=16")
    env = {"VLLM_PLUGINS": ""}
    chat = [*common, "--served-model-name", *CHAT_NAMES]
    chat += ["--enable-auto-tool-choice", "--tool-call-parser=xlam"]
    embed = [*common, f"--served-model-name={EMBEDDING_NAME}", "--runner=pooling"]
    embed += ["--convert=embed", '--hf-overrides={"is_matryoshka": true}']
    with (
        vllm_server(write_tiny_blip2(folder / "chat"), *chat, env=env) as talks,
        vllm_server(write_tiny_llama(folder / "embed"), *embed, env=env) as embeds,
    ):
        models = [
            {"name": EMBEDDING_NAME, "replicas": [embeds.url]},
            {"name": "*", "variant": "softmax", "replicas": [talks.url]},
        ]
        with configured(folder, {"models": models}) as gateway:
            yield gateway.url


def deselected() -> list[str]:
    """pytest's names of the tests in deselected.yaml: of both classes, TestX and TestAsyncX."""
    names = []
    for entry in yaml.safe_load((HERE / "deselected.yaml").read_text()):
        for name in entry["tests"]:
            names.append(f"tests/api_resources/{name}")
            if "::TestAsync" not in name:
                names.append(names[-1].replace("::Test", "::TestAsync"))
    return names


def run(command: Command, log: Path, cwd: Path = TOOLS, **env: str) -> tuple[int, str]:
    """Exit code and output, which goes to a file, too."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    log.write_text(done.stdout)
    return done.returncode, done.stdout


def openai_python(url: str, logs: Path) -> Outcome:
    """openai-python's own tests."""
    (source,) = TOOLS.glob("openai-*/")
    names = deselected()
    where = [f"tests/api_resources/{name}" for name in OPENAI_TESTS]
    pytest: Command = [
        TOOLS / "bin/python",
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
    ]
    code, listed = run([*pytest, "-q", "--collect-only", *where], logs / "openai-list.log", source)
    stale = [name for name in names if f"\n{name}" not in f"\n{listed}"]
    if code or stale:
        why = f"deselected, but no test of openai-python: {stale}" if stale else listed[-500:]
        return Outcome("openai", 0, 1, 0, 0.0, why)
    options = [f"--deselect={name}" for name in names]
    code, text = run(
        [*pytest, "-q", "--tb=short", *options, *where],
        logs / "openai.log",
        source,
        TEST_API_BASE_URL=f"{url}/v1",
    )
    passed, failed, left_out = (
        sum(int(n) for n in re.findall(rf"(\d+) (?:{what})", text.splitlines()[-1]))
        for what in ("passed", "failed|errors?", "deselected|skipped")
    )
    return Outcome("openai", passed, failed or int(code != 0), left_out, 0.0)


def llm_comply(url: str, logs: Path) -> Outcome:
    """llm-comply's checks of chat completions."""
    command: Command = [
        TOOLS / "bin/llm-comply",
        "--format=openai-chat",
        f"--base-url={url}/v1",
        "--json",
    ]
    command += ["--api-key=none", f"--model={CHAT_NAMES[-1]}", "--timeout=300"]
    code, text = run(command, logs / "llm-comply.log")
    try:
        found: dict[str, Any] = json.loads(text[text.index("{") :])
    except ValueError:
        return Outcome("llm-comply", 0, 1, 0, 0.0, text[-500:])
    counts = found["summary"]
    notes = [w.removeprefix("[warning] ") for r in found["results"] for w in r.get("warnings", [])]
    failed = counts["failed"] or int(code != 0)
    return Outcome("llm-comply", counts["passed"], failed, counts["skipped"], 0.0, "; ".join(notes))


def schemathesis(url: str, logs: Path) -> Outcome:
    """Send requests by the gateway's own OpenAPI document, for any model, then for served ones."""
    sent = failed = 0
    for name, config in (("any", []), ("served", [f"--config-file={HERE}/schemathesis.toml"])):
        command: Command = [TOOLS / "bin/schemathesis", *config, "run", f"{url}/openapi.json"]
        command += [f"--url={url}", "--checks=not_a_server_error", "--seed=1", "--no-color"]
        command += ["--max-examples=50", "--request-timeout=120"]
        code, text = run(command, logs / f"schemathesis-{name}.log")
        counts = re.search(r"(\d+) generated(?:, (\d+) found)?", text)
        sent += int(counts[1]) if counts else 0
        failed += code != 0
    return Outcome("schemathesis", sent, failed, 0, 0.0, "passed: requests; failed: runs")


def attacked(_: str, logs: Path) -> Outcome:
    """Attack a gateway of its own."""
    found = hostile(20_000, logs / "hostile.log")
    health = f"/health {median(found.health_ms):.1f} ms, at most {max(found.health_ms):.0f}"
    note = f"{health}; memory +{found.growth_mb():.1f} MB; {'; '.join(found.wrong[:3])}"
    wrong = len(found.wrong)
    return Outcome("hostile", found.sent - wrong, wrong, 0, 0.0, note.removesuffix("; "))


SUITES = {
    "openai": openai_python,
    "llm-comply": llm_comply,
    "schemathesis": schemathesis,
    "hostile": attacked,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="which (default: all)")
    parser.add_argument("--url", help="a gateway that runs already (default: start one)")
    parser.add_argument(
        "--log-folder", type=Path, default=Path(".run"), help="the suites' output (default: .run)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.suites) - SUITES.keys():
        parser.error(f"no such suite: {' '.join(sorted(unknown))}; one of {' '.join(SUITES)}")
    options.suites = options.suites or list(SUITES)
    return options


def all_suites(url: str, options: argparse.Namespace) -> list[Outcome]:
    """Run them one after the other."""
    found = []
    for name in options.suites:
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        outcome = SUITES[name](url, options.log_folder)
        outcome.seconds = round(time.monotonic() - began, 1)
        found.append(outcome)
    return found


def main() -> None:
    """Print a table, and as last line one JSON object; exit with 1 if anything failed."""
    options = parse()
    own = options.suites == ["hostile"]
    if not (own or TOOLS.exists()):
        sys.exit("tests.conformance: the suites are not installed; use `make conformance`")
    options.log_folder.mkdir(parents=True, exist_ok=True)
    if options.url or own:
        found = all_suites(options.url, options)
    else:
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            print("starting two vLLM servers ...", file=sys.stderr, flush=True)
            with served(Path(folder)) as url:
                found = all_suites(url, options)
    print(f"{'suite':14}{'passed':>8}{'failed':>8}{'left out':>10}{'seconds':>9}")
    for o in found:
        print(f"{o.suite:14}{o.passed:8}{o.failed:8}{o.left_out:10}{o.seconds:9.1f}  {o.note}")
    failed = sum(o.failed for o in found)
    if failed:
        print(f"what failed is in {options.log_folder}/")
    print(json.dumps({"failed": failed, "suites": [asdict(o) for o in found]}))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
