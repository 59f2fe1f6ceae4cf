"""Launches of a layer's kernels at little cost to the host.

Triton looks at every argument of every launch anew, compile-time ones too, which takes 20 us. Here
they are bound once, and a launch like an earlier one goes to the kernel that Triton compiled for
that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from torch import Tensor

_compile_only = False


@contextmanager
def compile_only() -> Iterator[None]:
    """Let launches of this thread compile their kernels meanwhile, side by side, and launch
    nothing. All are compiled in the end."""
    global _compile_only
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
        _compile_only = True
        try:
            yield
        finally:
            _compile_only = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a `triton.jit` function as Triton does; inside `compile_only` compile it."""
    kernel.run(*args, grid=grid, warmup=_compile_only, **options)


def compiling() -> bool:
    """Return whether launches only compile."""
    return _compile_only


class Launcher:
    """Launches a kernel of one layer.

    Args:
        kernel: a `triton.jit` function whose compile-time arguments are the last ones.
        constants: compile-time arguments that are the same in all launches.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any]) -> None:
        self.kernel, self.constants = kernel, dict(constants)
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self.last: tuple[Any, tuple[Any, ...]] | None = None

    def __call__(
        self, grid: tuple[int, ...], *args: Any, options: Mapping[str, Any], **constants: Any
    ) -> None:
        """Launch it.

        Args:
            grid: numbers of programs.
            args: tensors, None and numbers, in the order of the kernel's arguments.
            options: Triton's (`num_warps`), hashable.
            constants: the other compile-time arguments, hashable.
        """
        if _compile_only:
            given = self.constants | constants
            self.kernel.run(*args, grid=grid, warmup=True, **given, **options)
            return
        key = (*map(kind_of, args), *options.values(), *constants.values())
        known = self.compiled.get(key)
        if known is not None:
            self.last = known
            compiled, rest = known
            compiled[(*grid, 1, 1)[:3]](*args, *rest)
            return
        given = self.constants | constants
        compiled = self.kernel[grid](*args, **given, **options)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names[len(args) :]
            self.last = self.compiled[key] = compiled, tuple(given[name] for name in names)

    def again(self, grid: tuple[int, ...], *args: Any, **others: Any) -> None:
        """Launch it as in the last call, which differed in integers only that nothing is compiled
        for: at a third of the cost."""
        if _compile_only:
            return
        if self.last is None:  # nothing is compiled
            self(grid, *args, **others)
        else:
            compiled, rest = self.last
            compiled[(*grid, 1, 1)[:3]](*args, *rest)


def kind_of(argument: Any) -> Any:
    """Return what a kernel is compiled for: a tensor's dtype, whether 16 divides an argument (a
    tensor's address), whether it is 1, and whether it has 32 bits."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument < 2**31
    return None if argument is None else 0
