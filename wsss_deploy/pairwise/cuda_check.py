"""Whether kernels give what plain torch gives on a device, which they have to before they are offered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: What was computed, its largest difference from plain torch, and the difference that is still rounding.
Finding = tuple[str, float, float]

# In messages of torch, the CUDA runtime and the driver: what may be otherwise at the next call.
_PASSING = ("out of memory", "out_of_memory", "memoryallocation", "captur", "fake")


class DeviceCheck:
    """Asks once a device whether a form can be used on it, and again where the answer may have been a chance.

    Args:
        compare: Runs the kernels and plain torch on a device.
    """

    def __init__(self, compare: Callable[[torch.device], Iterable[Finding]]) -> None:
        self._compare = compare
        self._answers: dict[int, str | None] = {}

    def __call__(self, device: int) -> str | None:
        """Why the form cannot be used on a CUDA device, or None if it can: it then equals the torch form there.

        Args:
            device: Number of the device.
        """
        if device in self._answers:
            return self._answers[device]
        import torch

        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "it was not tried out before a CUDA graph's capture began; use it once before that"
        try:
            # Fake tensors (torch.export, torch.compile), vmap, dual numbers, autocast, inference mode and the current
            # stream are a thread's own: a new one has none of them, so that what runs there are real kernels.
            with ThreadPoolExecutor(1) as thread:
                answer = thread.submit(self._asked, place_of(device)).result()
        except Exception as error:  # whatever ails it, plain torch is there
            answer = f"{type(error).__name__}: {error}".partition("\n")[0]
            if any(word in f"{type(error).__name__}: {error}".lower() for word in _PASSING):
                return answer
        self._answers[device] = answer
        return answer

    def cache_clear(self) -> None:
        """Forget all answers."""
        self._answers.clear()

    def _asked(self, place: torch.device) -> str | None:
        for what, difference, limit in self._compare(place):
            if not difference <= limit:  # nor is NaN
                return f"its result ({what}) differs from torch's by {difference:.1e} on this device"
        return None


def place_of(device: int) -> torch.device:
    """The CUDA device of a number."""
    import torch

    return torch.device("cuda", device)
