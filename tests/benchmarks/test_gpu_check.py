"""`benchmarks.gpu_check` without a GPU: its cases in Triton's interpreter, its budget, its report.

What only a GPU can do is not run here: float8, events, captured graphs, others' kernels, a server.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnserve.files import CHECKOUT
from benchmarks.gpu_check.checks import SPOILED, Check, SkippedError, Task, work
from benchmarks.gpu_check.run import Budget, run, run_part


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """As in test_triton: kernels that are imported from now on are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Softmax in float32 on the CPU, an hour left."""
    return Task(
        part="matrix",
        device="cpu",
        variants=("softmax",),
        dtypes=("fp32",),
        head_dims=(32,),
        longest=12,
        worker=0,
        workers=1,
        done=(),
        deadline=time.time() + 3600,
        rows=tmp_path / "matrix-0.rows",
    )


def setup(variant: str, **settings: Any) -> Any:
    from benchmarks.gpu_check.paged import Setup

    window = settings.pop("window", None)
    settings = {"longest": 12, "device": "cpu", "num_kv_heads": 1, **settings}
    return Setup(variant, "fp32", 32, 2, window, **settings)


# Cases against the law


@pytest.mark.parametrize(("variant", "window"), [("softpick", None), ("selective", 6)])
def test_matrix_check(variant: str, window: int | None) -> None:
    from benchmarks.gpu_check import matrix

    rows = list(matrix.check(setup(variant, window=window)))
    assert [row["phase"] for row in rows] == ["prefill", "mixed", "decode unsplit", "decode split"]
    assert all(row["status"] == "ok" and 0 < row["error"] <= row["limit"] for row in rows)


def test_phases_reach_every_token() -> None:
    from benchmarks.gpu_check.matrix import phases

    lengths = (8, 37, 150)
    done = [0, 0, 0]
    processors: dict[str, int] = {}
    for phase, count, spans in phases(lengths, 132):
        processors[phase] = count
        for request, start, end in spans:
            assert done[request] == start < end
            done[request] = end
        if phase == "mixed":
            assert {1} < {end - start for _, start, end in spans}
    assert done == list(lengths)
    assert processors["decode split"] == 132 and processors["decode unsplit"] == 1


def test_wrong_outputs_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by one part in ten thousand; one that writes NaN; one behind the end."""
    from attn_kernels.triton import TritonLayer
    from benchmarks.gpu_check import matrix

    attend = TritonLayer.attend

    def spoiled(spoil: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
        def wrapped(self: Any, query: torch.Tensor, batch: Any, out: torch.Tensor) -> None:
            attend(self, query, batch, out)
            spoil(out)

        return wrapped

    small = setup("softmax")
    prefill = next(matrix.phases(small.lengths, 16))
    monkeypatch.setattr(matrix, "phases", lambda *_: [prefill])
    monkeypatch.setattr(TritonLayer, "attend", spoiled(lambda out: out.mul_(1.0001)))
    (row,) = matrix.check(small)
    assert row["status"] == "failed" and 5e-5 < row["error"] < 2e-4
    # In the first request: the others' errors must not hide it.
    monkeypatch.setattr(TritonLayer, "attend", spoiled(lambda out: out[0].fill_(torch.nan)))
    (row,) = matrix.check(small)
    assert row["status"] == "failed" and row["error"] is None and "nan" in row["detail"]
    monkeypatch.setattr(TritonLayer, "attend", spoiled(lambda out: out[-1].zero_()))
    with pytest.raises(AssertionError, match="wrote behind the last query"):
        list(matrix.check(small))


def test_the_matrix_has_every_combination() -> None:
    from attn_kernels import variant_names
    from benchmarks.gpu_check.__main__ import HEAD_DIMS
    from benchmarks.gpu_check.matrix import setups

    names = variant_names()
    task = Task("matrix", "cuda", names, ("fp32", "bf16", "fp16"), HEAD_DIMS, 150, 0, 1, (), 0.0,
                Path())  # fmt: skip
    found = setups(task)
    plain = {(s.variant, s.dtype, s.head_dim, s.group, s.window) for s in found if not s.fp8}
    assert len(plain) == len(names) * 3 * 4 * 3 * 2
    assert len(found) - len(plain) == len(names) * 4 == sum(s.fp8 for s in found)
    assert len({str(s) for s in found}) == len(found)
    # What comes first has each variant in each dtype.
    assert {(s.variant, s.dtype) for s in found[: len(names) * 3]} == {p[:2] for p in plain}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_all_bits_are_nan(dtype: torch.dtype) -> None:
    bits = torch.full((dtype.itemsize,), 255, dtype=torch.uint8)
    assert bool(bits.view(dtype).float().isnan().all())


def test_float8_keys_are_not_clamped() -> None:
    from benchmarks.gpu_check.paged import KEY_SCALE, Requests, stored

    keys = torch.cat(Requests(setup("softmax", fp8=True)).k)
    assert float(keys.abs().max()) < 448 * KEY_SCALE
    # Three bits after the first; below 2^-6 of the scale steps of 2^-9 of it.
    rounding = (keys.abs() / 16).clamp(min=KEY_SCALE * 2**-10)
    assert bool(((stored(keys, KEY_SCALE) - keys).abs() <= rounding * 1.001).all())


def test_packed_check(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width and dtype that are right; then a product that is off by one part in a thousand, and
    lookups that are."""
    from benchmarks.gpu_check import packed
    from quant_kernels import triton

    monkeypatch.setattr(packed, "OUTPUTS", 20)
    monkeypatch.setattr(packed, "COLUMNS", 70)
    names = [check.name for check in packed.checks(task)]
    assert len(names) == len(task.dtypes) * 7 and "4 bits fp32" in names
    product, lookup = packed.check(4, "fp32", task)
    assert product["status"] == lookup["status"] == "ok" and 0 < product["error"] < 2e-6
    multiply, gather = triton.multiply, triton.gather
    monkeypatch.setattr(triton, "multiply", lambda *given: multiply(*given) * 1.001)
    monkeypatch.setattr(triton, "gather", lambda *given: gather(*given) * 1.001)
    product, lookup = packed.check(4, "fp32", task)
    assert product["status"] == lookup["status"] == "failed"
    assert "numbers differ" in lookup["detail"] and product["error"] > 1e-4


def test_graph_check() -> None:
    """Without a GPU the step itself is called again: the changes in place are what is tested."""
    from benchmarks.gpu_check import graph

    rows = list(graph.check(setup("selective"), 8))
    assert [row["phase"] for row in rows] == [
        "replay", "later tokens", "blocks moved", "fewer requests, reordered"
    ]  # fmt: skip
    assert {row["status"] for row in rows} == {"ok"}


def test_stale_block_table_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that does not see the new block table reads NaN."""
    from benchmarks.gpu_check import graph
    from benchmarks.gpu_check.paged import Paged, Requests

    paged = Paged(Requests(setup("softmax")))
    paged.layer.num_processors = 1
    ends = [n - 2 for n in paged.requests.setup.lengths]
    paged.step([(1, 0, ends[1])])
    decoder = graph.Decoder(paged)
    assert decoder.decode([(1, ends[1])]) <= 1e-5
    old = paged.table
    paged.move()
    assert not torch.equal(old, paged.table)
    paged.table = old
    error = decoder.decode([(1, ends[1] + 1)])
    assert error != error


def test_timing_check(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds on the clock; others' kernels that are not here are skipped with a reason."""
    from benchmarks.gpu_check import peers, timing

    class Same(peers.Peer):
        def __init__(self, inputs: Any, paging: Any) -> None:
            super().__init__(inputs)
            keys, values = self.paged(paging)
            assert keys.shape == values.shape == (paging.num_blocks, 16, 2, 32)
            assert torch.equal(keys.flatten(0, 1)[paging.slots(0, 0)], inputs.key.flatten(0, 1))

        def run(self) -> None:
            self.result = scaled_dot_product_attention(
                self.inputs.query[:, :, None],
                self.inputs.key.transpose(1, 2),
                self.inputs.value.transpose(1, 2),
                enable_gqa=True,
            )[:, :, 0]

    class Wrong(Same):
        def run(self) -> None:
            super().run()
            self.result = self.result * 1.1

    names = ("FlashAttention", "vLLM FlashAttention", "FlexAttention")
    found = {name: peers.PEERS[name] for name in names}
    monkeypatch.setattr(timing, "PEERS", {**found, "same": Same, "wrong": Wrong})
    (check,) = timing.checks(task)
    rows = {row["kernel"]: row for row in check.run()}
    mine = rows["softmax"]
    assert 0 < mine["us_p20"] <= mine["us_median"] <= mine["us_p80"]
    assert mine["by same"] > 0 and mine["kv_gb_per_s"] > 0 and "by wrong" not in mine
    assert {rows[name]["status"] for name in names} == {"skipped"}
    assert "flash_attn is not installed" in rows["FlashAttention"]["detail"]
    assert rows["wrong"]["status"] == "failed" and "against the law" in rows["wrong"]["detail"]


def test_agreement() -> None:
    from benchmarks.gpu_check.served import agreement

    law, margins = [5, 6, 7], [1.0, 0.0004, 2.0]
    assert agreement([5, 6, 7], law, margins, 1e-3)["status"] == "ok"
    near = agreement([5, 9, 1], law, margins, 1e-3)
    assert near["status"] == "ok" and near["tokens"] == 1 and "near tie" in near["detail"]
    wrong = agreement([4, 6, 7], law, margins, 1e-3)
    assert wrong["status"] == "failed" and wrong["detail"].startswith("token 0 is 4, the law's 5")


def test_no_cuda_vllm_is_skipped(task: Task) -> None:
    from benchmarks.gpu_check import served

    for check in served.checks(task):
        with pytest.raises(SkippedError, match="vLLM for CUDA is not installed"):
            list(check.run())


# Workers, time, and the report


def test_budget() -> None:
    now = [1000.0]
    budget = Budget(100.0, ("matrix", "timing", "serve"), clock=lambda: now[0])
    assert budget.deadline("matrix") == pytest.approx(1000 + 100 * 45 / 90)
    now[0] = 1020.0  # what the matrix leaves goes to the others
    assert budget.deadline("timing") == pytest.approx(1020 + 80 * 25 / 45)
    now[0] = 1090.0
    assert budget.deadline("serve") == pytest.approx(1100)
    now[0] = 1200.0
    assert budget.deadline("serve") == 1200


def lines(task: Task) -> list[dict[str, Any]]:
    return [json.loads(line) for line in task.rows.read_text().splitlines()]


def test_worker_goes_on_after_a_failure(task: Task) -> None:
    def wrong() -> Any:
        raise ValueError("first line\nsecond line")

    def skip() -> Any:
        raise SkippedError("not here")

    checks = [Check("a", wrong), Check("b", skip), Check("c", lambda: [{"error": 1.0}])]
    assert work(dataclasses.replace(task, done=("d",)), [*checks, Check("d", wrong)]) == 0
    rows = [line for line in lines(task) if "status" in line]
    assert [row["status"] for row in rows] == ["failed", "skipped", "ok"]
    assert rows[0]["detail"] == "ValueError: first line" and rows[1]["detail"] == "not here"
    assert rows[2]["part"] == "matrix" and rows[2]["error"] == 1.0


def test_worker_stops_where_the_device_is_lost_and_at_its_deadline(task: Task) -> None:
    def lost() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert work(task, [Check("a", lost), Check("b", list)]) == SPOILED
    assert {"begun": "b"} not in lines(task)
    task.rows.unlink()
    assert work(dataclasses.replace(task, deadline=time.time() - 1), [Check("a", list)]) == 0
    assert lines(task) == [{"left": ["a"]}]


SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(CHECKOUT)!r})
from benchmarks.gpu_check.checks import Check, Task, work
task = Task.loads(sys.argv[1])
def dies():
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
def lost():
    raise RuntimeError("CUDA error: gone")
checks = {{
    "crash": [Check("a", list), Check("b", dies), Check("c", lost), Check("d", lambda: [{{}}])],
    "hang": [Check("a", lambda: [{{}}]), Check("b", lambda: time.sleep(600)), Check("c", list)],
    "import": [],
}}[os.environ["SCENE"]]
if os.environ["SCENE"] == "import":
    sys.exit("ImportError: no such thing")
sys.exit(work(task, checks))
"""


def scripted(task: Task) -> list[str]:
    return [sys.executable, "-c", SCRIPT, task.dumps()]


def test_crashed_worker_is_started_again(task: Task) -> None:
    """Behind the check that ended it; so is one whose device is lost."""
    rows = run_part([task], scripted, {"SCENE": "crash"})
    assert [(row["check"], row["status"]) for row in rows] == [
        ("b", "failed"), ("c", "failed"), ("d", "ok")
    ]  # fmt: skip
    assert rows[0]["detail"] == f"exit code {-signal.SIGKILL}: the last words"


def test_worker_that_cannot_begin_is_one_red_row(task: Task) -> None:
    (row,) = run_part([task], scripted, {"SCENE": "import"})
    assert row["status"] == "failed" and row["detail"] == "exit code 1: ImportError: no such thing"


def test_hanging_check_is_ended(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import run as module

    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(module, "HANG_SECONDS", 0.1)
    late = dataclasses.replace(task, deadline=time.time() + 1.5)
    rows = run_part([late], scripted, {"SCENE": "hang"})
    assert [(row["check"], row["status"]) for row in rows] == [
        ("a", "ok"), ("b", "failed"), ("the rest", "skipped")
    ]  # fmt: skip
    assert rows[1]["detail"].startswith("out of time: ended after")
    assert rows[2]["detail"] == "out of time: 1 of 3 checks not made"


def test_part_that_is_not_begun_has_a_row(task: Task, tmp_path: Path) -> None:
    rows = run(("graph", "serve"), 0.0, task, 1, tmp_path, {"SCENE": "hang"}, scripted)
    assert [(row["part"], row["status"], row["detail"]) for row in rows] == [
        (part, "skipped", "out of time: not begun") for part in ("graph", "serve")
    ]


def test_task_survives_the_command_line(task: Task) -> None:
    assert Task.loads(task.dumps()) == task


def main(*arguments: str) -> int:
    from benchmarks.gpu_check.__main__ import main

    return main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 1
    assert main("--allow-no-gpu") == 0
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("gpu_check: no CUDA device (torch ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "leave bf16 out"),
        (["--device", "cpu", "--dtypes", "fp32", "--minutes", "nan"], "--minutes must be above 0"),
        (["--device", "cpu", "--dtypes", "fp32", "--longest", "3"], "--longest must be at least"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real worker in the interpreter."""
    out = tmp_path / "made" / "gpu_check.json"
    arguments = ["--device", "cpu", "--dtypes", "fp32", "--head-dims", "32", "--longest", "12"]
    arguments += ["--variants", "softmax", "--workers", "1", "--out", str(out)]
    assert main(*arguments, "--parts", "graph", "--minutes", "5") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["failed"] == 0 and last["parts"] == {"graph": {"ok": 8, "failed": 0, "skipped": 0}}
    found = json.loads(out.read_text())
    assert found["summary"] == last["parts"] and len(found["rows"]) == 8
    assert found["versions"]["torch"] and found["options"]["variants"] == ["softmax"]
    assert not list(out.parent.glob("*.partial"))


def test_table_shows_times_and_red_rows() -> None:
    from benchmarks.gpu_check.report import counted, table

    common = {"detail": "", "status": "ok"}
    rows: list[dict[str, Any]] = [
        {**common, "part": "matrix", "check": "x", "variant": "lssa", "dtype": "bf16",
         "error": 2e-3, "limit": 1e-2},
        {**common, "part": "matrix", "check": "y", "variant": "lssa", "dtype": "bf16",
         "error": None, "limit": 1e-2, "status": "failed", "detail": "error nan"},
        {**common, "part": "timing", "check": "decode", "kernel": "lssa", "us_median": 12.34,
         "us_p20": 12.0, "us_p80": 13.0, "kv_gb_per_s": 2500.0, "tflops": 9.0,
         "by vLLM Triton": 0.5},
    ]  # fmt: skip
    shown = table(rows)
    for text in ("2.0e-03", "0.20", "12.3 (12.0-13.0)", "2500", "0.50", "FAILED", "error nan"):
        assert text in shown
    assert counted(rows)["matrix"] == {"ok": 1, "failed": 1, "skipped": 0}
    assert table([]) == ""
