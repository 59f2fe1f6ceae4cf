"""A Triton driver for a GPU that is not here: kernels are compiled for it and launched nowhere.

Launching code runs as on a GPU, with tensors in the CPU's memory, so that each kernel gets the
types and the specialization of a real launch. It replaces the process's driver for good. Import it
after TRITON_CACHE_DIR is set and TRITON_INTERPRET is not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUBIN_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
AMD_USAGE = re.compile(
    r"^\s+(?:- )?\.(\w+_count|private_segment_fixed_size):\s+(\d+)", re.MULTILINE
)


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled, with its compile-time arguments and what it needs.

    Attributes:
        registers: of a thread, 32 bits each: at most 255 (NVIDIA), 512 (AMD: VGPRs and AGPRs).
        spills: bytes of memory a thread has for what its registers do not hold.
        shared: bytes of shared memory (AMD: LDS) of a program.
    """

    name: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int


class DryCompiler:
    """Installs the driver and catches what Triton compiles.

    Each architecture is a device of its own, because Triton keeps what it compiled by device.

    Args:
        cache: Triton's cache folder (TRITON_CACHE_DIR), emptied after each use: a kernel's
            intermediate texts are megabytes.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.device = 0
        self.found: list[Compiled] = []
        # Limits are checked later.
        properties = {"max_shared_mem": 2**31, "multiprocessor_count": 1, "warpSize": 32}
        driver = SimpleNamespace(
            get_current_target=lambda: list(TARGETS.values())[self.device],
            get_current_device=lambda: self.device,
            get_current_stream=lambda device: 0,
            launcher_cls=lambda source, metadata: lambda *_: None,
            utils=SimpleNamespace(
                get_device_properties=lambda device: properties,
                # Module, function, registers, spills, most threads: Triton uses the last.
                load_binary=lambda *_: (1, 1, 0, 0, 1024),
                unload_module=lambda module: None,
            ),
        )
        triton.runtime.driver.set_active(driver)
        triton.knobs.runtime.jit_post_compile_hook = self._compiled

    @contextmanager
    def target(self, arch: str) -> Iterator[list[Compiled]]:
        """Compile for `arch` inside; the list gets what is launched."""
        self.device = list(TARGETS).index(arch)
        self.found = []
        try:
            yield self.found
        finally:
            shutil.rmtree(self.cache, ignore_errors=True)

    def _compiled(self, *, key: str, fn: Any, compile: Any, **_: Any) -> None:
        kernel = fn.jit_function.device_caches[self.device][0].pop(key)
        usage = of_cubin if "cubin" in kernel.asm else of_amdgcn
        names = fn.jit_function.arg_names
        constants: dict[str, Any] = {}
        for path, value in compile["constants"].items():
            if hasattr(value, "_asdict"):  # a group of them
                constants |= {field.upper(): part for field, part in value._asdict().items()}
            elif len(path) == 1:
                constants[names[path[0]]] = value
        launch = compile["num_warps"], compile["num_stages"]
        self.found.append(
            Compiled(fn.jit_function.__name__, constants, *launch, *usage(kernel.asm),
                     kernel.metadata.shared)
        )  # fmt: skip


def of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Return the registers and spilled bytes of an NVIDIA binary, by Triton's cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = CUBIN_USAGE.search(text)
    if usage is None:
        raise ValueError("cuobjdump prints no resource usage that this program can read")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    """Return the registers (with AGPRs) and spilled bytes that an AMD assembly text states."""
    usage = {name: int(value) for name, value in AMD_USAGE.findall(asm["amdgcn"])}
    spills = max(usage["private_segment_fixed_size"], 4 * usage["vgpr_spill_count"])
    return usage["vgpr_count"], spills
