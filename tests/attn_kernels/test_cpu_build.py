"""Building, caching and loading the CPU kernels, and what happens where that is impossible.

Each test has an empty cache of its own. The compiler is the real one behind a script that counts
its calls and turns optimisation off, which takes a second instead of ten.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from attn_kernels import cpu, get_variant, reference
from attn_kernels.batch import Batch
from attn_kernels.cpu import build
from attn_kernels.paged import TorchLayer
from quant_kernels import ops
from tests.attn_kernels.test_paged import TORCH_TOLERANCE, Cache, relative_error

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
HEADER = build.VARIANTS / "softpick/kernel.hpp"
REMEMBERED = (cpu._load, cpu._warn, build.build_library, build.processor_features)


def forget() -> None:
    """As if the process had just started."""
    for function in REMEMBERED:
        function.cache_clear()


@dataclass
class Place:
    """A cache folder, and a compiler that is a shell script in front of the real one."""

    cache: Path
    compiler: Path
    real: str

    def compile_with(self, before: str, version: str = "as the real one") -> None:
        """`before`: shell commands ahead of the real compiler, when it is asked to compile."""
        self.compiler.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then echo "{version}"; exit; fi\n'
            f'echo "$@" >> "{self.calls}"\n{before}\nexec "{self.real}" "$@" -O0\n'
        )
        self.compiler.chmod(0o755)

    @property
    def calls(self) -> Path:
        return self.compiler.with_name("calls")

    def compiled(self) -> int:
        """How often something was compiled."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def libraries(self) -> list[Path]:
        return sorted(self.cache.glob("*.so"))


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    forget()
    place = Place(tmp_path / "cache", tmp_path / "compiler", build.find_compiler()[0][0])
    place.compile_with("")
    monkeypatch.setenv("ATTNSERVE_CACHE", str(place.cache))
    monkeypatch.setenv("ATTNSERVE_CPU_ISA", "portable")
    monkeypatch.setenv("CXX", str(place.compiler))
    yield place
    forget()


