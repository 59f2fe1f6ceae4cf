"""A Triton driver for a GPU that is not here: kernels are compiled for it and launched nowhere.

Launching code runs as on a GPU, with tensors in the CPU's memory, so that each kernel gets the
types and the specialization of a real launch. It replaces the process's driver for good.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.triton_compile.listing import Figures, read_amdgcn, read_cubin

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled.

    Attributes:
        code: a hash of all that the compiler was given: sources, types, constants, options, target.
        kernel: its function's name.
        constants: its compile-time arguments.
        num_warps, num_stages: as launched.
        figures: what the compiler made of it.
    """

    code: str
    kernel: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    figures: Figures


class DryUtils:
    """What Triton asks of a device's driver library. Limits are checked later, not here."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads: Triton uses the last."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """There is none."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of any device."""
        return {"max_shared_mem": 2**31, "multiprocessor_count": 1, "warpSize": 32}


class DryDriver(DriverBase):
    """Each architecture is a device of its own, because Triton keeps what it compiled by device."""

    def __init__(self) -> None:
        self.utils = DryUtils()
        self.device = 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a kernel: nothing."""
        return lambda *_: None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return list(TARGETS.values())[self.device]

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:  # every driver must have one
        raise NotImplementedError("nothing runs here")


class DryCompiler:
    """Installs the driver and catches what Triton compiles.

    Args:
        cache: Triton's cache folder (TRITON_CACHE_DIR), emptied after each use: a kernel's
            intermediate texts are megabytes.
        known: figures by `Compiled.code`: these are not compiled again. Grows with each kernel.
    """

    def __init__(self, cache: Path, known: dict[str, Figures] | None = None) -> None:
        self.cache = cache
        self.driver = DryDriver()
        self.known = {} if known is None else known
        self.found: list[Compiled] = []
        triton.runtime.driver.set_active(self.driver)
        triton.knobs.runtime.jit_cache_hook = self._wanted
        triton.knobs.runtime.jit_post_compile_hook = self._compiled

    @contextmanager
    def target(self, arch: str) -> Iterator[list[Compiled]]:
        """Inside, launches compile for `arch`; what they launch is in the list."""
        self.driver.device = list(TARGETS).index(arch)
        self.found = []
        try:
            yield self.found
        finally:
            shutil.rmtree(self.cache, ignore_errors=True)

    def _code(self, key: str, fn: Any) -> str:
        target = self.driver.get_current_target()
        parts = (triton.__version__, repr(target), fn.jit_function.cache_key, key)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _wanted(self, *, key: str, fn: Any, compile: Any, **_: Any) -> bool:
        """Triton's hook ahead of each compilation; True stops it and the launch."""
        code = self._code(key, fn)
        if code not in self.known:
            return False
        self._launched(code, fn, compile)
        return True

    def _compiled(self, *, key: str, fn: Any, compile: Any, **_: Any) -> None:
        """Triton's hook after each compilation."""
        kernels = fn.jit_function.device_caches[self.driver.device][0]
        kernel = kernels.pop(key)  # what was launched twice is counted twice
        if "cubin" in kernel.asm:
            tool = triton.knobs.nvidia.cuobjdump.path
            figures = read_cubin(kernel.asm["cubin"], kernel.metadata.shared, tool)
        else:
            figures = read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
        code = self._code(key, fn)
        self.known[code] = figures
        self._launched(code, fn, compile)

    def _launched(self, code: str, fn: Any, compile: Any) -> None:
        names = fn.jit_function.arg_names
        constants: dict[str, Any] = {}
        for path, value in compile["constants"].items():
            if hasattr(value, "_asdict"):  # a group of them
                constants |= {field.upper(): part for field, part in value._asdict().items()}
            elif len(path) == 1:
                constants[names[path[0]]] = value
        self.found.append(
            Compiled(
                code,
                fn.jit_function.__name__,
                constants,
                compile["num_warps"],
                compile["num_stages"],
                self.known[code],
            )
        )
