"""What a figure was measured on, as plain data."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
