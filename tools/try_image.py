"""Serve from inside an image: `tools/build_image.sh` runs this there, as the image's own user.

Usage: python tools/try_image.py [PORT]     PORT (default 8765) and the next one must be free

The bundled softpick checkpoint on the compiled kernels, and the gateway before it.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path


def main() -> None:
    """Exit code 0 if everything is as the image promises."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8765
    assert os.getuid() != 0, "runs as root"
    assert not any(map(shutil.which, ("g++", "gcc", "cc", "clang", "make", "pip"))), "has tools"
    ports = [f"--vllm-port={port}", f"--gateway-port={port + 1}"]
    subprocess.run(["attnserve", "doctor", *ports], check=True)

    serve = ["attnserve", "serve", "/checkpoints/softpick", *ports, "--", "--dtype=float32"]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        assert any("ready: " in line for line in server.stdout), "does not start"
        body = {"model": "softpick", "prompt": "It was the best of times,", "max_tokens": 16}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port + 1}/v1/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] == 16
        log = Path(f".run/vllm-{port}.log").read_text()
        assert "runs in torch operations" not in log, "no kernels"
    finally:
        server.terminate()
        server.wait(120)
    print(json.dumps({"uid": os.getuid(), "text": answer["choices"][0]["text"]}))


if __name__ == "__main__":
    main()
