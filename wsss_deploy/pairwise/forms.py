"""Which form of the operator runs, and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import native

FORMS = ("cpu", "torch", "numpy")
_REBUILD = "install a C++20 compiler (GCC or Clang) and run 'pip install --force-reinstall --no-deps wsss-deploy'"


@dataclass(frozen=True)
class Form:
    """One form: its name, whether it can run here, and why (with the remedy where it cannot)."""

    name: str
    available: bool
    reason: str


def forms() -> tuple[Form, ...]:
    """All forms, best first; what the doctor prints."""
    module, reason = native.load()
    compiled = Form("cpu", module is not None, reason if module is not None else f"{reason}; {_REBUILD}")
    has_torch = find_spec("torch") is not None
    return (
        compiled,
        Form("torch", has_torch, "plain torch" if has_torch else "torch is not installed; pip install torch"),
        Form("numpy", True, "plain numpy"),
    )


def choose(form: str, *, is_torch: bool, device: str = "cpu", dtype: str = "float32") -> Form:
    """The form that a call will use.

    Args:
        form: "auto" or a name of `FORMS`.
        is_torch: Whether the arrays are torch tensors (else numpy arrays).
        device: Kind of the tensors' device.
        dtype: Their number type without the library's name.

    Returns:
        The form, with the reason for the choice.

    Raises:
        UsageError: No such form, or one that cannot take these arrays.
        BackendError: A form asked for by name that is not available; the message has the remedy.
    """
    if form not in ("auto", *FORMS):
        raise UsageError(f"there is no form {form!r} of the pairwise operator; known: auto, {', '.join(FORMS)}")
    table = {item.name: item for item in forms()}
    plain = "torch" if is_torch else "numpy"
    obstacle = None
    if device != "cpu":
        obstacle = f"the tensors are on {device}, the compiled kernels work on the CPU"
    elif dtype not in ("float32", "float64"):
        obstacle = f"the arrays are {dtype}, the compiled kernels take float32 and float64"
    if form == "auto":
        if obstacle is None and table["cpu"].available:
            return table["cpu"]
        return Form(plain, True, obstacle or table["cpu"].reason)
    if form == "cpu" and obstacle is not None:
        raise UsageError(f"form 'cpu' was asked for, but {obstacle}; move or convert them, or use form 'auto'")
    if form not in ("cpu", plain):
        given = "torch tensors" if is_torch else "numpy arrays"
        raise UsageError(f"form {form!r} was asked for with {given}; use 'cpu', {plain!r} or 'auto'")
    if not table[form].available:
        raise BackendError(f"form {form!r} of the pairwise operator was asked for: {table[form].reason}")
    return Form(form, True, f"asked for by name; {table[form].reason}")
