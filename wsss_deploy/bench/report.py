"""The table of measured cases, and the limits that they have to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsss_deploy.errors import UsageError

#: Figures that a limit can be set for.
FLOORS = ("images_per_s", "miou")
CEILINGS = ("p50_ms", "p95_ms", "first_mask_ms", "memory_mb", "device_memory_mb", "overhead", "refinement")


def markdown(rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The cases as a Markdown table with what they were measured on.

    Args:
        rows: What `measure` gave; a case that failed has `error`.
        environment: What `describe_environment` gave.
    """
    head = ("model", "runtime", "device", "px", "p50 ms", "p95 ms", "images/s", "batch")
    more = ("memory MB", "first mask ms", "overhead", "refinement", "mIoU %")
    lines = [f"| {' | '.join((*head, *more))} |", "|" + "---|" * len(head + more)]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | failed | {row['device']} | {row['size']} |" + " - |" * 9)
            continue
        ran = row["ran"]
        memory = f"{row['memory_mb']:.0f}"
        if "device_memory_mb" in row:
            memory += f" + {row['device_memory_mb']:.0f} GPU"
        size = str(row["size"])
        if row["network_px"] != row["size"]:
            size += f" (network {row['network_px']})"
        cells = (
            *(row["model"], f"{ran['backend']} {ran['version']}", ran["device"], size),
            *(f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}", f"{row['images_per_s']:.2f}", str(row["batch"])),
            *(memory, f"{row['first_mask_ms']:.0f}", f"{row['overhead']:+.1%}"),
            "none" if ran["refinement"]["form"] == "none" else f"{row['refinement']:+.1%}",
            f"{100 * row['miou']:.2f}" if "miou" in row else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    gpus = "; ".join(environment["gpus"]) or "no GPU"
    packages = ", ".join(f"{name} {found}" for name, found in environment["packages"].items())
    lines += [
        "",
        f"Measured {environment['date']} on {environment['cpu']}, {environment['cpu_threads']} CPU threads, "
        f"{environment['memory_gb']} GB, {gpus}; {environment['platform']}, Python {environment['python']}, "
        f"OMP_NUM_THREADS {environment['omp_num_threads']}; {packages}.",
    ]
    return "\n".join(lines) + "\n"


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The ends of paths, each as long as it takes to tell it from the other files.

    Args:
        models: Paths; the same file may occur again.
    """
    parts = {model: Path(model).absolute().parts for model in models}
    names = {}
    for model, own in parts.items():
        others = [other for other in parts.values() if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in others))
        names[model] = Path(*own[-length:]).as_posix()
    return names


def read_limits(given: Sequence[str], known: Sequence[str], option: str) -> dict[str, float]:
    """Read `NAME=VALUE` texts.

    Args:
        given: The texts.
        known: Names that may occur.
        option: Name of the option, for errors.

    Raises:
        UsageError: One is none of these.
    """
    limits = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise UsageError(f"{option} {text}: unknown figure '{name}'; known are {', '.join(known)}")
        try:
            limits[name] = float(value)
        except ValueError:
            raise UsageError(f"{option} {text}: expected a number after '=', found '{value}'") from None
    return limits


def violations(
    rows: Sequence[Mapping[str, Any]], floors: Mapping[str, float], ceilings: Mapping[str, float]
) -> list[str]:
    """What is beyond a limit, or has no figure to compare with one.

    Args:
        rows: What `measure` gave.
        floors: Least values by figure.
        ceilings: Largest values by figure.
    """
    found = []
    for row in rows:
        where = f"{row['model']} on {row['device']} at {row['size']} px"
        if "error" in row:
            continue  # told by itself
        for limits, sign in ((floors, 1), (ceilings, -1)):
            for name, limit in limits.items():
                value = row.get(name)
                if value is None:
                    found.append(f"{where}: {name} was not measured; a limit for it needs --data or a GPU")
                elif not sign * value >= sign * limit:  # written so that NaN fails
                    kind = "at least" if sign > 0 else "at most"
                    found.append(f"{where}: {name} is {value:.4g}, {kind} {limit:g} was asked for")
    return found
