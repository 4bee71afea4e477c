"""What to write beside every number: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """The circumstances of a measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def heading(command: str) -> str:
    """One Markdown line with all of it."""
    told = ", ".join(f"{k} {v}" for k, v in describe().items())
    return f"`{command}`: {told}"


def quantiles(times_s: list[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th in milliseconds."""
    ordered = sorted(times_s)
    at = [ordered[int(q * (len(ordered) - 1))] * 1e3 for q in (0.1, 0.5, 0.9)]
    return at[0], at[1], at[2]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
