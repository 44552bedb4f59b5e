"""Which form of the operator runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import native

FORMS = ("cpu", "cuda", "torch", "numpy")
_REBUILD = "install a C++20 compiler (GCC or Clang) and run 'pip install --force-reinstall --no-deps wsss-deploy'"
#: A thread of the CUDA form keeps all weights of its pixel: beyond this they would take gigabytes of local memory.
MOST_NEIGHBOURS = 256
_TYPES = {"cpu": ("float32", "float64"), "cuda": ("float32", "float16")}


@dataclass(frozen=True)
class Form:
    """One form: its name, whether it can run here, and why (with the remedy where it cannot)."""

    name: str
    available: bool
    reason: str


def forms() -> tuple[Form, ...]:
    """All forms, best first; what the doctor prints. Imports torch where it is installed."""
    return tuple(_form(name, "cuda") for name in FORMS)


def choose(
    form: str, *, is_torch: bool, device: str = "cpu", dtype: str = "float32", neighbours: int | None = None
) -> Form:
    """The form that a call will use.

    Args:
        form: "auto" or a name of `FORMS`.
        is_torch: Whether the arrays are torch tensors (else numpy arrays).
        device: The tensors' device, with or without its number.
        dtype: Their number type without the library's name.
        neighbours: K, of which the CUDA form takes so many only; None asks for none.

    Returns:
        The form, with the reason for the choice.

    Raises:
        UsageError: No such form, or one that cannot take these arrays.
        BackendError: A form asked for by name that is not available; the message has the remedy.
    """
    if form not in ("auto", *FORMS):
        raise UsageError(f"there is no form {form!r} of the pairwise operator; known: auto, {', '.join(FORMS)}")
    plain, kind = "torch" if is_torch else "numpy", device.partition(":")[0]
    wanted = form
    if form == "auto":
        if kind not in _TYPES:
            return Form(plain, True, f"there are no kernels for tensors on {device}")
        wanted = kind
    elif form not in (plain, *_TYPES):
        given = "torch tensors" if is_torch else "numpy arrays"
        raise UsageError(f"form {form!r} was asked for with {given}; use 'cpu', {plain!r} or 'auto'")
    obstacle = _obstacle(wanted, device, dtype, neighbours or 0)
    if obstacle is not None and form != "auto":
        raise UsageError(f"form {form!r} was asked for, but {obstacle}; move or convert them, or use form 'auto'")
    found = _form(wanted, device)
    if form == "auto":
        return found if obstacle is None and found.available else Form(plain, True, obstacle or found.reason)
    if not found.available:
        raise BackendError(f"form {form!r} of the pairwise operator was asked for: {found.reason}")
    return Form(form, True, f"asked for by name; {found.reason}")


def _obstacle(form: str, device: str, dtype: str, neighbours: int) -> str | None:
    """Why a form cannot take such arrays, whether or not it is available."""
    if form not in _TYPES:
        return None
    if device.partition(":")[0] != form:
        return f"the tensors are on {device}, these kernels work on '{form}'"
    if dtype not in _TYPES[form]:
        return f"the arrays are {dtype}, the {form} kernels take {' and '.join(_TYPES[form])}"
    if form == "cuda" and neighbours > MOST_NEIGHBOURS:
        return f"there are {neighbours} neighbours, its kernels take {MOST_NEIGHBOURS}"
    return None


def _form(name: str, device: str) -> Form:
    if name == "cpu":
        module, reason = native.load()
        return Form("cpu", module is not None, reason if module is not None else f"{reason}; {_REBUILD}")
    if name == "cuda":
        obstacle = _cuda_obstacle(device)
        return Form("cuda", obstacle is None, obstacle or "kernels by NVRTC, which equal plain torch on this device")
    if name == "torch":
        has_torch = find_spec("torch") is not None
        return Form("torch", has_torch, "plain torch" if has_torch else "torch is not installed; pip install torch")
    return Form("numpy", True, "plain numpy")


def _cuda_obstacle(device: str) -> str | None:
    """Why the CUDA form cannot run on a device; None if it can."""
    from wsss_deploy.pairwise import cuda_form

    return cuda_obstacle(device, cuda_form.check)


def cuda_obstacle(device: str, check: Callable[[int], str | None]) -> str | None:
    """Why kernels cannot run on a CUDA device; None if they can.

    Args:
        device: With or without its number.
        check: What the kernels themselves have against a device's number.
    """
    for module, package in (("torch", "torch"), ("cuda", "cuda-bindings[all]")):
        if find_spec(module) is None:
            return f"{package.partition('[')[0]} is not installed; pip install '{package}'"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return check(int(device.partition(":")[2] or torch.cuda.current_device()))
