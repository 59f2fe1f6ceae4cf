"""Serve from inside an image: `tools/build_image.sh` runs this there, as the image's own user.

Usage: python tools/try_image.py [PORT]     PORT (default 8765) and the next one must be free

vLLM with the bundled softpick checkpoint on the compiled kernels, and the gateway before it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

SECONDS = 900
"""Longest wait for a server to come up."""


def fetch(url: str, body: object = None) -> bytes:
    """Return the body of an answer; POST if there is something to send."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        content: bytes = response.read()
        return content


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `url` answers 200."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            fetch(url)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"try_image: {url} does not answer:\n{log.read_text()}") from None
        time.sleep(1)


def main() -> None:
    """Exit code 0 if everything is as the image promises."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8765
    assert os.getuid() != 0, "runs as root"
    assert not any(map(shutil.which, ("g++", "gcc", "cc", "clang", "make", "pip"))), "has tools"
    ports = [f"--vllm-port={port}", f"--gateway-port={port + 1}"]
    subprocess.run(["attnserve", "doctor", *ports], check=True)

    folder = Path(tempfile.mkdtemp())
    config = folder / "gateway.yaml"
    vllm, gateway = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
    config.write_text(f"port: {port + 1}\nmodels: [{{name: softpick, replicas: ['{vllm}']}}]\n")
    serve = ["vllm", "serve", "/checkpoints/softpick", "--served-model-name=softpick"]
    serve += ["--enforce-eager", "--kv-cache-memory-bytes=64M", "--dtype=float32"]
    commands = {
        f"{vllm}/health": [*serve, f"--port={port}"],
        f"{gateway}/health": ["attnserve-gateway", "--config", str(config)],
    }
    processes = []
    try:
        for number, (url, command) in enumerate(commands.items()):
            log = folder / f"{number}.log"
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=file))
            wait_for(url, processes[-1], log)
        body = {"model": "softpick", "prompt": "It was the best of times,", "max_tokens": 16}
        answer = json.loads(fetch(f"{gateway}/v1/completions", body | {"temperature": 0}))
        assert answer["usage"]["completion_tokens"] == 16
        assert "runs in torch operations" not in (folder / "0.log").read_text(), "no kernels"
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(120)
    print(json.dumps({"uid": os.getuid(), "text": answer["choices"][0]["text"]}))


if __name__ == "__main__":
    main()
