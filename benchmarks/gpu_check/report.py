"""What a run leaves: one results file, a table, and a summary."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attnserve import machine
from benchmarks.gpu_check.checks import Row

PACKAGES = ("torch", "triton", "vllm", "flash_attn", "transformers", "attnserve")


def driver() -> str:
    """The NVIDIA driver's version; empty if it does not say."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def described(device: str) -> dict[str, Any]:
    """What the run was made on and with."""
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "CPU (Triton's interpreter)",
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "commit": machine.commit(),
        "versions": {name: machine.package(name) for name in PACKAGES},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return about


def counted(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Rows by part and status."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        part = found.setdefault(row["part"], {"ok": 0, "failed": 0, "skipped": 0})
        part[row["status"]] += 1
    return found


def write(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """The results file, all of it or none.

    Args:
        path: its folder is made if missing.
        about: `described`, and the run's options.
        rows: of all parts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    body = {**about, "summary": counted(rows), "rows": list(rows)}
    partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(rows: Sequence[Row]) -> str:
    """For people: errors by variant and dtype, times, and every row that is not green."""
    blocks = []
    frame = pd.DataFrame(list(rows))
    checked = frame[frame.part.isin(["matrix", "graph", "packed"])] if len(frame) else frame
    if len(checked) and "variant" in checked and "error" in checked:
        lines = []
        for (part, variant, dtype), group in checked.dropna(subset=["variant"]).groupby(
            ["part", "variant", "dtype"], sort=False
        ):
            worst = (group.error / group.limit).max()
            lines.append(
                {
                    "part": part,
                    "variant": variant,
                    "dtype": dtype,
                    "ok": int((group.status == "ok").sum()),
                    "failed": int((group.status == "failed").sum()),
                    "worst error": f"{group.error.max():.1e}",
                    "of its limit": f"{worst:.2f}",
                }
            )
        blocks.append(pd.DataFrame(lines).to_string(index=False))
    timed = [row for row in rows if "us_median" in row]
    if timed:
        lines = []
        for row in timed:
            line = {"case": row["check"], "kernel": row["kernel"]}
            line["us (p20-p80)"] = (
                f"{row['us_median']:.1f} ({row['us_p20']:.1f}-{row['us_p80']:.1f})"
            )
            line |= {"GB/s": f"{row['kv_gb_per_s']:.0f}", "TFLOPS": f"{row['tflops']:.1f}"}
            line |= {k: f"{v:.2f}" for k, v in row.items() if k.startswith("by ")}
            lines.append(line)
        blocks.append(pd.DataFrame(lines).fillna("-").to_string(index=False))
    others = [row for row in rows if row["status"] != "ok"]
    if others:
        lines = [
            {
                "status": row["status"].upper() if row["status"] == "failed" else row["status"],
                "part": row["part"],
                "check": " ".join(
                    str(row[k]) for k in ("check", "kernel", "phase") if row.get(k) is not None
                ),
                "why": row["detail"][:120],
            }
            for row in sorted(others, key=lambda row: str(row["status"]))
        ]
        blocks.append(pd.DataFrame(lines).to_string(index=False))
    return "\n\n".join(blocks)