def check_bound(
    expected: type[cpu.CPULayer | TorchLayer], head_size: int = 32, block_size: int = 16
) -> None:
    """Check that a softpick layer becomes an object of this class, equal to the reference."""
    torch.manual_seed(0)
    variant = get_variant("softpick")
    cache = Cache.make(variant, [40], 2, head_size, block_size, torch.float32)
    layer = cpu.bind(variant, cache.kv, num_heads=4, scale=0.2)
    assert type(layer) is expected
    q, k, v = (torch.randn(40, heads, head_size) for heads in (4, 2, 2))
    layer.write_cache(k, v, cache.slots(0, 0, 40))
    out = torch.empty_like(q)
    layer.attend(q, Batch(cache.block_table, torch.tensor([0, 40]), torch.tensor([40])), out)
    right, _ = reference.attention(
        variant, *(x.double().transpose(0, 1) for x in (q, k, v)), scale=0.2
    )
    assert relative_error(out.transpose(0, 1), right) <= TORCH_TOLERANCE


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what was logged, but for the line before each compilation."""
    return [r for r in caplog.records if not r.getMessage().startswith("Compiling ")]


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    """Return the one warning that there is, a single line."""
    (record,) = said(caplog)
    assert record.name == "attn_kernels.cpu" and record.levelname == "WARNING"
    message = record.getMessage()
    assert message.startswith("attnserve: softpick attention runs in torch operations")
    assert "\n" not in message
    return message


# ---- the cache

CHILD = """
import sys
from attn_kernels import cpu
from tests.attn_kernels.test_cpu_build import check_bound
print("ready", flush=True)
sys.stdin.readline()
check_bound(cpu.CPULayer)
"""


@pytest.fixture
def start() -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start processes that bind and check a layer as soon as a line is written to them."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # to be killed together with its compiler
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]


def test_processes_that_start_together_share_one_build(
    place: Place, start: Callable[[], subprocess.Popen[str]]
) -> None:
    together = [start() for _ in range(3)]
    for process in together:
        ready(process)
    for process in together:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in together:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    assert place.compiled() == 1
    (library,) = place.libraries()
    assert {path.name for path in place.cache.iterdir()} <= {library.name, f"{library.name}.lock"}

    check_bound(cpu.CPULayer)
    assert place.compiled() == 1, "a later process takes what is there"


def test_killed_build_stops_nobody(
    place: Place, start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    hung = tmp_path / "hung"
    place.compile_with(f'if mkdir "{hung}" 2>/dev/null; then sleep 600; fi')
    process = start()
    ready(process)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not hung.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert place.libraries() == []
    check_bound(cpu.CPULayer)
    assert place.compiled() == 2 and len(place.libraries()) == 1


@pytest.mark.parametrize(
    ("changed", "builds"),
    [
        ("cpu/kernel.cpp", 2),
        ("variants/ssmax/kernel.hpp", 2),
        ("variants/softmax/kernel.hpp", 2),  # which ssmax's includes
        ("variants/softpick/kernel.hpp", 1),
    ],
)
def test_changed_source_is_another_library(
    place: Place, changed: str, builds: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for folder in (build.HERE, build.VARIANTS):
        shutil.copytree(folder, copy / folder.name)
    build.build_library(build.VARIANTS / "ssmax/kernel.hpp", "SSMax", "portable")
    monkeypatch.setattr(build, "HERE", copy / "cpu")
    monkeypatch.setattr(build, "VARIANTS", copy / "variants")
    header = copy / "variants/ssmax/kernel.hpp"
    before = build.build_library(header, "SSMax", "portable")
    assert place.compiled() == 1, "where the project lies does not matter"
    with open(copy / changed, "a") as source:
        source.write("// changed\n")
    forget()
    after = build.build_library(header, "SSMax", "portable")
    assert place.compiled() == builds and len({before, after}) == builds


@pytest.mark.parametrize("changed", ["flags", "version", "path"])
def test_changed_flags_or_compiler_is_another_library(
    place: Place, changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = build.build_library(HEADER, "Softpick", "portable")
    forget()
    assert build.build_library(HEADER, "Softpick", "portable") == before
    if changed == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DUNUSED"))
    elif changed == "version":
        place.compile_with("", version="a newer one")
    else:
        monkeypatch.setenv("CXX", str(shutil.copy(place.compiler, tmp_path / "other")))
    forget()
    after = build.build_library(HEADER, "Softpick", "portable")
    assert place.libraries() == sorted([before, after]) and after != before


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert build.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ATTNSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg/attnserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache/attnserve"


# ---- no kernels: one warning that says what to do, and right answers


def test_no_compiler(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    assert cpu.load(get_variant("softpick")) is None
    check_bound(TorchLayer)
    message = only_warning(caplog)
    assert message.endswith("no C++ compiler (g++, clang++, c++): install g++, or set CXX")


def test_named_compiler_does_not_exist(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    check_bound(TorchLayer)
    assert "CXX=/nonexistent/g++ is not found: install g++" in only_warning(caplog)


@pytest.mark.parametrize("chosen", [None, "/nonexistent/g++"])
def test_no_compiler_but_a_library(
    chosen: str | None,
    place: Place,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As in a container image, whose cache was filled where there was a compiler."""
    library = build.build_library(HEADER, "Softpick", "portable")
    monkeypatch.setenv("PATH", str(tmp_path))
    if chosen:
        monkeypatch.setenv("CXX", chosen)
    else:
        monkeypatch.delenv("CXX")
    forget()
    check_bound(cpu.CPULayer)
    assert place.libraries() == [library] and not said(caplog)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DUNUSED"))
    forget()
    check_bound(TorchLayer)
    assert "install g++, or set CXX" in only_warning(caplog)


