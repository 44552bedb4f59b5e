"""model.onnx in ONNX Runtime, on the provider that was asked for or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsss_deploy.artifact import read_card
from wsss_deploy.backends.base import Output, failure, refined_here
from wsss_deploy.backends.bound_session import BoundSession
from wsss_deploy.backends.device_layer import open_device
from wsss_deploy.backends.device_mask import parted
from wsss_deploy.backends.device_refinement import form_beside
from wsss_deploy.card import Refinement
from wsss_deploy.environment import thread_limit
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.onnx_check import check_onnx
from wsss_deploy.pairwise import Form, choose

# Read when onnxruntime is imported: a segmenter reports to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner

#: The smallest graph: y = x + x, float32 (4,).
_PROBE = (
    b'\x08\x08\x12\x00:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x04'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x04B\x04\n\x00\x10\r"
)
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def probe_providers() -> dict[str, str | None]:
    """Run a tiny graph on every provider of this build.

    Returns:
        By provider the reason why it does not run here; None where it does.
    """
    providers = onnxruntime.get_available_providers()
    if _CUDA in providers:
        onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(4)  # what fails is in the answer
    try:
        return {provider: _obstacle(provider) for provider in providers}
    finally:
        onnxruntime.set_default_logger_severity(2)


def _obstacle(provider: str) -> str | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != _CPU:  # or nodes that the provider does not take would run on the CPU
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    image = np.arange(4, dtype=np.float32)
    try:
        session = onnxruntime.InferenceSession(_PROBE, options, providers=[provider], enable_fallback=0)
        if provider not in session.get_providers():
            return "its libraries or its driver cannot be loaded"
        result = session.run(None, {"x": image})[0]
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        return "takes no part of a graph here" if "fallback to CPU EP" in str(error) else str(error).partition("\n")[0]
    return None if np.array_equal(result, 2 * image) else f"gives wrong results ({result} for {2 * image})"


class OnnxRuntimeBackend:
    """An exported model in ONNX Runtime; may be called from many threads, which take turns on a GPU.

    Args:
        path: The model file.
        device: "auto" takes CUDA if this build has it and a session really gets it, else the CPU; "cuda" fails if
            the session would run elsewhere.
        threads: CPU threads of one inference; None takes ONNX Runtime's own number, the physical cores; it knows of
            no container's quota and no affinity, so with these `wsss_deploy.environment.thread_limit`.

    Raises:
        ArtifactError: The file is no model of the export's contract.
        BackendError: The device does not work.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, device: str, threads: int | None = None) -> None:
        self._threads = threads or thread_limit()
        self._reason = "asked for"
        check_onnx(path)
        card = read_card(path)
        self._precision, self._classes = card.precision, len(card.classes)
        self._bound: BoundSession | None = None
        self._copies = "none, the model runs in the host's memory"
        if device != "cpu":
            reason = self._open_cuda(path, device)
            if reason is None:
                self._reason = "CUDA works" if device == "auto" else "asked for"
                self._check_contract(path)
                return
            if device != "auto":
                raise BackendError(
                    f"device '{device}' was asked for, but ONNX Runtime cannot use it: {reason}; use device 'cpu', or "
                    "pip install 'wsss-deploy[gpu]' in place of [cpu], with CUDA 13 and cuDNN 9"
                )
            self._reason = f"CUDA does not work: {reason}"
        self.device = "cpu"
        self._plain = self._open(path, [_CPU])
        self._check_contract(path)

    def _open_cuda(self, path: Path, device: str) -> str | None:
        """Open the session on CUDA; the reason if that does not work."""
        if _CUDA not in onnxruntime.get_available_providers():
            return f"this build has only {', '.join(onnxruntime.get_available_providers())}"
        index = int(device.partition(":")[2] or 0)
        # Finds the CUDA libraries of pip packages; without them ONNX Runtime only prints a message and uses the CPU.
        onnxruntime.preload_dlls()

        def opened(stream: int | None = None) -> Any:
            # The stream has to be one of its own: 0, the default one, means none to ONNX Runtime.
            given = {} if stream is None else {"user_compute_stream": str(stream)}
            session = self._open(path, [(_CUDA, {"device_id": index, **given}), _CPU])
            got = session.get_providers()
            if got[0] != _CUDA:
                raise BackendError(
                    f"the session got {', '.join(got)}; CUDA or cuDNN libraries or the driver are missing"
                )
            session.disable_fallback()  # or a failing run would quietly open it again on the CPU
            return session

        copies = ""
        try:
            try:
                layer = open_device(index)
            except BackendError as error:
                copies = f"by ONNX Runtime, from and to pageable memory: {error}"
                self._plain = opened()
            else:
                bound = BoundSession(opened, layer, index, self._classes)
                self._bound = bound
                copies = f"bound, page-locked, in one stream with the refinement ({layer.name})"
                if not bound.binds_all:
                    copies = "by ONNX Runtime where an output is neither float32 nor uint8, else bound, page-locked"
        except BackendError as error:
            return "; ".join(filter(None, (str(error), copies.partition(": ")[2])))
        self.device, self._copies = f"cuda:{index}", copies
        return None

    @property
    def _session(self) -> Any:
        """Of a bound session there is no second hold: it has to go before its stream."""
        return self._plain if self._bound is None else self._bound.session

    def _open(self, path: Path, providers: list[Any]) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings about node placement are not the user's concern
        options.intra_op_num_threads = self._threads or 0  # 0: its own choice
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's exception classes share no base but Exception
            reason = str(error).partition("\n")[0]
            raise ArtifactError(f"{path}: ONNX Runtime cannot load it ({reason}); export it again") from error

    def _check_contract(self, path: Path) -> None:
        inputs = {item.name: item.type for item in self._session.get_inputs()}
        outputs = [item.name for item in self._session.get_outputs()]
        if inputs != {"image": "tensor(uint8)"} or "scores" not in outputs:
            raise ArtifactError(
                f"{path}: found inputs {inputs} and outputs {outputs}, expected input 'image' (uint8) and output "
                "'scores'; export it with wsss-export"
            )
        shape = next(item.shape for item in self._session.get_outputs() if item.name == "scores")
        if len(shape) == 4 and isinstance(shape[1], int) and shape[1] != self._classes:
            raise ArtifactError(
                f"{path}: its graph gives {shape[1]} classes, its card names {self._classes}; export it again"
            )

    def run(self, images: npt.NDArray[np.uint8], refiner: Refiner | None = None) -> Output:
        """Class probabilities, see `Backend.run`; the refiner works where the runtime's output is, if it can."""
        return Output(*self._output("scores", images, refiner))

    def masks(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Class ids, see `Backend.masks`."""
        found: npt.NDArray[np.uint8] = self._output("mask", images)[0]
        return found

    def masks_at_obstacle(self, settings: Refinement | None) -> str | None:
        """See `SizedMasks`."""
        return "the scores are in the host's memory" if self._bound is None else self._bound.masks_at_obstacle(settings)

    def masks_at(
        self, images: npt.NDArray[np.uint8], sizes: Sequence[tuple[int, int]], refiner: Refiner | None
    ) -> list[npt.NDArray[np.uint8]]:
        """See `SizedMasks`."""
        if self._bound is None:
            raise BackendError(f"masks cannot be made on the device: {self.masks_at_obstacle(None)}; use run or masks")
        return parted(self._output("scores", images, refiner, sizes)[0], sizes)

    def _output(
        self,
        name: str,
        images: npt.NDArray[np.uint8],
        refiner: Refiner | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[npt.NDArray[Any], float]:
        """One output, and the milliseconds that refining took."""
        try:
            if self._bound is None:
                result, spent = self._session.run([name], {"image": images})[0], None
            else:
                result, spent = self._bound.run(name, images, refiner, sizes)
        except Exception as error:  # as above
            shape = " x ".join(map(str, images.shape[:3]))
            raise failure(
                f"ONNX Runtime failed on {self.device} with images of {shape} ({str(error).partition(chr(10))[0]}); "
                "use smaller batches, a smaller sizing or another device",
                error,
            ) from error
        if sizes is not None or spent is not None:
            return result, spent or 0.0
        return refined_here(result, images, refiner)

    def refinement_form(self, settings: Refinement) -> Form:
        """See `Backend.refinement_form`."""
        if self._bound is not None:
            return form_beside(self._bound.obstacle(settings))
        return choose("auto", is_torch=False)

    def describe(self) -> dict[str, Any]:
        """What really runs, see `Backend.describe`."""
        return {
            "backend": self.name,
            "version": onnxruntime.__version__,
            "device": self.device,
            "device_reason": self._reason,
            "providers": self._session.get_providers(),
            "copies": self._copies,
            "precision": self._precision,
            "threads": self._threads or "its default",
        }
