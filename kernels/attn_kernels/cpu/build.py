"""Compiles C++ kernels on first use and keeps them in a cache.

Attention has one library a variant and instruction set, from `kernel.cpp` and the `kernel.hpp` in
the variant's folder. The flags name the instruction set instead of saying "native", so that a
library runs wherever its instructions do, and only instruction sets of the running processor are
ever chosen. Its file name holds a hash of the sources and the flags, and one of the compiler; the
file ends with a hash of itself. A library runs with all rights of its user, so that one is loaded
only if nobody else, but root, can have written it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TypeVar

from attn_kernels.variant import Variant

HERE = Path(__file__).parent
VARIANTS = HERE.parent / "variants"

T = TypeVar("T")

logger = logging.getLogger(__name__)

HASH_BYTES = hashlib.sha256().digest_size

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # Not -ffast-math: it would undo the rounding of exp2 and the meaning of NaN.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)

AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")

ISAS = {
    "amx": (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": (*AVX512, "avx512_bf16"),
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": (),
}
"""Instruction sets, best first: the processor's features that they need, by Linux' names."""


class BuildError(RuntimeError):
    """A library could not be built; the message says why and what to do, in one line."""


@functools.cache
def processor_features() -> frozenset[str]:
    """Return the features of processor and operating system, in Linux' names; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    found = frozenset(flags.split(":", 1)[1].split())
    return found if tiles_permitted() else found - {"amx_tile"}


def tiles_permitted() -> bool:
    """Return whether Linux lets this process use AMX tiles, for which it must ask: 5.15 and some
    sandboxes list the feature and refuse it. The next instruction set is then the best."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def usable_isas() -> tuple[str, ...]:
    """Return the instruction sets that this processor has, best first."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return tuple(
        isa
        for isa, features in ISAS.items()
        if (x86 or not features) and processor_features().issuperset(features)
    )


def chosen_isas(isa: str | None = None) -> tuple[str, ...]:
    """Return the instruction sets to try: `isa`, else `$ATTNSERVE_CPU_ISA`, else the usable ones.

    Raises:
        ValueError: this processor lacks the one that was chosen.
    """
    usable, chosen = usable_isas(), isa or os.environ.get("ATTNSERVE_CPU_ISA")
    if chosen and chosen not in usable:
        raise ValueError(f"this processor has no {chosen}: use one of {', '.join(usable)}")
    return (chosen,) if chosen else usable


def cache_folder() -> Path:
    """Return `$ATTNSERVE_CACHE`, else `attnserve` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        BuildError: none of them is known.
    """
    if chosen := os.environ.get("ATTNSERVE_CACHE"):
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise BuildError("this user has no home folder: set ATTNSERVE_CACHE") from None
    return Path(base) / "attnserve"


def find_compiler() -> tuple[list[str], str]:
    """Return the command of the C++ compiler and what it says its version is."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "clang++", "c++"]:
        command = shlex.split(name)
        if command and (path := shutil.which(command[0])):
            command[0] = path
            try:
                asked = subprocess.run([*command, "--version"], capture_output=True, text=True)
            except OSError as error:
                raise BuildError(f"CXX={name} cannot be run ({error}): set it to g++") from None
            return command, asked.stdout
    what = f"CXX={chosen} is not found" if chosen else "no C++ compiler (g++, clang++, c++)"
    raise BuildError(f"{what}: install g++, or set CXX")


def header_of(variant: Variant) -> Path | None:
    """Return the C++ header of a variant; None: it has no C++ kernel."""
    header = variant.folder() / "kernel.hpp"
    return header if header.exists() else None


def included(header: Path) -> set[Path]:
    """Return a header and all that it includes by `#include "..."`, and so on."""
    found: set[Path] = set()
    todo = [header]
    while todo:
        path = todo.pop().resolve()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s*"(.+?)"', path.read_text(), re.MULTILINE):
            places = (folder / name for folder in (path.parent, HERE, VARIANTS))
            todo += [place for place in places if place.is_file()][:1]
    return found


def flags_of(isa: str) -> list[str]:
    """Return the compiler's flags for one of `ISAS`."""
    features = [feature.replace("amx_", "amx-").replace("2_", "2") for feature in ISAS[isa]]
    return [*FLAGS, *(f"-m{feature}" for feature in features)]


@functools.cache
def build_library(header: Path, struct: str, isa: str, quantized: bool = False) -> Path:
    """Return the shared library of the variant whose C++ struct is `struct` in `header`, for plain
    or for quantized caches.

    Raises:
        BuildError: see `compile_library`.
    """
    return compile_library(
        HERE / ("quantized.cpp" if quantized else "kernel.cpp"),
        isa,
        name=header.parent.name + "-quantized" * quantized,
        define=f"VARIANT={struct}",
        reads={*HERE.glob("*.[hc]pp"), *included(header)},
        options=(f"-I{HERE}", f"-I{VARIANTS}", "-include", str(header)),
    )


