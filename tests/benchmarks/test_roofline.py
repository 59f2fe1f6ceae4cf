"""The roofline's counts against what Triton's interpreter loads, stores and computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_kernels import Variant, get_variant, variant_names
from attn_kernels import variant as registry
from attn_kernels.batch import Batch
from attn_kernels.paged import STATE_BYTES
from benchmarks.kernels.case import Case, Paging

if TYPE_CHECKING:
    from benchmarks.roofline.count import Counts

GROUPS = {
    "keys": ("keys", "keys again", "keys of head 0", "selecting keys"),
    "values": ("values",),
    "accumulators": ("accumulators",),
    "queries": ("queries", "queries of head 0", "selecting queries"),
    "outputs": ("outputs",),
    "learned": ("learned",),
    "block table": ("block table",),
    "snapshots": ("snapshots",),
    "part_outputs": ("part outputs",),
    "part_rows": ("part rows",),
    "observed": ("observed",),
}
"""What an address tells, and the streams that are counted there."""

DECODE = Case("decode", "fp32", 32, 70, 1, 1, 4, 2, 16)
PREFILL = Case("prefill", "fp32", 48, 20, 2, 34, 6, 2, 16)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """As in test_triton: kernels that are imported from now on are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


class Watch:
    """Counts what the interpreter does: bytes by tensor, products, exponentials."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.bytes: Counter[str] = Counter()
        self.flops = self.special = 0
        self.touched: list[tuple[Any, int]] = []
        plain = {
            name: getattr(InterpreterBuilder, name)
            for name in ("create_masked_load", "create_masked_store", "create_dot", "unary_op",
                         "binary_op")
        }  # fmt: skip

        def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.touch(pointers, mask)
            return plain["create_masked_load"](builder, pointers, mask, *rest)

        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.touch(pointers, mask)
            return plain["create_masked_store"](builder, pointers, value, mask, *rest)

        def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.flops += 2 * a.data.size * b.data.shape[-1]
            return plain["create_dot"](builder, a, b, *rest)

        def unary(builder: Any, x: Any, operation: Any) -> Any:
            if operation in (np.exp2, np.log2, np.log, np.exp, np.sqrt):
                self.special += x.data.size
            return plain["unary_op"](builder, x, operation)

        def binary(builder: Any, a: Any, b: Any, operation: Any) -> Any:
            if operation is np.divide:
                self.special += max(a.data.size, b.data.size)
            return plain["binary_op"](builder, a, b, operation)

        for name, wrapped in zip(plain, (load, store, dot, unary, binary), strict=True):
            monkeypatch.setattr(InterpreterBuilder, name, wrapped)

    def touch(self, pointers: Any, mask: Any) -> None:
        """Remember the addresses."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data.astype(bool)]
        self.touched.append((addresses, size))

    def sort(self, layer: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Add the bytes up by the tensors they are in."""
        kv = layer.kv_cache
        of_keys = kv.shape[2] * layer.head_size * kv.element_size()
        for addresses, size in self.touched:
            for name, tensor in tensors.items():
                offset = addresses.astype(np.int64) - tensor.data_ptr()
                offset = offset[(offset >= 0) & (offset < tensor.nbytes)]
                if name == "cache":
                    inside = offset % (kv.stride(1) * kv.element_size()) // of_keys
                    for index, part in enumerate(("keys", "values", "accumulators")):
                        self.bytes[part] += size * int((inside == index).sum())
                else:
                    self.bytes[name.rstrip("01")] += size * offset.size


def watched(variant: Variant, case: Case, processors: int, watch: Watch) -> None:
    """One call of the kernels on a random cache."""
    from attn_kernels.triton import TritonLayer

    torch.manual_seed(0)
    paging = Paging(case, 1)
    content = 2 * case.head_dim + variant.stateful * STATE_BYTES // 4
    kv = torch.randn(paging.num_blocks, case.num_kv_heads, case.block_size, content)
    learned = {name: torch.ones(case.num_heads) for name in variant.learned}
    layer = TritonLayer(variant, kv, num_heads=case.num_heads, scale=0.1, learned=learned)
    layer.num_processors = processors
    query = torch.randn(case.batch * case.new_tokens, case.num_heads, case.head_dim)
    out = torch.zeros_like(query)
    batch = Batch(
        paging.tables[0],
        torch.arange(case.batch + 1) * case.new_tokens,
        torch.full((case.batch,), case.seq_len),
        max_query_len=case.new_tokens,
        max_seq_len=case.seq_len,
    )
    layer.attend(query, batch, out)
    tensors = {"cache": kv, "queries": query, "outputs": out, "block table": batch.block_table}
    tensors |= {f"learned{i}": t for i, t in enumerate(layer.learned) if t is not None}
    tensors |= {name: buffers[-1] for name, buffers in layer.scratch.buffers.items()}
    watch.sort(layer, tensors)


def counted(name: str, case: Case, processors: int) -> Counts:
    from benchmarks.roofline.count import count

    return count(get_variant(name), case, "sm_90", processors)


@pytest.mark.parametrize(
    ("name", "case", "processors"),
    [
        *((name, DECODE, 4) for name in variant_names()),
        *((name, DECODE, 1) for name in ("lssar", "selective")),
        *((name, PREFILL, 4) for name in variant_names()),
    ],
    ids=lambda value: getattr(value, "phase", value),
)
def test_counts_equal_the_interpreters(
    name: str, case: Case, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    counts = counted(name, case, processors)
    assert (counts.parts > 1) == (case.phase == "decode" and processors > 1)
    watched(get_variant(name), case, processors, watch)
    for place, streams in GROUPS.items():
        found = [counts.streams[s] for s in streams if s in counts.streams]
        assert watch.bytes[place] == sum(stream.first + stream.again for stream in found), place
    assert watch.flops == counts.flops
    assert watch.special == counts.ops.special


def test_scalar_operations_of_softmax() -> None:
    """Written out by hand for one tile of 16 rows, 64 keys and 32 dims."""
    case = Case("decode", "fp32", 32, 64, 1, 1, 1, 1, 16)
    counts = counted("softmax", case, 1)
    rows, keys, dims = 16, 64, 32
    assert (counts.tile.rows, counts.tile.keys, counts.parts) == (rows, keys, 2)
    case = Case("decode", "fp32", 32, 64, 2, 1, 1, 1, 16)
    counts = counted("softmax", case, 1)
    assert counts.parts == 1
    # factor; distance, >= 0, and; where, max, less the top, sum
    scores = rows * keys * (1 + 3 + 4)
    # new top, -inf?, where, top - shift, total's FMA; rescaled outputs
    each_row = rows * 5 + rows * dims
    # factor; 1 / total: == 0, where, where, and what it multiplies
    frame = rows * 1 + rows * 4 + rows * dims
    assert counts.ops.scalar == 2 * (scores + each_row + frame)
    assert counts.ops.special == 2 * rows * (keys + 1 + 1)


@pytest.mark.parametrize("name", variant_names())
def test_more_work_takes_longer(name: str) -> None:
    from benchmarks.roofline.__main__ import limits
    from benchmarks.roofline.chips import CHIPS

    def least(phase: Any, head_dim: int, ctx: int, batch: int, new: int) -> list[float]:
        case = Case(phase, "bf16", head_dim, ctx, batch, new, 32, 8, 16)
        return [max(limits(counted(name, case, chip.processors), chip).values()) for chip in CHIPS]

    base = ("decode", 64, 2048, 8, 1)
    for more in (("decode", 128, 2048, 8, 1), ("decode", 64, 4096, 8, 1),
                 ("decode", 64, 2048, 16, 1), ("prefill", 64, 2048, 8, 64)):  # fmt: skip
        assert all(a < b for a, b in zip(least(*base), least(*more), strict=True)), more


def test_cached_rereads_leave_memory_alone() -> None:
    case = Case("decode", "bf16", 128, 4096, 8, 1, 32, 8, 16)
    counts = counted("lssar", case, 132)
    once = 2 * case.kv_bytes // 2
    # The whole cache's keys lie between the passes.
    small, large = counts.memory_bytes(once // 4), counts.memory_bytes(once)
    assert small - large == pytest.approx(once // 2, rel=0.01)
    assert once < large < counts.loop_bytes


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.roofline.__main__ import main

    csv = tmp_path / "made" / "roofline.csv"
    arguments = ["--chips", "H100-SXM", "MI300X", "--csv", str(csv)]
    assert main(arguments) == 0
    once = csv.read_bytes()
    assert main(arguments) == 0 and csv.read_bytes() == once
    table = pd.read_csv(csv)
    # 11 cases of each head size, two cache formats, two chips
    assert table.variant.value_counts().to_dict() == dict.fromkeys(variant_names(), 11 * 2 * 2 * 2)
    assert (table[table.variant == "softmax"].ratio_softmax == 1).all()
    assert (table.ratio_softmax > 0.99).all()
    binding = [table.loc[i, f"us_{kind}"] for i, kind in enumerate(table.binds)]
    assert binding == table.us_limit.tolist()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"] == len(table) and last["failed"] == {}
    assert set(last["limits"]["MI300X"]["decode"]) == set(variant_names())


def test_variant_that_cannot_be_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others have their rows; one line says what is missing."""
    from benchmarks.roofline.__main__ import main

    variant_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd_triton.py").write_text(
        "import triton\nimport triton.language as tl\n"
        "from attn_kernels.triton.variants.softmax import finish, merge, query_factor, start\n"
        "UNIT_KEYS = False\n\n\n@triton.jit\n"
        "def weigh(s, seen, top, total, mean, per_spread, params: tl.constexpr):\n"
        "    return tl.erf(s), total, top, total\n"
    )
    base = type(get_variant("softmax"))
    for name, module in (("odd", "odd_triton"), ("missing", None)):
        fields = {"name": name, "triton_module": module}
        registry.register(type(name.title(), (base,), fields))
    arguments = ["--chips", "H100-SXM", "--no-save"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    missing, odd = sorted(printed.err.splitlines())
    assert odd.startswith("roofline: odd has no row: weigh() uses tl.erf: add it to Language")
    assert missing.startswith("roofline: missing has no row: missing has no Triton form")
    last = json.loads(printed.out.splitlines()[-1])
    assert last["rows"] == 11 * 2 * 2 * (len(variant_names()) - 2)
    assert set(last["failed"]) == {"odd", "missing"}
