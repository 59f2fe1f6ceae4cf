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

from benchmarks.triton_compile.__main__ import violations
from benchmarks.triton_compile.loops import Loop, main_loops, of_amdgcn, of_sass

pytestmark = pytest.mark.integration

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def python(*arguments: str | Path) -> str:
    """Run Python and return its standard output."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which it must not heed
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compiled(*arguments: str | Path) -> list[dict[str, Any]]:
    """Return the rows of the command, which finds nothing wrong."""
    found = json.loads(python("-m", "benchmarks.triton_compile", "--json", *arguments))
    assert found["kernels"] == len(found["rows"]) and found["wrong"] == 0
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def test_registers_spills_and_shared_memory(tmp_path: Path) -> None:
    """Of a decode kernel for two makers of GPUs and two sizes of pages, beside vLLM's with the same
    tile."""
    path = tmp_path / "results.csv"
    rows = compiled("--match", "(sm_90|gfx942) 64 bfloat16 softpick decode( 64)?$", "--csv", path)
    kinds = [("sm_90", 16), ("sm_90", 64), ("gfx942", 16), ("gfx942", 64)]
    assert [(row["arch"], row["block_size"]) for row in rows] == kinds
    for row in rows:
        assert (row["kernel"], row["rows"], row["keys"], row["spills"]) == ("attend", 16, 64, 0)
        assert 32 < row["registers"] <= (255 if row["arch"] == "sm_90" else 512)
        # At least a tile of keys and one of values, or their half if they share the space.
        assert row["shared"] >= 64 * 64 * 2
        ratio = row["registers"] / row["vllm_registers"]
        assert row["registers_to_vllm"] == pytest.approx(ratio, abs=1e-3)
        threads = row["num_warps"] * (64 if row["arch"] == "gfx942" else 32)
        each = int(row["loop_instructions"]) / (16 * 64 / threads)
        assert row["per_score"] == f"{each:.1f}" and 10 < each < 100
    with path.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [int(row["registers"]) for row in written] == [row["registers"] for row in rows]


def test_gluon_on_hopper() -> None:
    """The kernel with a warp that copies: few instructions, products that overlap, and rings of two
    tiles of keys and values beside the queries in shared memory."""
    (row,) = compiled("--no-save", "--match", "sm_90 128 bfloat16 softmax prefill-gluon 64$")
    assert (row["kernel"], row["rows"], row["keys"]) == ("prefill", 128, 128)
    assert row["serialised"] is False and row["violation"] == ""
    assert 5 * 128 * 128 * 2 <= row["shared"] < 5 * 128 * 128 * 2 + 1024
    assert float(row["per_score"]) <= 8.5


def test_host_times() -> None:
    """In microseconds, of three launches and of one; a call that compiled would take seconds."""
    match = "sm_90 64 bfloat16 selective (decode-split|write)$"
    parts, write = json.loads(
        python("-m", "benchmarks.triton_compile", "--host", "--json", "--match", match)
    )["rows"]
    assert (parts["phase"], write["phase"]) == ("decode-split", "write")
    assert 1 < write["host_us"] < parts["host_us"] < 5000


def test_packed_products() -> None:
    """A product in parts is two kernels; with many rows the matrix is unpacked."""
    match = "sm_80 float16 (3 (256|4|0)$|2 16 two-level)"
    rows = compiled("--packed", "--no-save", "--match", match)
    assert [(row["rows"], row["kernel"]) for row in rows] == [
        *((16, "many"), (16, "add"), (4, "many"), (4, "add"), (256, "unpack"), (0, "gather"))
    ]
    assert all(row["registers"] > 32 for row in rows if row["kernel"] == "many")


def test_budgets() -> None:
    """The largest: a prefill's kernels, and what attends while decoding."""
    rows = compiled("--no-save", "--match", "(sm_90|gfx942) 64 bfloat16 selective budget-16384$")
    assert [row["kernel"] for row in rows] == 2 * ["select", "scan", "attend", "store", "attend"]
    assert all(row["violation"] == "" for row in rows)


def test_training() -> None:
    """Forward and backward, which the interpreter does not compile."""
    rows = compiled("--training", "--no-save", "--match", "sm_90 64 bfloat16 softpick$")
    assert [row["kernel"] for row in rows] == ["forward", "queries", "keys"]
    assert all(row["spills"] == 0 and row["registers"] > 64 for row in rows)
    assert [(row["rows"], row["keys"]) for row in rows] == [(128, 64), (128, 64), (32, 128)]


