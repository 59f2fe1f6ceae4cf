"""`python -m benchmarks.triton_compile`: real compilations, each in a process of its own, because
it replaces Triton's driver and other tests interpret the same kernels."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.triton_compile import ARCHS, HEAD_DIMS, listing
from benchmarks.triton_compile.__main__ import parse

SMALL = ["--variants", "softpick", "--head-dims", "64", "--dtypes", "bfloat16"]
SMALL += ["--phases", "decode", "--no-vllm"]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which it must not heed
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment
    )


def compile_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "benchmarks.triton_compile", *arguments)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a run that compiled one kernel for two GPUs."""
    path = tmp_path_factory.mktemp("compile") / "results.csv"
    done = compile_kernels(*SMALL, "--archs", "sm_90", "gfx942", "--csv", str(path))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["kernels"], summary["failed"], summary["violations"]) == (2, 0, {})
    assert "all 2 kernels compile and keep the limits" in done.stdout
    return path


def test_figures_of_a_compiled_kernel(kept: Path) -> None:
    with kept.open(encoding="utf-8", newline="") as file:
        hopper, cdna = list(csv.DictReader(file))
    assert (hopper["arch"], cdna["arch"]) == ("sm_90", "gfx942")
    for row, most in ((hopper, 255), (cdna, 512)):
        figures = {
            name: int(row[name]) for name in ("rows", "keys", *listing.Figures.__annotations__)
        }
        assert (figures["rows"], figures["keys"], figures["spills"]) == (16, 64, 0)
        assert 32 < figures["registers"] <= most
        # At least a tile of keys and one of values, or their half if they share the space.
        assert figures["shared"] >= 64 * 64 * 2
        # A program's 16 x 64 weights, with four warps of 32 or 64 threads.
        lanes = 128 if row is hopper else 256
        assert figures["loop_special"] >= 16 * 64 / lanes
        assert figures["loop"] > figures["loop_matrix"] + figures["loop_special"]
        assert figures["loop_matrix"] > 0
    # Two products of 16 x 64 x 64 by four warps, with HMMA.16816.
    assert int(hopper["loop_matrix"]) == 2 * 16 * 64 * 64 // (16 * 8 * 16) // 4


def test_what_has_been_compiled_is_not_again(kept: Path) -> None:
    before = kept.read_bytes()
    done = compile_kernels(*SMALL, "--archs", "gfx942", "sm_90", "--csv", str(kept))
    assert done.returncode == 0, done.stderr
    assert kept.read_bytes() == before
    assert json.loads(done.stdout.splitlines()[-1])["kernels"] == 2


SCRIPT = '''
import dataclasses, json, os, sys
from pathlib import Path

folder = Path(sys.argv[1])
os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
import torch, triton
import triton.language as tl
from attn_kernels.triton.variants import softmax
from attn_kernels.variant import register
from attn_kernels.variants.softmax import Softmax
from benchmarks.triton_compile import run
from benchmarks.triton_compile.dry import DryCompiler
from benchmarks.triton_compile.matrix import Case


@triton.jit
def sums(x, n, SIZE: tl.constexpr):
    """Keeps SIZE float32 sums a program."""
    at = x + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for i in range(n):
        total += tl.exp2(tl.load(at + i * SIZE))
    tl.store(at, total)


compiler = DryCompiler(folder / "cache")
out = {}
# A thread of 2048 / 32 sums, with at most 32 registers; of 8192 / 64, with 8 waves to share 512.
few = {"sm_80": {"maxnreg": 32}, "gfx942": {"waves_per_eu": 8}}
for arch, size in (("sm_80", 2048), ("gfx942", 8192)):
    for name, options in (("all", {}), ("few", few[arch])):
        with compiler.target(arch) as found:
            sums[(1,)](torch.empty(size), 5, SIZE=size, num_warps=1, **options)
        out[f"{arch} {name}"] = dataclasses.asdict(found[0].figures)


@register
@dataclasses.dataclass(frozen=True)
class Broken(Softmax):
    name = "broken"
    triton_module = "broken_triton"

sys.path.insert(0, str(folder))
rows = run.Matrix(compiler, None).rows(Case("sm_90", 64, "bfloat16", "broken", "decode"))
out["broken"] = [rows[0]["error"], rows[0]["registers"]]

row = {"spills": 24, "loop_spills": 0, "shared": 65536, "arch": "gfx942", "registers_to_vllm": 1.1}
spills = {"spills": 32}, {"spills": 8, "loop_spills": 2}
worse = ({}, *spills, {"shared": 65540}, {"registers_to_vllm": 1.11})
out["violations"] = [run.violations(row | other) for other in worse]

(folder / "other.csv").write_text("a,b\\n1,2\\n")
try:
    run.read_csv(folder / "other.csv")
except ValueError as error:
    out["other"] = str(error)
print(json.dumps(out))
'''

