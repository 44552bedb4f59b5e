"""Runtimes behind one protocol, and the choice among them.

The kind of the file decides: `.pt` runs in torch, `.onnx` in ONNX Runtime, `.engine` in TensorRT, `.xml` in OpenVINO.
There is no fall-back from one to the other, since a missing runtime is a missing installation, which the error names.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from wsss_deploy.artifact import load_model
from wsss_deploy.backends.base import Availability, Backend
from wsss_deploy.errors import BackendError, UsageError

#: Runtime by the suffix of the files that it runs.
RUNTIMES = {".pt": "torch", ".onnx": "onnxruntime", ".engine": "tensorrt", ".xml": "openvino"}

_INSTALL = {
    "torch": "pip install 'wsss-deploy[train]' for model.pt, or export to model.onnx where that is installed",
    "onnxruntime": "pip install 'wsss-deploy[cpu]' or, with an NVIDIA GPU, 'wsss-deploy[gpu]'",
    "tensorrt": "pip install 'wsss-deploy[tensorrt]' on a machine with an NVIDIA GPU",
    "openvino": "pip install 'wsss-deploy[openvino]'",
}
_NEEDS = {
    "torch": ("torch", "timm"),
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt",),
    "openvino": ("openvino",),
}
_MODULES = {
    "torch": "torch_backend",
    "onnxruntime": "onnxruntime_backend",
    "tensorrt": "tensorrt",
    "openvino": "openvino_backend",
}


def can_run(name: str) -> Availability:
    """Whether a runtime is installed; nothing is imported, so that it may still fail to load (`import_runtime`).

    Args:
        name: "torch", "onnxruntime", "tensorrt" or "openvino".

    Raises:
        UsageError: There is no runtime of that name.
    """
    if name not in _NEEDS:
        raise UsageError(f"unknown backend '{name}'; known are {', '.join(sorted(_NEEDS))}")
    missing = [module for module in _NEEDS[name] if find_spec(module) is None]
    if missing:
        return Availability(False, f"{' and '.join(missing)} not installed; {_INSTALL[name]}")
    return Availability(True, f"{name} {_version(name)}")


def import_runtime(name: str) -> None:
    """Import an installed runtime, as opening a model does.

    Args:
        name: As in `can_run`.

    Raises:
        BackendError: It cannot be loaded: a library that it needs is missing, for example.
    """
    try:
        import_module(f"wsss_deploy.backends.{_MODULES[name]}")
    except Exception as error:  # what loaders of native libraries and of compiled extensions raise is anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BackendError(
            f"{name} is installed, but cannot be loaded ({reason}); repair or reinstall it: {_INSTALL[name]}"
        ) from error


def choose(path: Path, backend: str) -> str:
    """The runtime for a file.

    Args:
        path: A model file of a known kind.
        backend: "auto", or the runtime that the user insists on.

    Returns:
        Its name.

    Raises:
        UsageError: There is no runtime of that name.
        BackendError: It cannot run this kind of file, or is not installed.
    """
    fitting = RUNTIMES[path.suffix.lower()]
    name = fitting if backend == "auto" else backend
    available, reason = can_run(name)
    if name != fitting:
        wanted = next(suffix for suffix, runtime in RUNTIMES.items() if runtime == name)
        raise BackendError(
            f"{path}: backend {name} runs {wanted} files, this one needs {fitting}; "
            f"pass the {wanted} file or leave backend at 'auto'"
        )
    if not available:
        raise BackendError(f"{path}: cannot be run: {reason}")
    return name


def open_backend(path: Path, device: str, backend: str, threads: int | None) -> Backend:
    """Load a model file into its runtime.

    Args:
        path: The model file.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "auto" or a runtime's name.
        threads: CPU threads of one inference; None as in `wsss_deploy.Segmenter`.

    Raises:
        ArtifactError: The file is damaged or does not fit its card.
        BackendError: The runtime is not installed, cannot be loaded, or cannot run on that device.
        UsageError: `device`, `backend` or `threads` is none of these.
    """
    check_device_name(device)
    if threads is not None and threads < 1:
        raise UsageError(f"found {threads} threads, expected at least 1")
    name = choose(path, backend)
    import_runtime(name)
    if name == "torch":
        from wsss_deploy.backends.torch_backend import TorchBackend
        from wsss_deploy.networks import restore_network

        card, state_dict = load_model(path)
        return TorchBackend(restore_network(card, state_dict, str(path)), card, device, threads)
    if name == "tensorrt":
        from wsss_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(path, device)
    if name == "openvino":
        from wsss_deploy.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(path, device, threads)
    from wsss_deploy.backends.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, device, threads)


def check_device_name(device: str) -> None:
    """Check the spelling of a device.

    Raises:
        UsageError: It is not "auto", "cpu", "cuda" or "cuda:N".
    """
    kind, colon, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and colon and index.isdecimal()):
        raise UsageError(f"unknown device '{device}'; known are auto, cpu, cuda and cuda:N")


def _version(module: str) -> str:
    for distribution in (module, f"{module}-gpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