SCRIPT = '''
import json, os, sys
from pathlib import Path

folder = Path(sys.argv[1])
os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
import torch, triton
import triton.language as tl
from benchmarks.triton_compile.__main__ import compile_all
from benchmarks.triton_compile.dry import DryCompiler


@triton.jit
def sums_kernel(x, n, SIZE: tl.constexpr):
    """Keeps SIZE float32 sums a program."""
    at = x + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for i in range(n):
        total += tl.exp2(tl.load(at + i * SIZE))
    tl.store(at, total)


@triton.jit
def broken_kernel(x):
    tl.store(x, missing_name)


@triton.jit
def products_kernel(x, n, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """For each of n: a loop with one product and one exponential a score, the same with masks and
    one more exponential, and one with two products and two exponentials."""
    at = x + tl.arange(0, ROWS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    a = tl.load(at)
    total = tl.zeros([ROWS, KEYS], tl.float32)
    for _ in range(n):
        for i in range(n):
            total += tl.exp2(tl.dot(a, tl.load(at + i)))
        for i in range(n):
            s = tl.exp2(tl.dot(a, tl.load(at + i)))
            total += tl.where(tl.arange(0, KEYS)[None, :] < i, tl.exp2(s), 0.0)
        for i in range(n):
            b = tl.load(at + i)
            total = tl.dot(tl.exp2(tl.exp2(tl.dot(a, b))).to(b.dtype), b, total)
    tl.store(at, total)


compiler = DryCompiler(folder / "cache")
# A thread of 2048 / 32 sums, with at most 32 registers; of 8192 / 64, with 8 waves to share 512.
few = {"sm_80": {"maxnreg": 32}, "gfx942": {"waves_per_eu": 8}, "sm_90": {"maxnreg": 80}}


def launch(compiler, case):
    with compiler.target(case["arch"]) as found:
        if case["label"] == "broken":
            broken_kernel[(1,)](torch.empty(1))
        options = few[case["arch"]] if case["label"] == "few" else {}
        if "head_dim" in case:
            x = torch.empty(64 * 64, dtype=torch.bfloat16)
            products_kernel[(1,)](x, 5, ROWS=64, KEYS=64, **options)
            return [(found[0], None)]
        sums_kernel[(1,)](torch.empty(case["size"]), 5, SIZE=case["size"], num_warps=1, **options)
    return [(kernel, None) for kernel in found]


sizes = (("sm_80", 2048), ("gfx942", 8192))
todo = [{"arch": arch, "size": size, "label": k} for arch, size in sizes for k in ("all", "few")]
todo += [{"arch": "sm_90", "size": 0, "label": k, "head_dim": 64} for k in ("all", "few")]
todo.append({"arch": "sm_80", "size": 64, "label": "broken"})
print(json.dumps(compile_all(compiler, todo, launch)))
'''


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what SCRIPT prints."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    result: list[dict[str, Any]] = json.loads(python(folder / "script.py", folder).splitlines()[-1])
    return result


@pytest.mark.parametrize(("arch", "sums"), [("sm_80", 64), ("gfx942", 128)])
def test_spills_are_seen(rows: list[dict[str, Any]], arch: str, sums: int) -> None:
    """Of a loop whose sums fit the registers, and of the same with too few registers."""
    enough, few = (row for row in rows if row["arch"] == arch and row["size"] > 64)
    assert enough["spills"] == 0 and enough["violation"] == ""
    assert enough["registers"] >= sums
    assert few["registers"] <= 64 < few["spills"]
    assert few["violation"] == f"spills {few['spills']} B"


def test_a_kernel_that_does_not_compile_is_one_row(rows: list[dict[str, Any]]) -> None:
    row = rows[-1]
    assert "missing_name" in row["error"]
    assert row["registers"] is None


def test_loops_with_products(rows: list[dict[str, Any]]) -> None:
    """The innermost, of two that differ in masks the shorter; a program of 4 warps has 64 x 64
    scores, 32 a thread. With too few registers Hopper's products are not asynchronous."""
    enough, few = (row for row in rows if row["arch"] == "sm_90")
    for row in (enough, few):
        assert row["special"] == "1.00+2.00"
        one, two = map(int, row["loop_instructions"].split("+"))
        assert 32 * 2 < one < two  # at least the exponentials and sums
        assert row["per_score"] == f"{one / 32:.1f}+{two / 32:.1f}"
    assert (enough["serialised"], few["serialised"]) == (False, True)


