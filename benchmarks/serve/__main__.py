"""The command of `benchmarks.serve`: its subjects, and how they take turns."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from attnserve.command import INTERRUPTED, AsJson, main, options_of
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.checkpoints import CaseOptions, ServerCase, check_room, variant_of
from benchmarks.options import RequestOptions, ServerOptions
from benchmarks.serve.load import LEVELS, Load, LoadClient, Runs, Subject
from benchmarks.serve.load import level as level_of
from benchmarks.servers import Server, interrupted, started, while_alive
from serving.launch.process import LaunchError

CSV = RESULTS / "serve_cpu.csv"
SLACK = 32
"""Random tokens become text, which may be some tokens longer when it is encoded again."""


@options_of(CaseOptions, RequestOptions, ServerOptions)
def serve(
    context: typer.Context,
    what: CaseOptions,
    gateway: Annotated[
        Literal["none", "one", "all"],
        opt.option("Which are also measured through the gateway. one: the first that is ours."),
    ] = "one",
    no_stock: Annotated[bool, opt.option("No peer of stock vLLM.", "--no-stock")] = False,
    request_rates: Annotated[
        list[float] | None,
        opt.option(
            "Loads in requests/s, inf: all at once (default, without --concurrency: 4 16 inf).",
            min=1e-9,
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        opt.count("Loads, of so many requests at a time, the next when one has ended."),
    ] = None,
    running: Annotated[
        bool, opt.option("Also ask, ten times a second, how many requests run.", "--running")
    ] = False,
    requests: Annotated[int, opt.count("Of each load.")] = 48,
    rounds: Annotated[int, opt.count("Of each case and load.")] = 3,
    level: Annotated[
        list[str] | None,
        opt.option(
            "Limits of a level of service, as NAME=ttft_ms:tpot_ms (default: "
            "interactive=500:30 server=2000:100)."
        ),
    ] = None,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
    *,
    shape: RequestOptions,
    servers: ServerOptions,
) -> int:
    """Measure throughput and latency of `vllm serve` under load.

    Each case is a real server: every checkpoint, packed (--packed) or not, by backend (--backends)
    and type (--dtypes); selective attention with and without budgets (--kv-budgets); directly or
    through this project's gateway (--gateway). The peer is stock vLLM's own CPU attention on the
    first softmax checkpoint; with --backends or --no-stock, the first case. All servers are up at
    once and take turns at `vllm bench serve` (random prompts, Poisson arrivals or --concurrency,
    one seed a round); whoever is not measured is stopped. Ratios are to the peer in the same round:
    tokens/s above 1 are more, TTFT and TPOT below 1 are faster.

      TTFT       time to first token; with --concurrency 1 that of reading a prompt
      TPOT       time per output token after the first, a mean over the request
      ITL        time between two tokens
      goodput    requests/s whose TTFT and TPOT are within a level's limits
      in flight  the most requests that a server ran at once (--running)

    A load meets a level (* in the table) if the 99th percentiles of TTFT and TPOT are within its
    limits. The levels are those of MLPerf Inference for Llama 3.1 8B, which suit a model of a few
    million parameters on two CPU cores; for others give --level. MLPerf asks for 270,336 requests
    for a 99th percentile: with the few of a run here it is little more than the slowest one.

    A case that fails is reported and left out; the others go on, and what was measured is saved
    (also after Ctrl-C). What follows `--` is passed on to `vllm serve`.

        python -m benchmarks.serve --enforce-eager
        python -m quant.quantize checkpoints/softpick w4 --bits 4 --scheme gptq --embeddings 8
        python -m benchmarks.serve --enforce-eager --packed w4 --gateway all

    Backends, packed weights and budgets alone, with requests one at a time or all at once:

        python -m benchmarks.serve --ckpts DIR --backends cpu_attn softmax --concurrency 1 8
        python -m benchmarks.serve --ckpts DIR --packed w4 --dtypes float32 bfloat16 --concurrency 1
        python -m benchmarks.serve --ckpts DIR --no-stock --running --request-rates inf
    """  # fmt: skip
    from benchmarks.serve import rows

    levels = [level_of(text) for text in level or map(str, LEVELS)]
    rates = request_rates or ([] if concurrency else [4.0, 16.0, float("inf")])
    loads = [Load(rate) for rate in rates] + [Load(concurrency=n) for n in concurrency or []]
    cases = what.cases()
    length = shape.length + SLACK
    for case in cases:
        check_room(case.ckpt, length)
    # Random prompts share no prefix, and a stateful variant has no cache of them: off for all.
    vllm_args = [f"--max-model-len={length}", "--no-enable-prefix-caching", *context.args]
    stock = not (no_stock or what.backends)
    subjects = subjects_of(cases, servers, vllm_args, gateway, stock=stock)
    save = results.checked(csv, no_save)
    client = LoadClient(shape, requests, servers.log_folder / "bench-serve", running)
    shutil.rmtree(client.folder, ignore_errors=True)
    client.folder.mkdir(parents=True)
    about = servers.described(requests=requests, **asdict(shape), vllm_args=" ".join(context.args))
    runs: Runs = {}
    failed: dict[str, str] = {}
    work = measure(subjects, client, loads, rounds, runs, failed)
    stopped = interrupted(work, "python -m benchmarks.serve")
    found = rows.rows_of(subjects, loads, levels, runs, failed)
    if found and save is not None:
        title = f"{about['machine']}, {about['cores']} cores, vLLM {about['vllm']}, {about['mode']}"
        rows.plot(save.with_suffix(".png"), title, found, levels)
        results.append_csv(save, about, found)
    most = {each.name: rows.capacity(found, each) for each in levels}
    lines = [rows.table(found, levels)]
    for name, best in most.items():
        met = ", ".join(f"{case} {value:.2f}" for case, value in best.items())
        lines.append(f"most requests/s that met {name}: {met}")
    about["most_requests_per_s"] = most
    results.report(about, found, "\n".join(lines), csv=None, as_json=as_json)
    return INTERRUPTED if stopped else int(bool(failed))


def subjects_of(
    cases: Sequence[ServerCase],
    options: ServerOptions,
    vllm_args: Sequence[str],
    gateway: str,
    *,
    stock: bool = True,
) -> list[Subject]:
    """Return the peer first, if there is one (`stock`), then the cases, each followed by itself
    through the gateway if asked ("none", "one" or "all")."""

    def subject(case: ServerCase) -> Subject:
        server = Server(case.name, case.ckpt, options, *case.arguments(), *vllm_args)
        if case.backend == "cpu_attn" and case.weights == case.dtype and not variant_of(case.ckpt):
            server.environment["VLLM_PLUGINS"] = ""  # vLLM serves it without this project
        return Subject(case, server)

    subjects = []
    if stock:
        plain = [c for c in cases if c.variant == "softmax" and c.weights == c.dtype]
        if not plain:
            raise UserError("stock vLLM needs a softmax checkpoint; give one, or --no-stock")
        for case in (c for c in plain if c.ckpt == plain[0].ckpt):  # in each dtype
            name = case.name.replace(case.ckpt.resolve().name, "stock", 1)
            subjects.append(subject(replace(case, name=name, backend="cpu_attn")))
    for index, case in enumerate(cases):
        direct = subject(case)
        subjects.append(direct)
        if gateway == "all" or (gateway == "one" and index == 0):
            subjects.append(replace(direct, through_gateway=True))
    return subjects


async def measure(
    subjects: Sequence[Subject],
    client: LoadClient,
    loads: Sequence[Load],
    rounds: int,
    runs: Runs,
    failed: dict[str, str],
) -> None:
    """Measure all rounds of all loads, the subjects in turn, the order of the turn reversed every
    other round. Who fails is left out from then on.

    `runs` gets what was measured, as it comes, and `failed` the reasons, by subjects' names.
    """

    def fail(subject: Subject, error: LaunchError) -> None:
        failed[subject.name] = str(error)
        print(f"benchmarks.serve: {subject.name} failed: {error}", file=sys.stderr)

    servers = list({id(each.server): each.server for each in subjects}.values())
    async with started(servers) as not_started:
        for server in servers:
            if server not in not_started:
                warm_up = server.generate([[1] * client.shape.prompt_len] * 2, 4)
                try:  # the first prompt of a length takes longer than others
                    await while_alive(server.service, warm_up)
                except LaunchError as error:
                    not_started[server] = error
        for subject in subjects:
            if subject.server in not_started:
                fail(subject, not_started[subject.server])
        with tqdm(total=rounds * len(loads) * len(subjects), unit="load", mininterval=5) as bar:
            for index in range(rounds):
                for which, load in enumerate(loads):
                    own = client.shape.seed + index * len(loads) + which
                    for subject in subjects[:: -1 if index % 2 else 1]:
                        bar.set_description(f"{subject.name}, {load}")
                        name = f"{subject.name} {load} {index}".translate({32: "-", 47: "-"})
                        if subject.name not in failed:
                            try:
                                async with subject.awake(client.folder) as url:
                                    found = await client.send(subject.server, url, load, own, name)
                                runs.setdefault((subject.name, load), {})[index] = found
                            except LaunchError as error:
                                fail(subject, error)
                        bar.update()


if __name__ == "__main__":
    main(serve, "python -m benchmarks.serve", others=True)
