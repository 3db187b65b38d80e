"""The machine that numbers are measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pqmim._version import __version__
from pqmim.cores import num_usable_cores

LOAD_OF_AN_IDLE_MACHINE = 0.5  # runnable processes, mean of a minute


def describe_machine() -> dict[str, str]:
    """Say what the numbers were measured on, and whether it had other work to do."""
    machine = {
        "pqmim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(num_usable_cores()),
    }
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        machine["load at the start"] = f"{load:.1f}"
        if load > LOAD_OF_AN_IDLE_MACHINE:
            machine["warning"] = "the machine was busy with other work: timings are too long"
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
