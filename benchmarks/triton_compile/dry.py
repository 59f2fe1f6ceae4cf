"""A Triton driver for a GPU that is not here: kernels are compiled for it and launched nowhere.

Launching code runs as on a GPU, with tensors in the CPU's memory, so that each kernel gets the
types and the specialization of a real launch. It replaces the process's driver for good. Import it
after TRITON_CACHE_DIR is set and TRITON_INTERPRET is not.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

from benchmarks.triton_compile.loops import Loop, main_loops, of_amdgcn, of_sass

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
SERIALISED = "wgmma.mma_async instructions are serialized"
"""In what ptxas prints: Hopper's products wait for one another."""


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled, with its compile-time arguments and what it needs.

    Attributes:
        registers: of a thread, 32 bits each: at most 255 (NVIDIA), 512 (AMD: VGPRs and AGPRs).
        spills: bytes of memory a thread has for what its registers do not hold.
        shared: bytes of shared memory (AMD: LDS) of a program.
        loops: those with matrix products.
        threads: of a program.
        serialised: ptxas made Hopper's asynchronous matrix products wait for one another.
    """

    name: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    loops: tuple[Loop, ...]
    serialised: bool
    threads: int

    @property
    def scores(self) -> float | None:
        """Scores of a thread in a tile, where there are tiles of them."""
        if not {"ROWS", "KEYS"} <= self.constants.keys():
            return None
        return float(self.constants["ROWS"] * self.constants["KEYS"] / self.threads)


class DryCompiler:
    """Installs the driver and catches what Triton compiles.

    Each architecture is a device of its own, because Triton keeps what it compiled by device.

    Args:
        cache: Triton's cache folder (TRITON_CACHE_DIR), emptied after each use: a kernel's
            intermediate texts are megabytes.
        keep: a second launch of a kernel compiles nothing, as on a GPU.
    """

    def __init__(self, cache: Path, *, keep: bool = False) -> None:
        self.cache, self.keep = cache, keep
        self.device = 0
        self.found: list[Compiled] = []
        self.log = io.StringIO()
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
        # Which would be told a text that Triton 3.6 cannot write where an argument is a function.
        jit.serialize_specialization_data = lambda *_: ""
        triton.knobs.nvidia.dump_ptxas_log = True  # printed, and caught in `target`

    @contextlib.contextmanager
    def target(self, arch: str) -> Iterator[list[Compiled]]:
        """Compile for `arch` inside; the list gets what is compiled."""
        self.device = list(TARGETS).index(arch)
        self.found, self.log = [], io.StringIO()
        try:
            with contextlib.redirect_stdout(self.log):
                yield self.found
        finally:
            shutil.rmtree(self.cache, ignore_errors=True)

    def _compiled(self, *, key: str, fn: Any, compile: Any, **_: Any) -> None:
        kernels = fn.jit_function.device_caches[self.device][0]
        kernel = kernels[key] if self.keep else kernels.pop(key)
        read = read_cubin if "cubin" in kernel.asm else read_amdgcn
        registers, spills, loops = read(kernel.asm)
        log = self.log.getvalue()
        self.log.seek(0)
        self.log.truncate()
        names = fn.jit_function.arg_names
        constants: dict[str, Any] = {}
        for path, value in compile["constants"].items():
            if hasattr(value, "_asdict"):  # a group of them
                constants |= {field.upper(): part for field, part in value._asdict().items()}
            elif len(path) == 1:
                constants[names[path[0]]] = value
        launch = compile["num_warps"], compile["num_stages"]
        threads = compile["num_warps"] * list(TARGETS.values())[self.device].warp_size
        self.found.append(
            Compiled(fn.jit_function.__name__, constants, *launch, registers, spills,
                     kernel.metadata.shared, loops, SERIALISED in log, threads)
        )  # fmt: skip


def read_cubin(asm: dict[str, Any]) -> tuple[int, int, tuple[Loop, ...]]:
    """Return the registers, spilled bytes and main loops of an NVIDIA binary, by Triton's
    cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = CUBIN_USAGE.search(text)
    if usage is None:
        raise ValueError("cuobjdump prints no resource usage that this program can read")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local, main_loops(of_sass(text))


def read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, tuple[Loop, ...]]:
    """Return the registers (with AGPRs) and spilled bytes that an AMD assembly text states, and its
    main loops."""
    text = asm["amdgcn"]
    usage = {name: int(value) for name, value in AMD_USAGE.findall(text)}
    spills = max(usage["private_segment_fixed_size"], 4 * usage["vgpr_spill_count"])
    return usage["vgpr_count"], spills, main_loops(of_amdgcn(text))
