"""The process that makes a part's checks: `python -m benchmarks.gpu_check.worker TASK`."""

from __future__ import annotations

import sys

from benchmarks.gpu_check import graph, matrix, packed, served, timing
from benchmarks.gpu_check.checks import Task, work

PARTS = {
    "matrix": matrix.checks,
    "graph": graph.checks,
    "packed": packed.checks,
    "timing": timing.checks,
    "serve": served.checks,
}

if __name__ == "__main__":
    task = Task.loads(sys.argv[1])
    sys.exit(work(task, PARTS[task.part](task)))
