"""model.pt in PyTorch: float32, without gradients, safe to call from many threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from wsss_deploy.backends.base import Output, failure
from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.errors import BackendError
from wsss_deploy.networks import DeployedNetwork, SegmentationNetwork
from wsss_deploy.pairwise import Form, choose

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner


class TorchBackend:
    """A network in eager PyTorch.

    Args:
        network: It is moved to the device and switched to evaluation mode.
        card: Its card.
        device: "auto" takes a CUDA device if one really works, else the CPU.
        threads: CPU threads; torch has one setting for the whole process, which this changes. None leaves it.
    """

    name = "torch"

    def __init__(self, network: SegmentationNetwork, card: ModelCard, device: str, threads: int | None = None) -> None:
        self.device, self._reason = _pick_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self._module = DeployedNetwork(network, card.preprocessing).to(self.device).eval()

    def run(self, images: npt.NDArray[np.uint8], refiner: Refiner | None = None) -> Output:
        """Class probabilities, see `Backend.run`."""
        with self._running(images):
            batch = torch.from_numpy(images).to(self.device)
            scores = self._module(batch)[0].float()
            spent = 0.0
            if refiner is not None:
                self._wait()  # or the network's time on a GPU would count as the refinement's
                start = time.perf_counter()
                scores = refiner(scores, batch)
                self._wait()
                spent = (time.perf_counter() - start) * 1e3
            return Output(scores.cpu().numpy(), spent)

    def masks(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Class ids, see `Backend.masks`."""
        with self._running(images):
            found: npt.NDArray[np.uint8] = self._module(torch.from_numpy(images).to(self.device))[1].cpu().numpy()
            return found

    @contextmanager
    def _running(self, images: npt.NDArray[np.uint8]) -> Iterator[None]:
        """Evaluation mode without gradients, and torch's errors as ours."""
        if self._module.network.training:  # the owner of a network given by `from_network` went on training it
            self._module.network.eval()
        kind = torch.device(self.device).type
        try:
            # An autocast of the caller must not lower the precision here.
            with torch.inference_mode(), torch.autocast(kind, enabled=False):
                yield
        except (RuntimeError, MemoryError) as error:
            shape = " x ".join(map(str, images.shape[:3]))
            raise failure(
                f"torch failed on {self.device} with images of {shape} ({str(error).partition(chr(10))[0]}); "
                "use smaller batches, a smaller sizing or another device",
                error,
            ) from error

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def refinement_form(self, settings: Refinement) -> Form:
        """See `Backend.refinement_form`."""
        return choose("auto", is_torch=True, device=self.device)

    def describe(self) -> dict[str, Any]:
        """What really runs, see `Backend.describe`."""
        told: dict[str, Any] = {
            "backend": self.name,
            "version": torch.__version__,
            "device": self.device,
            "device_reason": self._reason,
            "precision": "float32",
            "threads": torch.get_num_threads(),
        }
        if self.device != "cpu":
            told["device_name"] = torch.cuda.get_device_name(self.device)
            told["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
        return told


def _pick_device(device: str) -> tuple[str, str]:
    """Name of the device and why it was taken; a CUDA device counts only if a computation on it succeeds."""
    if device == "cpu":
        return "cpu", "asked for"
    candidate = "cuda:0" if device in ("auto", "cuda") else device
    try:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
            )
        (torch.ones(8, device=candidate) * 2).sum().item()
    except (RuntimeError, AssertionError) as error:
        reason = os.linesep.join(str(error).splitlines()[:1])
        if device == "auto":
            return "cpu", f"CUDA does not work: {reason}"
        raise BackendError(
            f"device '{device}' was asked for, but CUDA does not work in torch: {reason}; "
            "use device 'cpu', or install a driver and a CUDA build of torch"
        ) from error
    return candidate, "asked for" if device != "auto" else "CUDA works"
