"""vLLM's C++ attention kernels, loaded without a server."""

from __future__ import annotations

from pathlib import Path

import torch

ISAS = ("vec", "amx", "vec16")


class PeerError(RuntimeError):
    """vLLM's kernels cannot be used; the message says what to do."""


def amx_available() -> bool:
    """The processor has AMX tiles, and Linux lets this process use them."""
    # torch has no public name for either. Without the second call, the first tile instruction of a
    # process may be SIGILL.
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def load_vllm(isa: str) -> str:
    """Load vLLM's operators.

    Args:
        isa: one of ISAS, which the processor must have.

    Returns:
        The file name of the library that vLLM chose for this processor.

    Raises:
        PeerError: vLLM for CPU is not installed, or this processor cannot run it.
    """
    if isa == "amx" and not amx_available():
        raise PeerError("--peer-isa amx: this processor or kernel has no AMX tiles; use vec")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise PeerError(f"vLLM is not installed ({error}); install attnserve[cpu]") from error
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise PeerError("this vLLM has no CPU attention kernel; install attnserve[cpu]")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    loaded = {Path(line.split()[-1]) for line in maps if "/vllm/_C" in line}
    return ", ".join(sorted(path.name for path in loaded))


def isa_for(isa: str, dtype: str) -> str:
    """The instruction set for a dtype: vLLM's AMX kernels are for bf16 only."""
    return "vec" if isa == "amx" and dtype != "bf16" else isa
