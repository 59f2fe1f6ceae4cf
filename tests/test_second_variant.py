"""Pruning is a property of a variant: a second prunable one, in a package of its own, is pruned,
generated with and evaluated by the code that is there, untouched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent

PYTHON = '''
from dataclasses import dataclass
from typing import ClassVar

from attn_kernels.variant import PrunableVariant, register
from attn_kernels.variants.softpick import Softpick


@register
@dataclass(frozen=True)
class Damped(PrunableVariant, Softpick):
    """Softpick of scores less what earlier queries have masked by the squares of theirs."""

    name: ClassVar[str] = "damped"

    def selection(self, scores):
        return 0.25 * scores.relu() ** 2
'''

CPP = """
#pragma once
#include "softpick/kernel.hpp"

struct Damped : Softpick {
  static constexpr bool stateful = true;
  using Softpick::Softpick;
  static Vec penalise(Vec s, Vec accumulated) { return s - accumulated * LOG2E; }
  static Vec selection(Vec s) {
    const Vec x = max(Vec{}, s) * LN2;
    return 0.25f * x * x;
  }
};
"""

TRITON = """
import triton
import triton.language as tl

from attn_kernels.variants.softpick.kernel import (
    FIRST_MAX, UNIT_KEYS, epilogue, merge, query_factor, update
)


@triton.jit
def selection(x):
    x = tl.maximum(x, 0.0)
    return 0.25 * x * x
"""

EVALUATE = """
from pathlib import Path
import torch
from attnserve.budgets.model import Forward
from attnserve.evaluation.checkpoint import Checkpoint
from tests.reference_model import ReferenceModel
from tests.tiny import tiny_checkpoint

BUDGETS = [8, 4, 12]
prompt = list(range(2, 40))
forward = Forward(Checkpoint(tiny_checkpoint(Path("plain"), "damped")))
hidden = forward.embed(torch.tensor([prompt]))
for layer, budget in enumerate(BUDGETS):
    hidden = forward.layer(layer, hidden, budget, "selective")
logits = forward.model.lm_head(forward.model.model.norm(hidden))[0, -1]
folder = tiny_checkpoint(Path("pruned"), {"name": "damped", "kv_budgets": BUDGETS})
reference = ReferenceModel(folder)
for token in prompt:
    last = reference.read(token)
torch.testing.assert_close(logits.double(), last, rtol=0, atol=1e-3)
"""

SERVE = """
from pathlib import Path
from tests.reference_model import clear_greedy
from tests.tiny import tiny_checkpoint
from vllm import LLM, SamplingParams

folder = tiny_checkpoint(Path("model"), {"name": "damped", "kv_budgets": [8, 4, 12]})
asked = [clear_greedy(folder, length, 8) for length in (5, 40)]
llm = LLM(
    str(folder), dtype="float32", max_model_len=128, enforce_eager=True,
    kv_cache_memory_bytes=1 << 18, max_num_batched_tokens=64,
)
sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in asked], sampling)
answers = [list(output.outputs[0].token_ids) for output in outputs]
assert answers == [expected.tokens for _, expected in asked], (answers, asked)
"""


def run(folder: Path, *command: str, **environment: str) -> str:
    """Run Python in a process that has the variant's package installed; return what it prints."""
    package = folder / "damped"
    package.mkdir()
    (package / "__init__.py").write_text(PYTHON)
    (package / "kernel.hpp").write_text(CPP)
    (package / "kernel.py").write_text(TRITON)
    info = folder / "damped_attention-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: damped-attention\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[attnserve.variants]\ndamped = damped\n")
    environment["PYTHONPATH"] = f"{folder}:{ROOT}"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_and_transformers(tmp_path: Path) -> None:
    """In torch operations, C++ (compiled here) and Triton's interpreter."""
    files = ("attn_kernels/test_pruned_layers", "attn_kernels/test_triton", "hf_attn/test_pruned")
    command = ["-m", "pytest", "-q", "-k", "damped", "-p", "no:cacheprovider", "-n", "0"]
    printed = run(tmp_path, *command, f"--rootdir={ROOT}", *(f"{ROOT}/tests/{f}.py" for f in files))
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None and int(passed[1]) >= 30, printed[-1000:]


def test_evaluation(tmp_path: Path) -> None:
    run(tmp_path, "-c", EVALUATE)


@pytest.mark.timeout(300)
def test_vllm(tmp_path: Path) -> None:
    run(tmp_path, "-c", SERVE, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
