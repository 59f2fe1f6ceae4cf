"""python -m tests.serving.soak: many concurrent streams through the gateway, for minutes.

Every event of every stream is checked against its number: none may be missing, doubled, out of
order or another stream's. The gateway's resident memory is read every second; it may not pass a
limit, and after two lengths of a stream it may not grow. The model server is a small program that
sends numbered events (tests/serving/numbered_events.py); only the gateway is under test.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import uvloop
from tqdm import tqdm

from attnserve import machine
from tests.servers import end_group, free_port, spawn, wait_until_healthy
from tests.serving.helpers import configured

DONE = b"data: [DONE]\n"


@dataclass
class SoakRun:
    """What has happened so far."""

    streams: int = 0
    events: int = 0
    wrong: list[str] = field(default_factory=list)
    open: int = 0
    rss_mb: list[tuple[float, int, float]] = field(default_factory=list)  # time, open streams, MB
    cpu_s: float = 0.0


async def stream(url: str, name: str, tokens: int, run: SoakRun) -> None:
    """One stream; what is not as it should be goes to `run.wrong`."""
    host, port = urlsplit(url).netloc.split(":")
    body = json.dumps({"model": "m", "prompt": name, "stream": True}).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    run.open += 1
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        writer.write(head % (len(body), body))
        status = await reader.readline()
        if b" 200 " not in status:
            run.wrong.append(f"{name}: {status!r}")
            return
        due = 0
        async for line in reader:
            if line == DONE:
                break
            if line.startswith(b"data: "):
                choices = json.loads(line[6:]).get("choices")
                text = choices[0]["text"] if choices else line.decode()
                if text != f"{name}-{due}":
                    run.wrong.append(f"{name}: {text} where {due} was due")
                    return
                due += 1
                run.events += 1
        if due != tokens:
            run.wrong.append(f"{name}: ended after {due} of {tokens} events")
        run.streams += 1
    except OSError as error:
        run.wrong.append(f"{name}: {error!r}")
    finally:
        run.open -= 1
        writer.close()


async def load(url: str, pid: int, options: argparse.Namespace) -> SoakRun:
    """`--streams` at a time, each followed by another, until the time is over; then they end."""
    run = SoakRun()
    began = time.monotonic()
    length = options.tokens * options.pause_s

    async def client(index: int) -> None:
        await asyncio.sleep(length * index / options.streams)  # so that they do not end together
        turn = 0
        while turn == 0 or time.monotonic() - began < options.seconds:
            await stream(url, f"{index}.{turn}", options.tokens, run)
            turn += 1

    async def watch() -> None:
        gateway = psutil.Process(pid)
        with tqdm(total=options.seconds, unit="s", mininterval=5) as bar:
            while True:
                at = time.monotonic() - began
                run.rss_mb.append((at, run.open, gateway.memory_info().rss / 2**20))
                times = gateway.cpu_times()
                run.cpu_s = times.user + times.system
                bar.update(min(round(at), options.seconds) - bar.n)
                await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client(i) for i in range(options.streams)))
    watcher.cancel()
    return run


def judge(run: SoakRun, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return the figures, and what is wrong with them."""
    full = [(at, mb) for at, streams, mb in run.rss_mb if streams > 0.9 * options.streams]
    peak = max(mb for _, _, mb in run.rss_mb)
    warm = 2 * options.tokens * options.pause_s  # all have started, and all are followed by another
    after = [mb for at, mb in full if at >= warm] or [float("nan")]
    growth = after[-1] - after[0]
    figures = {
        "streams_done": run.streams,
        "events": run.events,
        "wrong": len(run.wrong),
        "rss_mb_peak": round(peak, 1),
        "rss_mb_after_warm_up": round(after[0], 1),
        "rss_mb_growth_since": round(growth, 1),
        "gateway_cpu_s": round(run.cpu_s, 1),
    }
    faults = run.wrong[:5]
    if peak > options.max_mb:
        faults.append(f"{peak:.0f} MB, more than {options.max_mb}")
    if not growth <= options.max_growth_mb:
        faults.append(f"grew by {growth:.1f} MB, more than {options.max_growth_mb}")
    return figures, faults


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.serving.soak",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--streams", type=int, default=1000, help="at a time")
    add("--seconds", type=int, default=300, help="for which new streams are begun")
    add("--tokens", type=int, default=120, help="events of a stream")
    add("--pause-s", type=float, default=0.5, help="between two events, in seconds")
    add("--max-mb", type=float, default=150, help="of resident memory, at most")
    add("--max-growth-mb", type=float, default=5, help="of it, after two lengths of a stream")
    add("--csv", type=Path, default=Path(".run/soak.csv"), help="memory over time")
    return parser.parse_args(arguments)


def main() -> None:
    """Print a table, and as last line one JSON object; exit with 1 if anything was wrong."""
    options = parse()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = {"models": [{"name": "m", "replicas": [url]}], "logging": {"requests": False}}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        arguments = [str(port), str(options.tokens), str(options.pause_s)]
        log = folder / "source.log"
        source = spawn([sys.executable, "-m", "tests.serving.numbered_events", *arguments], log)
        try:
            wait_until_healthy(url, source, log)
            with configured(folder, config) as gateway:
                run = uvloop.run(load(gateway.url, gateway.pid, options))
        finally:
            end_group(source)
    figures, faults = judge(run, options)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{at:.1f},{streams},{mb:.1f}\n" for at, streams, mb in run.rss_mb]
    options.csv.write_text("seconds,open_streams,rss_mb\n" + "".join(lines))
    for key, value in figures.items():
        print(f"{key:24}{value}")
    for fault in faults:
        print(f"WRONG: {fault}")
    about = {"machine": machine.cpu_model(), "cores": machine.cores(), "commit": machine.commit()}
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    print(json.dumps({**about, **asked, **figures, "ok": not faults}))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
