"""A whole run: compile each case, hold the figures against the limits, keep them in the CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import triton
from tqdm import tqdm

from attn_kernels.triton import attention
from attn_kernels.triton.tuning import SHARED_MEMORY
from attnserve import machine
from benchmarks.triton_compile import WRITE
from benchmarks.triton_compile.dry import Compiled, DryCompiler
from benchmarks.triton_compile.listing import Figures
from benchmarks.triton_compile.matrix import Case, compile_case
from benchmarks.triton_compile.peer import Vllm

ONE_PASS = ("softmax", "softpick", "ssmax")
"""Variants that are held against vLLM's softmax."""

PEER_DTYPES = ("bfloat16", "float16")
"""In float32 vLLM multiplies in TF32, which is another thing; float8 it scales elsewhere."""

REGISTERS_TO_VLLM = 1.10
"""Most registers, by vLLM's at the same tile."""

SPILLS = 24
"""Most bytes of a thread, and none in the loop: ptxas puts a few registers away once a program, for
some kernels even where it has registers left (docs/LOG.md)."""

FIGURES = tuple(field.name for field in dataclasses.fields(Figures))
TILE = ("rows", "keys", "num_warps", "num_stages")
CASE = tuple(field.name for field in dataclasses.fields(Case))
CODES = ("code", "vllm_code", "vllm_own_code")
ABOUT = ("date", "commit", "triton", "vllm")
COLUMNS = (
    *ABOUT,
    *CASE,
    "kernel",
    *TILE,
    *FIGURES,
    *(f"vllm_{name}" for name in FIGURES),
    "registers_to_vllm",
    *(f"vllm_own_{name}" for name in (*TILE, *FIGURES)),
    *CODES,
    "violation",
    "error",
)

Row = dict[str, Any]


def about() -> Row:
    """The software, as in the CSV: nothing here depends on the machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "triton": triton.__version__,
        "vllm": machine.package("vllm"),
    }


def launch_name(compiled: Compiled) -> str:
    """The kernel's name without "_kernel", or which of its two passes this is."""
    passes = {attention.STATISTICS.value: "statistics", attention.OUTPUT.value: "output"}
    number = compiled.constants.get("PASS")
    return passes.get(getattr(number, "value", number), compiled.kernel.removesuffix("_kernel"))


def tile_of(compiled: Compiled) -> Row:
    """Its tile, ours or vLLM's names for it; rows and keys are None where it has none."""
    constants = compiled.constants
    return {
        "rows": constants.get("ROWS", constants.get("BLOCK_M")),
        "keys": constants.get("KEYS", constants.get("TILE_SIZE")),
        "num_warps": compiled.num_warps,
        "num_stages": compiled.num_stages,
    }


def violations(row: Row) -> str:
    """What a row exceeds, in words; empty: nothing."""
    found = []
    if row["spills"] > SPILLS or row["loop_spills"]:
        inside = f"{row['loop_spills']} loads and stores in the loop"
        found.append(f"spills {row['spills']} B, {inside}")
    limit = SHARED_MEMORY[row["arch"]]
    if row["shared"] > limit:
        found.append(f"shared memory {row['shared']} B of {limit}")
    ratio = row.get("registers_to_vllm")
    if ratio is not None and ratio > REGISTERS_TO_VLLM:
        found.append(f"registers {ratio:.2f} of vLLM's")
    return "; ".join(found)


