"""model.xml in OpenVINO, on the CPU."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

# Read when openvino is imported: a segmenter reports to nobody.
os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
import openvino

from wsss_deploy.artifact import read_card
from wsss_deploy.backends.base import Output, failure, refined_here
from wsss_deploy.card import Refinement
from wsss_deploy.environment import thread_limit
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.openvino_file import check_weights
from wsss_deploy.pairwise import Form, choose

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoBackend:
    """An exported model in OpenVINO; requests of their own let it run in many threads at once.

    Args:
        path: The `model.xml`; its weights lie beside it.
        device: "auto" and "cpu" are the CPU.
        threads: CPU threads of one inference; None takes OpenVINO's own number, or
            `wsss_deploy.environment.thread_limit`.

    Raises:
        ArtifactError: The file is no model of the export's contract.
        BackendError: Another device was asked for.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, path: Path, device: str, threads: int | None = None) -> None:
        if device not in ("auto", "cpu"):
            raise BackendError(
                f"device '{device}' was asked for, OpenVINO runs {path.name} on the CPU; use device 'cpu'"
            )
        check_weights(path)
        self._threads = threads or thread_limit()
        asked = _HINTS.get(read_card(path).precision)
        if asked is None:
            raise ArtifactError(
                f"{path}: has precision {read_card(path).precision}, expected fp32 or bf16; export again"
            )
        # A request at a time is what `predict` makes; the precision is the one that was compared with torch.
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": asked}
        if self._threads is not None:
            options["INFERENCE_NUM_THREADS"] = self._threads
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            reason = str(error).strip().rpartition("\n")[2]
            raise ArtifactError(f"{path}: OpenVINO cannot load it ({reason}); export it again") from error
        self._check_contract(path)
        self._idle: deque[Any] = deque()

    def _check_contract(self, path: Path) -> None:
        inputs = {item.get_any_name(): item.get_element_type().get_type_name() for item in self._compiled.inputs}
        outputs = [item.get_any_name() for item in self._compiled.outputs]
        if inputs != {"image": "u8"} or outputs != ["scores", "mask"]:
            raise ArtifactError(
                f"{path}: found inputs {inputs} and outputs {outputs}, expected input 'image' (u8) and outputs "
                "'scores' and 'mask'; export it with wsss-export"
            )

    def run(self, images: npt.NDArray[np.uint8], refiner: Refiner | None = None) -> Output:
        """Class probabilities, see `Backend.run`."""
        return refined_here(self._output(0, images), images, refiner)

    def masks(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Class ids, see `Backend.masks`."""
        found: npt.NDArray[np.uint8] = self._output(1, images)
        return found

    def _output(self, index: int, images: npt.NDArray[np.uint8]) -> Any:
        # A request serves one thread at a time; as many are made as threads have met.
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            request.infer({0: np.ascontiguousarray(images)}, share_inputs=True)
            return request.get_output_tensor(index).data.copy()
        except Exception as error:  # as above
            shape = " x ".join(map(str, images.shape[:3]))
            raise failure(
                f"OpenVINO failed with images of {shape} ({str(error).strip().rpartition(chr(10))[2]}); use smaller "
                "batches or a smaller sizing",
                error,
            ) from error
        finally:
            self._idle.append(request)

    def refinement_form(self, settings: Refinement) -> Form:
        """See `Backend.refinement_form`."""
        return choose("auto", is_torch=False)

    def describe(self) -> dict[str, Any]:
        """What really runs, see `Backend.describe`."""
        return {
            "backend": self.name,
            "version": openvino.__version__.partition("-")[0],
            "device": self.device,
            "device_reason": "OpenVINO runs on the CPU here",
            # bf16 becomes float32 on a CPU that has none.
            "precision": self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
            "threads": self._threads or "its default",
        }