BROKEN = """
import triton
from attn_kernels.triton.variants.softmax import FIRST_MAX, UNIT_KEYS, epilogue, merge, query_factor

@triton.jit
def update(s, seen, running_max, denominator, mean, per_spread, params):
    return s, missing_name, running_max, denominator
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SCRIPT prints."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "broken_triton.py").write_text(BROKEN, encoding="utf-8")
    done = python(str(folder / "script.py"), str(folder))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("arch", "sums"), [("sm_80", 64), ("gfx942", 128)])
def test_spills_are_seen(found: dict[str, Any], arch: str, sums: int) -> None:
    """Of a loop whose sums fit the registers, and of the same with too few registers."""
    enough, few = found[f"{arch} all"], found[f"{arch} few"]
    assert enough["spills"] == 0
    assert enough["registers"] >= sums
    assert few["registers"] <= 64 < few["spills"]
    assert enough["loop_spills"] == 0 < few["loop_spills"]


def test_a_kernel_that_does_not_compile_is_one_row(found: dict[str, Any]) -> None:
    error, registers = found["broken"]
    assert "missing_name" in error
    assert registers is None


def test_limits(found: dict[str, Any]) -> None:
    assert found["violations"] == [
        "",
        "spills 32 B, 0 loads and stores in the loop",
        "spills 8 B, 2 loads and stores in the loop",
        "shared memory 65540 B of 65536",
        "registers 1.11 of vLLM's",
    ]


def test_loops_of_sass() -> None:
    """A loop is what can reach itself: also a block behind the end that jumps back into it, and not
    what a branch jumps over."""
    text = """
        /*0000*/                   S2R R0, SR_CTAID.X ;           /* 0x0 */
        /*0010*/                   MUFU.EX2 R1, R2 ;              /* 0x0 */
        /*0020*/              @!P0 BRA 0x60 ;                     /* 0x0 */
        /*0030*/                   FFMA R1, R2, R3, R1 ;          /* 0x0 */
        /*0040*/               @P1 BRA 0x10 ;                     /* 0x0 */
        /*0050*/                   EXIT ;                         /* 0x0 */
        /*0060*/                   FADD R1, R2, R3 ;              /* 0x0 */
        /*0070*/                   BRA 0x30 ;                     /* 0x0 */
        /*0080*/                   BRA 0x80;                      /* 0x0 */
    """
    (loop,) = [loop for loop in listing.loops(listing.sass(text)) if len(loop) > 1]
    assert [i.name for i in loop] == ["MUFU.EX2", "BRA", "FFMA", "BRA", "FADD", "BRA"]


def test_loops_of_amdgcn() -> None:
    text = """
kernel:
	s_load_dword s0, s[4:5], 0x0
.LBB0_1:                                ; a loop
	v_exp_f32_e32 v0, v0
	s_cbranch_execz .LBB0_3
	v_fma_f32 v0, v1, v2, v3
.LBB0_3:
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.Lfunc_end0:
	v_never
"""
    (loop,) = listing.loops(listing.amdgcn(text))
    names = ["v_exp_f32_e32", "s_cbranch_execz", "v_fma_f32", "s_cbranch_scc1"]
    assert [i.name for i in loop] == names


def test_a_csv_with_other_columns_is_left_alone(found: dict[str, Any]) -> None:
    assert "other.csv has other columns; move it away" in found["other"]


def test_unknown_gpus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--archs", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_whole_matrix(arch: str, head_dim: int) -> None:
    """Every kernel compiles and keeps the limits."""
    done = compile_kernels("--archs", arch, "--head-dims", str(head_dim), "--csv", "none")
    assert done.returncode == 0, done.stdout[-4000:]
