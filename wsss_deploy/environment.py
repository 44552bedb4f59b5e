"""What a figure was measured on, as plain data."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

#: Packages that decide what runs and how fast.
PACKAGES = (
    *("wsss-deploy", "numpy", "pillow", "pydantic", "torch", "torchvision", "timm", "onnx", "onnxscript"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "pycuda", "cuda-bindings", "gradio", "supervision"),
    *("huggingface-hub", "tritonclient"),
)


def package_versions() -> dict[str, str]:
    """Versions of the installed ones of `PACKAGES`."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def describe_environment() -> dict[str, Any]:
    """Processor, memory, GPUs with driver, system, Python and packages."""
    return {
        "date": date.today().isoformat(),
        "cpu": _processor(),
        "cpu_threads": cpu_threads(),
        "memory_gb": _memory_gb(),
        "gpus": query_gpus("name,driver_version,memory.total"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "packages": package_versions(),
    }


def cpu_threads() -> int:
    """CPUs that this process may use: of its affinity, and as many as its control groups give it time for.

    A container with a quota of two CPUs on a machine of 64 has 2: threads for all 64 would use the quota up at once,
    and then all of them would wait for the next period.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def thread_limit() -> int | None:
    """`cpu_threads` where that is fewer than the machine has; None where all are this process's.

    Then a runtime's own default is best, which knows the machine's physical cores and binds threads to them.
    """
    count = cpu_threads()
    return count if count < (os.cpu_count() or 1) else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs whose time this process's control groups (Linux, version 1 or 2) allow it; None without a limit.

    Args:
        root: Where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None  # not Linux
    limits = []
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A group has the limits of all groups around it. Inside a container, only the last one may be there.
        group = PurePosixPath(path)
        for mount in dict.fromkeys((controllers, "cpu")) if controllers else ("",):
            for inside in (group, *group.parents):
                folder = root / "sys/fs/cgroup" / mount / str(inside).lstrip("/")
                limits.append(_group_quota(folder, second_version=not controllers))
    return min((limit for limit in limits if limit is not None), default=None)


def _group_quota(folder: Path, second_version: bool) -> float | None:
    """CPUs of one group; None where it is absent or sets no limit."""
    names = ("cpu.max",) if second_version else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        # "max" in one version, -1 in the other.
        return int(quota) / int(period) if quota.isdigit() and int(quota) and int(period) else None
    except (OSError, ValueError):
        return None


def query_gpus(fields: str) -> list[str]:
    """A line of comma-separated values for every NVIDIA GPU; empty without a driver.

    Args:
        fields: Names of `nvidia-smi --query-gpu`.
    """
    line = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