LISTING = """
        Function : some_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x0000 */
        /*0010*/               @P0 BRA 0xb0 ;                  /* a loop, without a product */
        /*0020*/                   LDS R2, [R3] ;
        /*0030*/                   NOP ;
        /*0040*/              @!P1 BRA 0x90 ;                  /* out of line */
        /*0050*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0060*/                   MUFU.EX2 R2, R2 ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/               @P3 BRA 0x10 ;                  /* a loop around */
        /*0088*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5 ;
        /*00a0*/              @!P1 BRA 0x90 ;                  /* waits */
        /*00a8*/                   BRA 0x50 ;
        /*00b0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00c0*/               @P0 BRA 0xb0 ;
        /*00d0*/                   BRA 0x20 ;
"""


def test_a_loop_in_a_loop() -> None:
    """With a part out of line, which has a loop that waits: 5 instructions in line, 3 elsewhere."""
    assert main_loops(of_sass(LISTING)) == (Loop(instructions=8, products=1, special=1),)


AMD_LISTING = """
some_kernel:
\ts_load_dword s2, s[0:1], 0x0
.LBB0_1:                                ; a loop around
\ts_cbranch_scc1 .LBB0_4
\ts_branch .LBB0_3
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=2
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[50:51], v[66:67], v[2:17]
\ts_nop 7
\tv_exp_f32_e32 v1, v2
\ts_cbranch_scc0 .LBB0_1
.LBB0_3:                                ; =>  This Inner Loop Header: Depth=2
\tds_read_b64 v[50:51], v3             ; of shared memory
\ts_cbranch_vccnz .LBB0_2
\tv_mov_b32_e32 v50, 0
\ts_branch .LBB0_2
.LBB0_4:
\ts_endpgm
.Lfunc_end0:
\ts_cbranch_scc0 .LBB0_1
"""


def test_a_loop_of_amd() -> None:
    """Entered in the middle; of its 7 instructions two are passed by in some turns."""
    assert main_loops(of_amdgcn(AMD_LISTING)) == (Loop(instructions=7, products=1, special=1),)


BATCHES = """
import json, os, sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": sys.argv[1]}
from benchmarks.triton_compile.calls import compiled_kernels
from benchmarks.triton_compile.dry import DryCompiler

compiler = DryCompiler(Path(sys.argv[1]), keep=True)
found = {}
for name in sys.argv[2:]:
    variant, phase = name.split()
    case = {"arch": "sm_90", "head_dim": 64, "dtype": "bfloat16"}
    case |= {"variant": variant, "phase": phase}
    found[name] = compiled_kernels(compiler, case, (1, 16, 17, 20, 31, 32, 33, 64, 100, 128))
print(json.dumps(found))
"""


def test_kernels_of_many_batch_sizes(tmp_path: Path) -> None:
    """For ten numbers of requests few kernels are compiled: each is seconds of a server's."""
    script = tmp_path / "batches.py"
    script.write_text(BATCHES, encoding="utf-8")
    most = {
        # One for each number of parts, 32, 4, 2 and 1, and one that merges them where there are
        # several.
        "softpick decode-split": 2 * 3 + 1,
        # On a device of one multiprocessor, which any number of requests fills.
        "softpick prefill": 1,
        # What each tile selects, what those before it have, and attention.
        "selective prefill": 3,
    }
    found = json.loads(python(script, tmp_path / "cache", *most).splitlines()[-1])
    counts = {name: sum(map(len, of.values())) for name, of in found.items()}
    assert counts == most


