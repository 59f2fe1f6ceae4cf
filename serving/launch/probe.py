"""What only an import can tell of an environment: printed as one JSON line, for `attnserve doctor`.

It runs in a process of its own, because what it looks for may kill it: a library for another
processor dies of SIGILL.
"""

import importlib
import json
import pkgutil
from typing import Any


def import_plugins() -> None:
    """Import every module of the plugins: a server imports some only while it starts, and would
    find only there that vLLM has moved something."""
    import vllm_attn
    import vllm_quant

    for package in (vllm_attn, vllm_quant):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if module.name != "vllm_attn.cpu_platform":  # of CPU builds, which have it by then
                importlib.import_module(module.name)


def cuda() -> str | None:
    """Return the version of CUDA that torch is built for; None for a CPU build."""
    import torch

    return torch.version.cuda


def gpus() -> list[dict[str, Any]]:
    """Return name, compute capability and memory in GiB of every CUDA device that torch sees."""
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": [p.major, p.minor], "gib": p.total_memory / 2**30}
        for p in properties
    ]


def main() -> None:
    """Load vLLM as a server would, with its kernels and our plugin."""
    from vllm.platforms import current_platform

    import vllm_attn
    from attn_kernels import variant_names
    from vllm_attn import library, names, patches

    vllm_attn.register()
    import_plugins()
    for name in variant_names():
        names.backend_for(name).get_class()
    if current_platform.is_cpu():
        library.check()
    found = {
        "platform": type(current_platform).__name__,
        "honours_variants": getattr(current_platform, "honours_variants", False),
        "missing_points": patches.missing_points(),
        "variants": list(variant_names()),
        "cpu_library": library.loaded(),
        "cuda": cuda(),
        "gpus": gpus(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