@dataclass
class Matrix:
    """Compiles cases and vLLM's kernel beside them.

    Attributes:
        compiler: the dry driver.
        peer: vLLM's kernel; None leaves it out.
    """

    compiler: DryCompiler
    peer: Vllm | None

    def rows(self, case: Case) -> list[Row]:
        """One row a kernel; one that does not compile has `error`, and ends its call."""
        failed: list[Row] = []
        self.compiler.found = []
        try:
            compiled = compile_case(self.compiler, case)
        except Exception as error:  # the compiler raises all kinds; the other cases go on
            compiled = self.compiler.found  # what the call launched before
            row = dict.fromkeys(COLUMNS) | dataclasses.asdict(case)
            failed = [row | {"kernel": case.phase, "violation": "", "error": reason(error)}]
        return [self.row(case, kernel) for kernel in compiled] + failed

    def row(self, case: Case, kernel: Compiled) -> Row:
        """One row, with vLLM's figures where they can be compared."""
        row = dict.fromkeys(COLUMNS) | dataclasses.asdict(case) | tile_of(kernel)
        row |= dataclasses.asdict(kernel.figures) | {"kernel": launch_name(kernel), "error": ""}
        row["code"] = kernel.code
        compared = case.variant in ONE_PASS and case.dtype in PEER_DTYPES and case.phase != WRITE
        if self.peer is not None and compared and row["kernel"] == "attend":
            row |= self.vllm(self.peer, case, kernel)
        if row["vllm_registers"]:
            row["registers_to_vllm"] = round(row["registers"] / row["vllm_registers"], 3)
        return row | {"violation": "; ".join(filter(None, (row["violation"], violations(row))))}

    def vllm(self, peer: Vllm, case: Case, kernel: Compiled) -> Row:
        """vLLM's figures with this kernel's tile and with its own."""
        found: Row = {}
        for prefix, ours in (("vllm_", kernel), ("vllm_own_", None)):
            try:
                (theirs,) = peer.compile(self.compiler, case, ours)
            except Exception as error:  # theirs does not compile: there is nothing to compare
                found["violation"] = f"vLLM's kernel does not compile: {reason(error)}"
                continue
            figures = dataclasses.asdict(theirs.figures) | {"code": theirs.code}
            figures |= {} if ours else tile_of(theirs)
            found |= {prefix + name: value for name, value in figures.items()}
        return found


def reason(error: BaseException) -> str:
    """The compiler's line: of the innermost error, which says what is wrong and not only where."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    # Triton's errors first quote the place in the source, which is many lines.
    text = lines[-1] if lines else "no message"
    return f"{type(error).__name__}: {text}"[:300]


def read_csv(path: Path) -> list[Row]:
    """The kept rows, none if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        if file.readline().rstrip("\n") != ",".join(COLUMNS):
            raise ValueError(f"{path} has other columns; move it away or name another --csv")
    frame = pd.read_csv(path)
    frame = frame.convert_dtypes().astype(object)
    rows = frame.where(frame.notna(), None).to_dict("records")
    texts = {"violation": "", "error": ""}
    return [{str(k): texts.get(str(k)) if v is None else v for k, v in x.items()} for x in rows]


def known(rows: Iterable[Row]) -> dict[str, Figures]:
    """What has been compiled, ours and vLLM's, by `Compiled.code`."""
    return {
        row[prefix + "code"]: Figures(**{name: row[prefix + name] for name in FIGURES})
        for row in rows
        for prefix in ("", "vllm_", "vllm_own_")
        if row[prefix + "code"] is not None
    }


def identity(row: Row) -> tuple[Any, ...]:
    """Two rows with the same are the same result."""
    return tuple(row[name] for name in (*CASE, "kernel", *CODES, "error"))


def run(matrix: Matrix, todo: Sequence[Case], csv: Path | None) -> list[Row]:
    """Compile `todo` in order; append to the CSV, call by call, what it does not have."""
    kept = {identity(row) for row in read_csv(csv)} if csv is not None else set()
    software, rows = about(), []
    progress = tqdm(todo, unit="call", disable=None)
    for case in progress:
        progress.set_postfix_str(str(case))
        found = [row | software for row in matrix.rows(case)]
        rows += found
        new = [row for row in found if identity(row) not in kept]
        if csv is not None and new:
            frame = pd.DataFrame(new, columns=list(COLUMNS)).astype(object)
            frame.to_csv(csv, mode="a", header=not csv.exists(), index=False)
    return rows
