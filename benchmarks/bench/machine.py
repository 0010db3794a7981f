"""What a figure was measured on: processor, GPU, memory, clocks, load, versions; energy, where it is counted."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hypersd_export.job import tool_versions

POWERCAP = Path("/sys/class/powercap")
FREQUENCIES = Path("/sys/devices/system/cpu")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """The machine as plain JSON; what it does not tell is None."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return {
        "cpu": cpu_name(), "architecture": platform.machine(), "cores": os.cpu_count(),
        "usable_cores": available_cores(), "threads": threads, "memory_gb": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "versions": tool_versions(), "clocks": clocks(), "load": load(),
        "gpu": gpu(),
    }  # fmt: skip


def gpu() -> dict[str, Any] | None:
    """The first NVIDIA GPU: name, driver, memory in MB; None where there is none, or nvidia-smi is not."""
    rows = nvidia_smi("--query-gpu=name,driver_version,memory.total")
    return {"name": rows[0][0], "driver": rows[0][1], "memory_mb": mib(rows[0][2])} if rows else None


def gpu_memory_mb() -> dict[int, float]:
    """By process number, what it holds of the first GPU, in MB (10^6 bytes); empty where nobody says."""
    rows = nvidia_smi("--query-compute-apps=pid,used_memory", "--id=0")
    held = {int(pid): mib(used) for pid, used in rows}
    return {pid: megabytes for pid, megabytes in held.items() if megabytes is not None}


def mib(text: str) -> float | None:
    """nvidia-smi's MiB in MB; None for its "[N/A]"."""
    return float(text) * 2**20 / 1e6 if text.replace(".", "", 1).isdigit() else None


def nvidia_smi(*query: str) -> list[list[str]]:
    """The rows of its answer; none where it is missing or fails."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[field.strip() for field in line.split(",")] for line in lines if line.strip()]


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def clocks(cpuinfo: Path = Path("/proc/cpuinfo"), frequencies: Path = FREQUENCIES) -> dict[str, Any]:
    """MHz of every core now, and the governor."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        text = ""
    governor = frequencies / "cpu0" / "cpufreq" / "scaling_governor"
    return {
        "mhz": [round(float(value)) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)] or None,
        "governor": governor.read_text(encoding="ascii").strip() if governor.is_file() else None,
    }


def load() -> list[float] | None:
    """Runnable processes on average over 1, 5 and 15 minutes: what else the machine was doing."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


@dataclass(frozen=True, slots=True)
class Energy:
    """Linux's count of a package's energy (RAPL), of all processes together; `reason` where there is none."""

    zones: tuple[Path, ...]
    reason: str = ""

    @classmethod
    def find(cls, root: Path = POWERCAP) -> "Energy":
        """The packages' zones, without the parts that they contain."""
        if not root.is_dir():
            return cls((), "this system has no /sys/class/powercap")
        zones = tuple(sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1))
        if not zones:
            return cls((), "no RAPL zone under /sys/class/powercap")
        try:
            for zone in zones:
                (zone / "energy_uj").read_text(encoding="ascii")
        except OSError as error:
            return cls((), f"energy_uj cannot be read ({error.strerror}); it is root's on most systems")
        return cls(zones)

    def read(self) -> tuple[int, ...]:
        """The counters in microjoules."""
        return tuple(int((zone / "energy_uj").read_text(encoding="ascii")) for zone in self.zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Between two readings; a counter that has begun again at 0 is taken for one that went round once."""
        total = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            span = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) if last < first else 0
            total += last - first + span
        return total / 1e6
