"""wsss-doctor: what this machine can run, and what a model really runs on."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.markup import escape

from wsss_deploy.artifact import read_card
from wsss_deploy.backends import RUNTIMES, can_run, import_runtime
from wsss_deploy.cli.common import MODEL_FILES, ArgumentParser, run_command
from wsss_deploy.cli.file_checks import Check, check_file
from wsss_deploy.environment import cpu_threads, package_versions, query_gpus
from wsss_deploy.errors import ArtifactError
from wsss_deploy.pairwise import choose, forms
from wsss_deploy.text import visible


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-doctor`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-doctor",
        "Show versions, which runtimes can run here and on which devices; with a model, also what it is and where it "
        "really runs.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_FILES)
    parser.add_argument("--device", default="auto", help="for MODEL: auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    run_command(parser, _doctor, argv)


def _doctor(arguments: argparse.Namespace) -> None:
    report = inspect_machine()
    # A model that cannot run is an error of the command, but what was found until then helps to see why.
    if not arguments.json:
        _print_machine(report)
    checks: list[Check] = []
    if arguments.model is not None:
        checks = check_file(arguments.model)
        report["file"] = [check._asdict() for check in checks]
        if not arguments.json:
            _print_checks(checks)
        if any(check.passed is False for check in checks):
            if arguments.json:
                sys.stdout.write(json.dumps(report, indent=2) + "\n")
            raise ArtifactError(next(check.detail for check in checks if check.passed is False))
        report["model"] = inspect_model(arguments.model, arguments.device)
    if arguments.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    elif arguments.model is not None:
        _print_model(report["model"])


def inspect_machine() -> dict[str, Any]:
    """Versions, CPU, runtimes with reasons, devices and problems; plain data."""
    packages = package_versions()
    problems = []
    if "onnxruntime" in packages and "onnxruntime-gpu" in packages:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, then "
            "pip install one of 'wsss-deploy[cpu]' and 'wsss-deploy[gpu]'"
        )
    runtimes = {name: _inspect_runtime(suffix, name) for suffix, name in RUNTIMES.items()}
    pairwise: dict[str, Any] = {"forms": {}, "chosen": {}}
    try:
        # Arrays are what ONNX Runtime gives, tensors what torch gives.
        for kind in ("arrays", "tensors") if runtimes["torch"]["available"] else ("arrays",):
            pairwise["chosen"][kind] = asdict(choose("auto", is_torch=kind == "tensors"))
        pairwise["forms"] = {form.name: {"available": form.available, "reason": form.reason} for form in forms()}
    except Exception as error:  # of a torch that cannot be loaded; the rest of the report helps to see why
        problems.append(f"the forms of the pairwise operator cannot be told: {_first_line(error)}")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": cpu_threads(),
        "packages": packages,
        "gpus": query_gpus("name,driver_version,memory.total"),
        "cuda": _cuda_versions(),
        "runtimes": runtimes,
        "pairwise": pairwise,
        "problems": problems,
    }


def _inspect_runtime(suffix: str, name: str) -> dict[str, Any]:
    """Whether a runtime really loads here, why not, the devices that it runs on and those that it only lists."""
    available, reason = can_run(name)
    devices: list[str] = []
    idle: dict[str, str] = {}
    if available:
        try:
            import_runtime(name)
            devices, idle = _devices(name)
        except Exception as error:  # of libraries in a state that nobody foresaw, which is what a doctor is asked for
            available, reason = False, f"{reason}: {_first_line(error)}"
    return {"files": suffix, "available": available, "reason": reason, "devices": devices, "idle": idle}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _cuda_versions() -> dict[str, str]:
    """Of the driver (the newest that it can run) and of the runtimes that were imported, where there is one."""
    found = {}
    version = ctypes.c_int()
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)) == 0:
                found["driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
        except (OSError, AttributeError):  # the latter from a library of that name that is none
            continue
    built = {
        "torch": getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None),
        "onnxruntime": getattr(sys.modules.get("onnxruntime.capi.build_and_package_info"), "cuda_version", None),
    }
    return found | {name: str(version) for name, version in built.items() if version}


def inspect_model(model: str, device: str) -> dict[str, Any]:
    """Read a model's card and run one synthetic image through it.

    Args:
        model: Path of the model.
        device: As in `Segmenter`.

    Returns:
        Card, what really ran, and the milliseconds of a first and a second run; plain data.

    Raises:
        ArtifactError: The file cannot be used.
        BackendError: Its runtime cannot run here.
    """
    card = read_card(model)
    from wsss_deploy.segmenter import Segmenter

    segmenter = Segmenter(model, device=device)
    rows, columns = np.mgrid[0:240, 0:320]
    image = np.stack([rows, columns % 256, (rows + columns) % 256], axis=2).astype(np.uint8)
    first, second = segmenter.predict(image), segmenter.predict(image)
    return {
        "card": card.to_plain(),
        "ran": segmenter.describe(),
        "image": "320 x 240",
        "first_ms": {stage: round(value, 3) for stage, value in first.timing.items()},
        "second_ms": {stage: round(value, 3) for stage, value in second.timing.items()},
    }


def _devices(runtime: str) -> tuple[list[str], dict[str, str]]:
    """Devices or providers on which an imported runtime runs, and those that it only lists, with the reason."""
    if runtime == "tensorrt":
        from wsss_deploy.backends.device_layer import open_device
        from wsss_deploy.backends.tensorrt import load_tensorrt

        load_tensorrt()
        open_device(0)
        return query_gpus("name"), {}
    if runtime == "openvino":
        import openvino

        return [f"CPU ({openvino.Core().get_property('CPU', 'FULL_DEVICE_NAME')})"], {}
    if runtime == "onnxruntime":
        from wsss_deploy.backends.onnxruntime_backend import probe_providers

        providers = probe_providers()
        idle = {name: reason for name, reason in providers.items() if reason is not None}
        return [name for name in providers if name not in idle], idle
    import torch

    devices, idle = ["cpu"], {}
    for device in (f"cuda:{index}" for index in range(torch.cuda.device_count())):
        try:
            (torch.ones(8, device=device) * 2).sum().item()
            devices.append(f"{device} {torch.cuda.get_device_name(device)}")
        except RuntimeError as error:
            idle[device] = _first_line(error)
    return devices, idle


def _print_machine(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Python {report['python']} on {report['platform']}, {report['cpu_threads']} CPU threads")
    console.print(", ".join(f"{name} {found}" for name, found in report["packages"].items()))
    console.print(escape(f"GPUs (name, driver, MiB): {'; '.join(report['gpus']) or 'none'}"))
    if report["cuda"]:
        console.print("CUDA: " + ", ".join(f"{name} {version}" for name, version in report["cuda"].items()))
    for runtime in report["runtimes"].values():
        mark = "[green]can run[/]" if runtime["available"] else "[red]cannot run[/]"
        devices = f" on {', '.join(runtime['devices'])}" if runtime["devices"] else ""
        console.print(f"{mark} {runtime['files']} files: {escape(runtime['reason'] + devices)}")
        for name, reason in runtime["idle"].items():
            console.print(escape(f"  not on {name}: {reason}"))
    for name, form in report["pairwise"]["forms"].items():
        mark = "[green]can run[/]" if form["available"] else "[red]cannot run[/]"
        console.print(f"{mark} pairwise operator, form {name}: {escape(form['reason'])}")
    for kind, form in report["pairwise"]["chosen"].items():
        console.print(escape(f"pairwise operator on {kind}: form {form['name']} ({form['reason']})"))
    for problem in report["problems"]:
        console.print(f"[red]problem[/] {escape(problem)}")


def _print_checks(checks: Sequence[Check]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    marks = {True: "[green]ok[/]", False: "[red]not ok[/]", None: "[yellow]unknown[/]"}
    for check in checks:
        console.print(f"{marks[check.passed]} {check.name}: {escape(visible(check.detail))}")


def _print_model(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    card, ran = report["card"], report["ran"]
    classes = ", ".join(card["classes"])
    console.print(
        escape(f"model {card['name']}: {card['architecture']['encoder']}, {len(card['classes'])} classes: {classes}")
    )
    if card["protocol"] is not None:
        protocol = card["protocol"]
        console.print(
            escape(f"trained with {protocol['method']} from {', '.join(protocol['supervision'])} on {protocol['data']}")
        )
    where = ", ".join(ran["providers"]) if "providers" in ran else ran["device"]
    threads = f", CPU threads: {ran['threads']}" if ran["device"] == "cpu" else ""
    console.print(escape(f"ran in {ran['backend']} {ran['version']} on {where} ({ran['device_reason']}){threads}"))
    refinement = ran["refinement"]
    console.print(escape(f"refinement: {refinement.get('summary', 'none')} ({refinement['reason']})"))
    times = report["second_ms"]
    console.print(
        f"{report['image']} pixels: " + ", ".join(f"{stage} {value:.1f} ms" for stage, value in times.items())
    )
