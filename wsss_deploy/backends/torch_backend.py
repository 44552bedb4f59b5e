"""model.pt in PyTorch: float32, without gradients, safe to call from many threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from wsss_deploy.card import ModelCard
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.networks import DeployedNetwork, SegmentationNetwork, build_network


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

    @classmethod
    def from_state_dict(
        cls, card: ModelCard, state_dict: Mapping[str, torch.Tensor], source: str, device: str, threads: int | None
    ) -> Self:
        """Build the card's network and load its tensors.

        Args:
            card: The model's card.
            state_dict: Tensors by name.
            source: The file's name, for errors.
            device: As in the class.
            threads: As in the class.

        Raises:
            ArtifactError: The tensors do not fit the card's architecture.
            BackendError: The device does not work.
        """
        network = build_network(card.architecture, len(card.classes))
        expected = network.state_dict()
        problems = [f"lacks {name}" for name in expected if name not in state_dict]
        problems += [f"unknown {name}" for name in state_dict if name not in expected]
        problems += [
            f"{name} has shape {tuple(state_dict[name].shape)} for {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state_dict and state_dict[name].shape != value.shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ArtifactError(
                f"{source}: its tensors do not fit the architecture {card.architecture.encoder} of its card: "
                f"{'; '.join(problems[:3])}{more}; train it again with this release"
            )
        network.load_state_dict(state_dict)
        return cls(network, card, device, threads)

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Class probabilities, see `Backend.run`."""
        if self._module.network.training:  # the owner of a network given by `from_network` went on training it
            self._module.network.eval()
        kind = torch.device(self.device).type
        try:
            # An autocast of the caller must not lower the precision here.
            with torch.inference_mode(), torch.autocast(kind, enabled=False):
                scores, _ = self._module(torch.from_numpy(images).to(self.device))
                result: npt.NDArray[np.float32] = scores.float().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            shape = " x ".join(map(str, images.shape[:3]))
            raise BackendError(
                f"torch failed on {self.device} with images of {shape} ({str(error).partition(chr(10))[0]}); "
                "use smaller batches, a smaller sizing or another device"
            ) from error
        return result

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