def compile_library(
    source: Path, isa: str, *, name: str, define: str, reads: Set[Path], options: Sequence[str]
) -> Path:
    """Return a shared library, built if no earlier one has the same sources, flags and compiler.

    Several processes may ask at once: one builds, the others wait for it. Where there is no
    compiler, a library that any compiler has built of the same sources and flags is taken
    (container images have those).

    Args:
        source: what to compile.
        isa: one of `ISAS`.
        name: start of the library's file name.
        define: a macro, as `NAME=VALUE`.
        reads: every file of ours that the compiler reads.
        options: further ones of the compiler, which change nothing but where files are found.

    Raises:
        BuildError: no compiler, it failed, or the cache cannot be written.
    """
    flags = [*flags_of(isa), f"-D{define}"]
    key = hashlib.sha256("\0".join([platform.machine(), *flags]).encode())
    for place, read in sorted((f"{read.parent.name}/{read.name}", read) for read in reads):
        key.update(place.encode() + b"\0" + read.read_bytes())
    folder = cache_folder()
    stem = f"{name}-{isa}-{key.hexdigest()[:16]}"
    try:
        compiler, version = find_compiler()
    except BuildError:
        if built := [path for path in sorted(folder.glob(f"{stem}-*.so")) if is_whole(path)]:
            return built[0]
        raise
    by = hashlib.sha256("\0".join([*compiler, version]).encode())
    target = folder / f"{stem}-{by.hexdigest()[:8]}.so"
    if is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(
            folder / f"{target.name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
        )
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not is_whole(target, quiet=True):
                # A warning, so that it is shown where nobody has set up logging: it takes seconds.
                logger.warning(
                    "Compiling the %s kernels for %s, once on this machine, into %s",
                    name,
                    isa,
                    folder,
                )
                _compile([*compiler, *flags, *options, str(source)], target)
    except OSError as error:
        raise BuildError(
            f"the kernel cache {folder} cannot be used ({error}): set ATTNSERVE_CACHE to a folder "
            "that can be written"
        ) from None
    return target


def is_whole(path: Path, quiet: bool = False) -> bool:
    """Return whether a library is there that may be loaded; say, unless `quiet`, why one is not."""
    try:
        os.close(opened(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BuildError as error:
        if not quiet:
            logger.warning("%s: it is not used", error)
        return False
    return True


def opened(path: Path) -> int:
    """Return the descriptor of a library that may be loaded.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        BuildError: it is a link, somebody else can have written it, or it is not whole.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise BuildError(f"{path} cannot be opened ({error.strerror})") from None
    about = os.fstat(descriptor)
    content = b""
    if stat.S_ISREG(about.st_mode):
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read()
    why = ""
    if about.st_uid not in (0, os.geteuid()):
        why = "belongs to another user"
    elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = "can be written by other users"
    elif sealed(content[:-HASH_BYTES]) != content:
        why = "is damaged"
    if why:
        os.close(descriptor)
        raise BuildError(f"{path} {why}")
    return descriptor


def sealed(content: bytes) -> bytes:
    """Return a library with the hash of it at its end, where loaders do not look."""
    return content + hashlib.sha256(content).digest()


def open_library(path: Path, abi: str, expected: int) -> ctypes.CDLL:
    """Return a library, loaded.

    Args:
        path: of the library.
        abi: its function that says what the structs of its calls are.
        expected: what that is in this version.

    Raises:
        BuildError: it does not load, must not, or is of another version.
    """
    try:
        # What was looked at is loaded, whatever is at `path` now. It stays open: the loader takes
        # two files of one name for the same.
        library = ctypes.CDLL(f"/proc/self/fd/{opened(path)}")
        if getattr(library, abi)() == expected:
            return library
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): delete it") from None
    except AttributeError:
        pass  # it has no such function
    raise BuildError(f"{path} does not fit this version of attnserve: delete it")


def best(what: str, isas: Sequence[str], make: Callable[[str], T]) -> tuple[T | None, str]:
    """Return what `make(isa)` gives for the first instruction set for which it gives anything, and
    why it gives nothing for the first of all.

    Args:
        what: runs, for a warning where that is not the first.
        isas: instruction sets, best first.
        make: may raise BuildError.
    """
    why = ""
    for isa in isas:
        try:
            made = make(isa)
        except BuildError as error:
            why = why or str(error)
            continue
        if why:
            logger.warning(
                "attnserve: %s runs with %s instructions instead of %s, slower: %s",
                what,
                isa,
                isas[0],
                why,
            )
        return made, why
    return None, why


def _compile(command: list[str], target: Path) -> None:
    """Compile beside `target` and rename: whoever sees `target` sees all of it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        out = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
        if done.returncode:
            log = target.with_suffix(".log")
            out.write_text(f"{' '.join(command)}\n{done.stderr}")
            os.replace(out, log)  # what is there may be a link
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            why = errors[0] if errors else f"exit code {done.returncode}"
            raise BuildError(f"{command[0]} failed ({why}); all of it is in {log}")
        out.write_bytes(sealed(out.read_bytes()))
        out.chmod(0o755)  # whatever the umask is
        os.replace(out, target)