START = """
import json, os, sys
from pathlib import Path

folder = Path(sys.argv[1])
os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
os.environ["ATTNSERVE_TRITON_CONFIGS"] = str(folder)
import torch
from attn_kernels import get_variant
from attn_kernels.batch import Batch
from attn_kernels.triton import TritonLayer, launch, tuned, warm
from attn_kernels.triton.tuning import GLUON, Tile
from benchmarks.triton_compile.dry import DryCompiler

kind = tuned.Kind("short-prefill", "softpick", "float16", "float16", 64, 2, 16)
text = tuned.text_of("sm_90", {kind: Tile(64, 64, 4, 2, GLUON)})
(folder / "sm_90.json").write_text(text)
compiler = DryCompiler(folder / "cache", keep=True)
counts = []
with compiler.target("sm_90") as found:
    kv = torch.zeros(1, 1, 16, 128, dtype=torch.float16)
    layer = TritonLayer(get_variant("softpick"), kv, num_heads=2, scale=0.1, arch="sm_90")
    with launch.compile_only():
        warm.compile_launches(
            layer, torch.float16, max_num_reqs=1, max_num_tokens=64, max_seq_len=64
        )
    counts.append(sorted(kernel.name for kernel in found))
    query = torch.zeros(40, 2, 64, dtype=torch.float16)
    batch = Batch(
        torch.zeros(1, 4, dtype=torch.int32),
        torch.tensor([0, 40], dtype=torch.int32),
        torch.tensor([50], dtype=torch.int32),
        max_query_len=40,
        max_seq_len=50,
    )
    layer.attend(query, batch, torch.empty_like(query))
    counts.append(sorted(kernel.name for kernel in found))
print(json.dumps(counts))
"""


def test_start_up_compiles_what_a_table_names(tmp_path: Path) -> None:
    """In Gluon, with a descriptor of the cache among its arguments; a request compiles nothing."""
    script = tmp_path / "script.py"
    script.write_text(START, encoding="utf-8")
    before, after = json.loads(python(script, tmp_path).splitlines()[-1])
    assert before.count("prefill_kernel") == 1 and after == before


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ({}, ""),
        ({"spills": 32}, "spills 32 B"),
        ({"shared": 65540}, "shared memory 65540 B of 65536"),
        ({"serialised": True}, "products are serialised"),
    ],
)
def test_limits(worse: dict[str, Any], said: str) -> None:
    row = {"spills": 24, "shared": 65536, "arch": "gfx942", "serialised": False}
    assert violations(row | worse) == said


@pytest.mark.parametrize(
    ("match", "said"), [("sm_70", "is in no case's name"), ("(", "is no regular expression")]
)
def test_no_case_is_one_line(match: str, said: str) -> None:
    command = [sys.executable, "-m", "benchmarks.triton_compile", "--match", match]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert f"--match {match!r} {said}" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_whole_matrix(arch: str, head_dim: int) -> None:
    """Every kernel compiles and keeps the limits."""
    assert len(compiled("--no-save", "--match", f"{arch} {head_dim} ")) > 50


LAUNCHES = """
import json, os, sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": sys.argv[1]}
import torch, triton
from benchmarks.triton_compile.dry import DryCompiler
from attn_kernels import get_variant
from attn_kernels.batch import Batch
from attn_kernels.pruning import PageShape
from attn_kernels.triton import TritonPrunedLayer
from attn_kernels.triton.launch import Launcher

compiler = DryCompiler(Path(sys.argv[1]), keep=True)
launched = []


def seen(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else repr(x)


triton.runtime.driver.active.launcher_cls = (
    lambda source, _: lambda *args: launched.append([
        source.name, *(found for found in map(seen, args) if " at 0x" not in str(found))  # a hook
    ])
)
page = PageShape(64, 2, 64, torch.bfloat16)
pages = torch.empty(3, page.num_bytes, dtype=torch.uint8)
layer = TritonPrunedLayer(get_variant("selective"), pages, page, num_heads=4, scale=0.1)
batch = Batch(
    torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 900]), torch.tensor([900]),
    max_query_len=900,
)
q, k = torch.empty(900, 4, 64).bfloat16(), torch.empty(900, 2, 64).bfloat16()
out = torch.empty_like(q)
with compiler.target("sm_90"):
    layer.step(q, k, k, batch, out)
    Launcher.again = Launcher.__call__
    layer.step(q, k, k, batch, out)
print(json.dumps(launched))
"""


def test_launches_that_are_repeated(tmp_path: Path) -> None:
    """A prefill within a budget launches the same in each chunk but for where it begins, whether
    the arguments are looked at anew or not."""
    script = tmp_path / "launches.py"
    script.write_text(LAUNCHES, encoding="utf-8")
    found = json.loads(python(script, tmp_path / "cache").splitlines()[-1])
    repeated, anew = found[:16], found[16:]
    names = ["select_kernel", "scan_kernel", "attend_kernel", "store_kernel"]
    assert [name for name, *_ in repeated] == 4 * names
    assert repeated == anew and len({str(launch) for launch in repeated}) == 16