def test_compilation_is_announced(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Once, since it takes seconds; not where the library is there."""
    for _ in range(2):
        build.build_library(HEADER, "Softpick", "portable")
        forget()
    (record,) = caplog.records
    assert re.fullmatch(
        r"Compiling the softpick kernels for portable, once .*", record.getMessage()
    )
    assert str(build.cache_folder()) in record.getMessage()


def test_compiler_cannot_be_run(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.compiler.write_text("not a program of this machine")
    check_bound(TorchLayer)
    assert str(place.compiler) in only_warning(caplog)


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("echo 'x.hpp:1: error: no such type' >&2; echo more >&2; exit 1", "no such type"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_compiler_fails(
    fails: str, why: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.compile_with(fails)
    for _ in range(3):  # there are many layers
        check_bound(TorchLayer)
    assert place.compiled() == 1, "a compiler that fails is not asked again by every layer"
    message = only_warning(caplog)
    (log,) = place.cache.glob("*.log")
    assert why in message and message.endswith(f"all of it is in {log}")
    assert log.read_text().startswith(f"{place.compiler} -std=c++17")
    assert not place.libraries() and not list(place.cache.glob("build-*"))


@pytest.mark.parametrize("inside", [False, True], ids=["a-file", "in-a-file"])
def test_cache_cannot_be_used(
    inside: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A file in the folder's place: root may write to any folder, whatever its mode."""
    file = tmp_path / "file"
    file.touch()
    folder = file / "cache" if inside else file
    monkeypatch.setenv("ATTNSERVE_CACHE", str(folder))
    check_bound(TorchLayer)
    message = only_warning(caplog)
    assert f"the kernel cache {folder} cannot be used" in message
    assert message.endswith("set ATTNSERVE_CACHE to a folder that can be written")


def test_no_home(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a user that nobody has heard of."""
    for variable in ("ATTNSERVE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    check_bound(TorchLayer)
    assert "ATTNSERVE_CACHE" in only_warning(caplog)


def damage(library: Path, how: str) -> None:
    """Leave what a full disk or a failing one does."""
    content = library.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    kinds = {
        "bit": bytes(changed),
        "empty": b"",
        "garbage": b"no library" * 1000,
        "cut": content[:5000],
    }
    library.unlink()  # what is loaded stays as it is
    library.write_bytes(kinds[how])


@pytest.mark.parametrize("how", ["empty", "garbage", "cut", "bit"])
def test_a_damaged_library_is_built_again(
    how: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    library = build.build_library(HEADER, "Softpick", "portable")
    damage(library, how)
    forget()
    check_bound(cpu.CPULayer)
    assert place.compiled() == 2 and place.libraries() == [library]
    (record,) = said(caplog)
    assert record.getMessage() == f"{library} is damaged: it is not used"


def test_a_damaged_library_and_no_compiler(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build.build_library(HEADER, "Softpick", "portable")
    damage(library, "cut")
    forget()
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    check_bound(TorchLayer)
    damaged, missing = [record.getMessage() for record in said(caplog)]
    assert damaged == f"{library} is damaged: it is not used"
    assert "CXX=/nonexistent/g++ is not found" in missing


def compiled(place: Place, library: Path, source: str) -> None:
    """Put another library in the place of one, as whole as one of ours."""
    code, out = place.compiler.with_name("other.cpp"), place.compiler.with_name("other.so")
    code.write_text(source)
    subprocess.run([place.real, "-shared", "-fPIC", code, "-o", out], check=True)
    library.unlink()
    library.write_bytes(build.sealed(out.read_bytes()))
    library.chmod(0o755)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("owner", "belongs to another user"),
        ("group", "can be written by other users"),
        ("others", "can be written by other users"),
        ("link", "cannot be opened (Too many levels of symbolic links)"),
        ("unsealed", "is damaged"),
        ("pipe", "is damaged"),
    ],
)
def test_a_planted_library_is_not_loaded(
    how: str, why: str, place: Place, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Whoever can write to the cache would run code as its user."""
    if how == "owner" and os.geteuid():
        pytest.skip("only root can give a file to another user")
    library, ran = build.build_library(HEADER, "Softpick", "portable"), tmp_path / "ran"
    source = f'#include <cstdio>\n__attribute__((constructor)) void f() {{ fopen("{ran}", "w"); }}'
    compiled(place, library, source)
    if how == "owner":
        os.chown(library, 65534, 65534)
    elif how in ("group", "others"):
        library.chmod(0o775 if how == "group" else 0o757)
    elif how == "link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    elif how == "pipe":  # whoever reads one waits for a writer
        library.unlink()
        os.mkfifo(library, 0o700)
    else:
        library.write_bytes(library.read_bytes()[: -build.HASH_BYTES])
    forget()
    check_bound(cpu.CPULayer)
    assert not ran.exists()
    (record,) = said(caplog)
    assert record.getMessage() == f"{library} {why}: it is not used"
    assert place.compiled() == 2 and not library.is_symlink()


@pytest.mark.parametrize("kind", ["lock", "log"])
def test_links_in_the_cache_are_not_followed(
    kind: str, place: Place, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """What they point at stays as it is."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    library = build.build_library(HEADER, "Softpick", "portable")
    place.compile_with("exit 1")
    library.unlink()
    link = library.with_suffix(".log") if kind == "log" else Path(f"{library}.lock")
    link.unlink(missing_ok=True)
    link.symlink_to(mine)
    forget()
    check_bound(TorchLayer)
    assert mine.read_text() == "precious"
    says = "cannot be used" if kind == "lock" else "failed (exit code 1)"
    assert says in only_warning(caplog)


@pytest.mark.parametrize("source", ['extern "C" int attnserve_abi() { return 7; }', "int x;"])
def test_library_of_another_version(
    source: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Its structs have other sizes, calling it would read past them; or it says nothing of them."""
    library = build.build_library(HEADER, "Softpick", "portable")
    compiled(place, library, source)
    check_bound(TorchLayer)
    assert f"{library} does not fit this version of attnserve: delete it" in only_warning(caplog)


def test_shapes_that_the_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    shapes = [(24, 16, "head size 24"), (272, 16, "head size 272"), (32, 24, "block size 24")]
    for head_size, block_size, why in shapes:
        for _ in range(2):
            check_bound(TorchLayer, head_size, block_size)
        assert f"they do not support {why}" in only_warning(caplog)
        caplog.clear()


# ---- instruction sets

AVX2 = frozenset(build.ISAS["avx2"])
AVX512 = frozenset(build.ISAS["avx512"])


@pytest.mark.parametrize(
    ("machine", "features", "usable"),
    [
        ("x86_64", frozenset().union(*build.ISAS.values()), tuple(build.ISAS)),
        ("x86_64", AVX512 | {"avx512_bf16"}, ("avx512_bf16", "avx512", "avx2", "portable")),
        ("x86_64", AVX512 | {"sse2"}, ("avx512", "avx2", "portable")),
        ("x86_64", AVX2 | {"sse2"}, ("avx2", "portable")),
        ("x86_64", AVX512 - {"avx512bw"}, ("avx2", "portable")),  # Knights Landing
        ("x86_64", AVX2 - {"fma"}, ("portable",)),
        ("x86_64", {"sse2", "avx"}, ("portable",)),
        ("x86_64", (), ("portable",)),
        ("aarch64", {"fp", "asimd", "sve"}, ("portable",)),
        ("aarch64", AVX512, ("portable",)),
    ],
)
def test_usable_isas(
    machine: str, features: frozenset[str], usable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(build, "processor_features", lambda: frozenset(features))
    assert cpu.usable_isas() == usable


@pytest.mark.parametrize(("permitted", "best"), [(True, "amx"), (False, "avx512_bf16")])
def test_tiles_that_the_system_refuses(
    permitted: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of pairs of bfloat16 are the next best, not those of float32."""
    build.processor_features.cache_clear()
    if "amx_tile" not in Path("/proc/cpuinfo").read_text():
        assert not build.tiles_permitted()
    flags = " ".join(frozenset().union(*build.ISAS.values()))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor : 0\nflags\t: {flags}\n")
    monkeypatch.setattr(build, "tiles_permitted", lambda: permitted)
    assert cpu.usable_isas()[0] == best
    build.processor_features.cache_clear()


@pytest.mark.parametrize("isa", ["avx512", "sse9"])
def test_instruction_set_that_is_not_there(
    isa: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a fallback: whoever names one wants that one."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(build, "processor_features", lambda: AVX2)
    monkeypatch.setenv("ATTNSERVE_CPU_ISA", isa)
    with pytest.raises(
        ValueError, match=f"this processor has no {isa}: use one of avx2, portable$"
    ):
        cpu.load(get_variant("softpick"))
    assert place.compiled() == 0


def test_best_instruction_set_is_chosen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNSERVE_CPU_ISA")
    kernel = cpu.load(get_variant("softpick"))
    assert kernel is not None and kernel.isa == cpu.usable_isas()[0]
    (library,) = place.libraries()
    assert library.name.startswith(f"softpick-{kernel.isa}-")


@pytest.mark.parametrize("what", ["attention", "weights"])
def test_another_instruction_set_is_said(
    what: str, place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that is too old for the best one, for example."""
    monkeypatch.delenv("ATTNSERVE_CPU_ISA")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(build, "processor_features", lambda: AVX2)
    place.compile_with('case "$*" in *-mavx2*) echo "error: no avx2" >&2; exit 1;; esac')
    if what == "attention":
        check_bound(cpu.CPULayer)
    else:
        monkeypatch.setattr(ops, "loaded", {})
        assert ops.load(3)
    (record,) = said(caplog)
    which = "softpick attention" if what == "attention" else "a weight of 3 bits"
    start = f"attnserve: {which} runs with portable instructions instead of avx2, slower: "
    assert record.getMessage().startswith(start) and "error: no avx2" in record.getMessage()
