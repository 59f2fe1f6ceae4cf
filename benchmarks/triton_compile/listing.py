"""What a compiler made of a kernel, read from its machine code: registers, spills, the main loop.

NVIDIA: `cuobjdump` (it comes with Triton) of the cubin. AMD: the text that the assembler was given.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx  # type: ignore[import-untyped]  # it ships no types


@dataclass(frozen=True)
class Figures:
    """Of one compiled kernel.

    Attributes:
        registers: of a thread, 32 bits each: at most 255 (NVIDIA), 512 (AMD: VGPRs and AGPRs).
        spills: bytes of memory a thread has for what its registers do not hold.
        shared: bytes of shared memory (AMD: LDS) of a program.
        loop: instructions in the loops over keys (over queries in select_kernel), each tile's work;
            0 where there is no such loop. lssar's two passes are added up.
        loop_matrix: of these, matrix products on tensor (AMD: matrix) cores.
        loop_fma: float32 multiply-adds outside of them, a matrix product in float32 among them.
        loop_special: exponentials, logarithms, reciprocals, roots (NVIDIA: MUFU).
        loop_spills: loads and stores of spilled registers.
    """

    registers: int
    spills: int
    shared: int
    loop: int
    loop_matrix: int
    loop_fma: int
    loop_special: int
    loop_spills: int


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        name: without operands: "HMMA.16816.F32.BF16", "v_mfma_f32_16x16x16_bf16".
        target: index of the instruction that it may jump to.
        falls: whether the next one may follow.
    """

    name: str
    target: int | None
    falls: bool


SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
SASS_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
AMD_USAGE = re.compile(
    r"^\s+(?:- )?\.(\w+_count|private_segment_fixed_size):\s+(\d+)", re.MULTILINE
)


def sass(text: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` printed, of one kernel."""
    lines = SASS.findall(text)
    places = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    found = []
    for _, line in lines:
        predicate, words = line.startswith("@"), line.split()
        operation = words[predicate]
        base = operation.partition(".")[0]
        jump = re.search(r"(0x[0-9a-f]+)$", line) if base == "BRA" else None
        always = not predicate and (base in ("EXIT", "RET") or (base == "BRA" and len(words) == 2))
        target = places.get(int(jump[1], 16)) if jump else None
        found.append(Instruction(operation, target, not always))
    return found


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of the first function of an AMD assembly text."""
    lines: list[list[str]] = []
    places: dict[str, int] = {}
    for line in text.partition(".Lfunc_end0:")[0].splitlines():
        code = line.partition(";")[0].strip()
        if code.endswith(":"):
            places[code[:-1]] = len(lines)
        elif code and not code.startswith("."):
            lines.append(code.split())
    jumps = ("s_branch", "s_cbranch")
    return [
        Instruction(
            words[0],
            places.get(words[-1]) if words[0].startswith(jumps) else None,
            words[0] not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        )
        for words in lines
    ]


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The loops, each with those inside it: instructions that can reach one another."""
    graph = networkx.DiGraph()
    for index, instruction in enumerate(code):
        if instruction.falls and index + 1 < len(code):
            graph.add_edge(index, index + 1)
        if instruction.target is not None:
            graph.add_edge(index, instruction.target)
    parts = networkx.strongly_connected_components(graph)
    return [[code[index] for index in sorted(part)] for part in parts if len(part) > 1]


@dataclass(frozen=True)
class Machine:
    """Patterns of instruction names: of matrix products, multiply-adds, special functions, and the
    memory where spilled registers are."""

    matrix: re.Pattern[str]
    fma: re.Pattern[str]
    special: re.Pattern[str]
    spill: re.Pattern[str]

    def figures(self, registers: int, spills: int, shared: int, code: list[Instruction]) -> Figures:
        """With the counts of the main loops: those that compute in floating point, which the search
        for a tile's request does not."""
        computes = (self.matrix.match, self.fma.match, self.special.match)
        names = [
            [i.name for i in loop if i.name != "NOP"]
            for loop in loops(code)
            if any(match(i.name) for i in loop for match in computes)
        ]
        flat = [name for loop in names for name in loop]

        def count(matches: Callable[[str], object]) -> int:
            return sum(matches(name) is not None for name in flat)

        return Figures(
            registers,
            spills,
            shared,
            len(flat),
            count(self.matrix.match),
            count(self.fma.match),
            count(self.special.match),
            count(self.spill.match),
        )


# HMMA, on Hopper HGMMA, on Blackwell UTCHMMA; there also FFMA2, two at once.
NVIDIA = Machine(*map(re.compile, (r"\w*MMA\b", r"FFMA2?\b", r"MUFU\b", r"(LDL|STL)\b")))
AMD = Machine(
    re.compile(r"v_mfma_"),
    re.compile(r"v_(pk_)?(fma|fmac|mac|mad)_f32"),
    re.compile(r"v_(exp|log|rcp|rsq|sqrt)_f32"),
    re.compile(r"scratch_(load|store)_"),
)


def read_cubin(cubin: bytes, shared: int, cuobjdump: str) -> Figures:
    """Figures of an NVIDIA binary of one kernel.

    Args:
        cubin: the binary.
        shared: bytes of shared memory that it is launched with.
        cuobjdump: path of NVIDIA's tool.

    Raises:
        ValueError: it is not the output that this reads.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = SASS_USAGE.search(text)
    if usage is None:
        raise ValueError("cuobjdump prints no resource usage that this program can read")
    registers, stack, local = map(int, usage.groups())
    return NVIDIA.figures(registers, stack + local, shared, sass(text))


def read_amdgcn(text: str, shared: int) -> Figures:
    """Figures of an AMD assembly text of one kernel.

    Args:
        text: the assembly.
        shared: bytes of LDS that it is launched with.

    Raises:
        ValueError: it is not the text that this reads.
    """
    usage = {name: int(value) for name, value in AMD_USAGE.findall(text)}
    try:
        registers = usage["vgpr_count"]  # AGPRs included
        spills = max(usage["private_segment_fixed_size"], 4 * usage["vgpr_spill_count"])
    except KeyError as error:
        raise ValueError(f"the AMD assembly text names no {error}") from None
    return AMD.figures(registers, spills, shared, amdgcn(text))
