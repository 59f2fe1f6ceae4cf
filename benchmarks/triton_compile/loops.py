"""The loops in a kernel's machine code that multiply matrices.

A kernel without such a loop, as one that computes in float32, has none here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import networkx  # type: ignore[import-untyped]  # it ships no types

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
"""Of an instruction of NVIDIA's: its address and what it does."""

AMD_LINE = re.compile(r"^(?:(\.LBB\w+):|\t([sv_a-z]\w+)[ \t]*([^;\n]*))", re.MULTILINE)
"""Of AMD's: a label, or an instruction's name and operands."""

PRODUCT = re.compile(r"\w*MMA\b|v_s?mfma_")
"""Names of matrix products (HMMA, on Hopper HGMMA, on Blackwell UTCHMMA)."""

SPECIAL = re.compile(r"MUFU\b|v_(exp|log|rcp|rsq|sqrt)_")
"""Names of exponentials, logarithms, reciprocals and roots."""

NOTHING = ("NOP", "s_nop")


class Instruction(NamedTuple):
    """One line of machine code.

    Attributes:
        name: without operands, "HMMA.16816.F32.BF16".
        target: index of the instruction that it may jump to.
        falls: whether the next one may follow.
    """

    name: str
    target: int | None
    falls: bool


class Loop(NamedTuple):
    """What a warp issues in one turn of a loop: all instructions but NOP, and those of two
    kinds."""

    instructions: int
    products: int
    special: int


def main_loops(code: Sequence[Instruction]) -> tuple[Loop, ...]:
    """Return the innermost loops with matrix products, in the order of their addresses. Of loops
    with as many products, which do the same with masks and without, only the shortest."""
    graph = networkx.DiGraph()
    for index, each in enumerate(code):
        if each.falls and index + 1 < len(code):
            graph.add_edge(index, index + 1)
        if each.target is not None:
            graph.add_edge(index, each.target)
    shortest: dict[int, Loop] = {}
    for nodes in sorted(map(sorted, innermost(graph, code))):
        names = [code[index].name for index in nodes if code[index].name not in NOTHING]
        products, special = (sum(map(bool, map(kind.match, names))) for kind in (PRODUCT, SPECIAL))
        loop = Loop(len(names), products, special)
        shortest[products] = min(loop, shortest.get(products, loop))
    return tuple(shortest.values())


def of_sass(text: str) -> list[Instruction]:
    """Return the instructions of one kernel, as `cuobjdump -sass` prints it."""
    lines = LINE.findall(text)
    places = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    found = []
    for _, line in lines:
        predicated, words = line.startswith("@"), line.split()
        base = words[predicated].partition(".")[0]
        jump = re.search(r"(0x[0-9a-f]+)$", line) if base == "BRA" else None
        # A third word is a condition.
        always = base in ("EXIT", "RET") or (base == "BRA" and len(words) == 2)
        target = places.get(int(jump[1], 16)) if jump else None
        found.append(Instruction(words[predicated], target, predicated or not always))
    return found


def of_amdgcn(text: str) -> list[Instruction]:
    """Return the instructions of the assembly text of one kernel."""
    lines = AMD_LINE.findall(text.partition("\n.Lfunc_end")[0])
    names = [(name, operands.strip()) for _, name, operands in lines if name]
    places: dict[str, int] = {}
    count = 0
    for label, name, _ in lines:
        if label:
            places[label] = count
        count += bool(name)
    return [
        Instruction(
            name,
            places.get(operands) if "branch" in name else None,
            name not in ("s_branch", "s_endpgm"),
        )
        for name, operands in names
    ]


def innermost(graph: Any, code: Sequence[Instruction]) -> Iterator[set[int]]:
    """Yield the instructions of each loop with matrix products that has no such loop inside.

    A loop: instructions that can reach one another. What is inside still can without those at which
    the loop is entered.
    """

    def within(part: Any) -> Iterator[set[int]]:
        for nodes in networkx.strongly_connected_components(part):
            if len(nodes) > 1 and any(PRODUCT.match(code[index].name) for index in nodes):
                entries = {node for node in nodes if not nodes.issuperset(graph.pred[node])}
                yield from list(within(part.subgraph(nodes - entries))) or [nodes]

    yield from within(graph)
