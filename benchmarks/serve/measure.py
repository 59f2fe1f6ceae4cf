"""`vllm bench serve` against each server in turn."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.cases import Case, CaseServer
from benchmarks.serve.levels import Requests, read
from benchmarks.servers import MODEL, free_port, started, while_alive
from serving.launch.process import HOST, LaunchError, Service


@dataclass(frozen=True)
class Subject:
    """What is measured: a server, directly or through a gateway in front of it."""

    case: Case
    server: CaseServer
    through_gateway: bool = False

    @property
    def name(self) -> str:
        """Of its rows."""
        return self.case.name + (" + gateway" if self.through_gateway else "")


Runs = dict[tuple[str, float], dict[int, Requests]]
"""By a subject's name and the rate, then by the round."""


SLACK = 32
"""Random tokens become text, which may be some tokens longer when it is encoded again."""


def server_of(case: Case, options: argparse.Namespace) -> CaseServer:
    """Its server. Random prompts share no prefix, and a stateful variant has no cache of them: off
    for all."""
    length = options.prompt_len + options.new_tokens + SLACK
    return CaseServer(case, options, f"--max-model-len={length}", "--no-enable-prefix-caching")


def client_command(
    url: str, tokenizer: Path, rate: float, seed: int, result: Path, options: argparse.Namespace
) -> list[str]:
    """The command line of the load: random prompts at random times (Poisson)."""
    o = options
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend=openai"]
    command += [f"--base-url={url}", "--endpoint=/v1/completions", f"--model={MODEL}"]
    command += [f"--tokenizer={tokenizer}", "--dataset-name=random", "--temperature=0"]
    command += [f"--random-input-len={o.prompt_len}", f"--random-output-len={o.new_tokens}"]
    command += [f"--num-prompts={o.requests}", f"--request-rate={rate:g}", f"--seed={seed}"]
    command += ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
    command += [f"--result-dir={result.parent}", f"--result-filename={result.name}"]
    limits = o.levels[0]
    return [*command, "--goodput", f"ttft:{limits.ttft_ms:g}", f"tpot:{limits.tpot_ms:g}"]


@contextlib.asynccontextmanager
async def awake(subject: Subject, options: argparse.Namespace) -> AsyncIterator[str]:
    """The URL of a subject whose processes run. A gateway is started for the turn: one that slept
    would have to find out first that its server is alive."""
    gateway = Service("gateway", free_port(), options.results)
    subject.server.signal(signal.SIGCONT)
    try:
        if not subject.through_gateway:
            yield subject.server.service.url
            return
        port = gateway.url.rpartition(":")[2]
        environment = {"GATEWAY_HOST": HOST, "GATEWAY_PORT": port}
        environment["UPSTREAM_URL"] = subject.server.service.url
        await gateway.start([sys.executable, "-m", "serving"], environment)
        await while_alive([gateway], gateway.ready("/v1/models"))
        yield gateway.url
    finally:
        await gateway.stop()
        subject.server.signal(signal.SIGSTOP)


async def turn(
    subject: Subject, rate: float, seed: int, result: Path, options: argparse.Namespace
) -> Requests:
    """One load on one subject.

    Raises:
        LaunchError: the server, the gateway, the client or a request failed.
    """
    client = Service("client", free_port(), options.results)
    try:
        async with awake(subject, options) as url:
            command = client_command(url, subject.case.ckpt, rate, seed, result, options)
            await client.start(command, {"OMP_NUM_THREADS": "1", "VLLM_PLUGINS": ""})
            assert client.process is not None
            code = await while_alive([subject.server.service], client.process.wait())
            if code:
                raise client.failed(f"ended with exit code {code}", code)
            return read(result)
    finally:
        await client.stop()


async def measure(
    subjects: Sequence[Subject],
    options: argparse.Namespace,
    runs: Runs,
    failed: dict[str, str],
) -> None:
    """All rounds of all rates, the subjects in turn, the order of the turn reversed every other
    round. Who fails is left out from then on.

    Args:
        subjects: to measure.
        options: the command's.
        runs: gets what was measured, as it comes.
        failed: gets the reasons, by subjects' names.
    """

    def fail(subject: Subject, error: LaunchError) -> None:
        failed[subject.name] = str(error)
        print(f"benchmarks.serve: {subject.name} failed: {error}", file=sys.stderr)

    servers = list({id(each.server): each.server for each in subjects}.values())
    async with started(servers, options.start_timeout) as not_started:
        for server in servers:
            if server not in not_started:
                try:  # the first prompt of a length takes longer than others
                    await while_alive(
                        [server.service], server.round([[1] * options.prompt_len] * 2, 4)
                    )
                except LaunchError as error:
                    not_started[server] = error
        for subject in subjects:
            if subject.server in not_started:
                fail(subject, not_started[subject.server])
        total = options.rounds * len(options.request_rates) * len(subjects)
        with tqdm(total=total, unit="load", mininterval=5) as bar:
            for index in range(options.rounds):
                for which, rate in enumerate(options.request_rates):
                    seed = options.seed + index * len(options.request_rates) + which
                    for subject in subjects[:: -1 if index % 2 else 1]:
                        bar.set_description(f"{subject.name}, {rate:g}/s")
                        file = f"{subject.name.replace(' ', '-')}-{rate:g}-{index}.json"
                        result = options.results / file
                        if subject.name not in failed:
                            try:
                                found = await turn(subject, rate, seed, result, options)
                                runs.setdefault((subject.name, rate), {})[index] = found
                            except LaunchError as error:
                                fail(subject, error)
                        bar.update()
