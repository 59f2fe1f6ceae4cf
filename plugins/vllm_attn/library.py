"""vLLM's C++ library for CPUs: whether it is loaded, or why it is not.

If it does not load, vLLM 0.32 only warns; its worker dies later, of an operator that is not there.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import vllm

from vllm_attn.report import StartupError


def loaded() -> str | None:
    """Return the name of the library that this process has loaded: `_C`, `_C_AVX512` or
    `_C_AVX2`."""
    names = re.findall(r"/vllm/(_C\w*)[.\w-]*\.so$", Path("/proc/self/maps").read_text(), re.M)
    return str(names[0]) if names else None


def check() -> None:
    """Have vLLM load it.

    Raises:
        StartupError: it does not load; the message says why.
    """
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if loaded():
        return
    # All of them need the same libraries; the plainest also runs on every processor.
    files = sorted(Path(vllm.__file__).parent.glob("_C*.so"), key=lambda f: "AVX2" not in f.name)
    if not files:
        raise StartupError(f"there is no vllm/_C*.so beside {vllm.__file__}: install vLLM again")
    why = "it loads, but vLLM did not load it"
    try:
        ctypes.CDLL(str(files[0]))
    except OSError as error:
        why = str(error)
    raise StartupError(
        f"vLLM's library for CPUs does not load ({why}): install what it misses (libnuma.so.1: "
        "apt-get install libnuma1)"
    )
