"""A TensorRT engine from an exported ONNX file: strongly typed, any size within a profile, with a manifest beside it.

What is float16 is written in the file (`--precision fp16`), so one way of building serves TensorRT 10.9 and 11. A graph
that refines gets the CUDA plugin (`export.tensorrt_plugin`), whose code then lies in the engine. **Not run**: building
needs a GPU; tested are the calls, against stand-ins and against the names that NVIDIA's bindings have.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from wsss_deploy import __version__
from wsss_deploy.artifact import read_card
from wsss_deploy.backends.device_layer import DeviceLayer, open_device
from wsss_deploy.backends.tensorrt import load_tensorrt
from wsss_deploy.card import ModelCard, Sizing
from wsss_deploy.engine_manifest import EngineManifest, Shapes, manifest_path, plugin_digests
from wsss_deploy.errors import ExportError, UsageError
from wsss_deploy.files import atomic_write
from wsss_deploy.pairwise import ptx_cache
from wsss_deploy.sizing import seen_size

#: Releases with ahead-of-time Python plugins and strongly typed networks.
OLDEST = (10, 9)
#: Heights and widths of common photographs, a square and a small picture.
ORDINARY = ((480, 640), (640, 480), (1080, 1920), (3024, 4032), (512, 512), (240, 320))

_log = logging.getLogger(__name__)


def read_shapes(text: str) -> Shapes:
    """Read `--shapes`: smallest, best and largest batch, height and width.

    Args:
        text: For example "1x64x64/1x512x512/8x1024x1024".

    Raises:
        UsageError: It is no such text, or the three are not ordered.
    """
    parts = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", part.strip()) for part in text.split("/")]
    if len(parts) != 3 or not all(parts):
        raise UsageError(
            f"--shapes {text}: expected MIN/BEST/MAX of BATCHxHEIGHTxWIDTH, as 1x64x64/1x512x512/8x1024x1024"
        )
    low, best, high = (tuple(int(group) for group in part.groups()) for part in parts if part)
    if not all(1 <= a <= b <= c <= 65536 for a, b, c in zip(low, best, high, strict=True)):
        raise UsageError(f"--shapes {text}: expected every number of MIN at most BEST's, and BEST's at most MAX's")
    return ((low[0], low[1], low[2]), (best[0], best[1], best[2]), (high[0], high[1], high[2]))


def default_shapes(card: ModelCard) -> Shapes:
    """One image up to the card's largest size, best at the working size, up to eight at once.

    Args:
        card: The model's card.
    """
    stride, fixed = card.preprocessing.stride, card.preprocessing.fixed_size
    wanted = card.sizing.tile or card.sizing.long_side or min(512, card.sizing.max_long_side)
    largest = card.sizing.tile or card.sizing.long_side or card.sizing.max_long_side
    best, most = (-(-min(side, fixed or side) // stride) * stride for side in (wanted, largest))
    return (1, 1, 1), (1, best, best), (8, most, most)


def check_shapes(shapes: Shapes, card: ModelCard) -> None:
    """Check that an engine of these shapes takes what the runtime will give it by the card's plan.

    Args:
        shapes: Smallest, best and largest batch, height and width.
        card: The model's card, as it will be exported.

    Raises:
        UsageError: It takes larger images than the graph, hardly any, or none of the ordinary ones.
    """
    low, _, high = shapes
    text = "/".join("x".join(map(str, shape)) for shape in shapes)
    stride, fixed = card.preprocessing.stride, card.preprocessing.fixed_size
    if fixed is not None and max(high[1:]) > fixed:
        raise UsageError(
            f"--shapes {text}: this graph takes images up to {fixed} pixels a side; lower MAX, or export another --size"
        )
    if min(high[1:]) < max(stride, 16):
        raise UsageError(f"--shapes {text}: expected at least {max(stride, 16)} pixels a side of MAX")
    limited = _within(card, shapes)
    planned = {size: seen_size(*size, limited) for size in ORDINARY}
    outside = [
        f"{height} x {width} becomes {planned[height, width][0]} x {planned[height, width][1]}"
        for height, width in ORDINARY
        if not all(a <= side <= b for a, side, b in zip(low, (1, *planned[height, width]), high, strict=True))
    ]
    if len(outside) == len(ORDINARY):
        raise UsageError(
            f"--shapes {text}: one ordinary image at a time lies outside by the card's sizing ({outside[0]}); "
            "lower MIN, 1x1x1 takes all"
        )
    if outside:
        _log.warning("--shapes %s: some ordinary images lie outside and will be refused: %s", text, "; ".join(outside))


def load_builder() -> Any:
    """The module tensorrt, where it can build engines.

    Raises:
        BackendError: Driver or library is missing.
        ExportError: TensorRT is too old.
    """
    trt = load_tensorrt()
    if tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2]) < OLDEST:
        raise ExportError(f"TensorRT {trt.__version__} is too old, expected 10.9 or newer; pip install -U tensorrt")
    return trt


def build_engine(onnx_file: Path, engine: Path, shapes: Shapes | None, command: str) -> EngineManifest:
    """Build an engine for the GPU of this machine and write it with its manifest.

    The card in the manifest keeps images within the profile, so that the runtime resizes what is too large.

    Args:
        onnx_file: What `export_onnx` wrote.
        engine: Where the engine is to be.
        shapes: Smallest, best and largest batch, height and width; None takes `default_shapes`.
        command: What builds it anew, for the manifest.

    Raises:
        ArtifactError: The ONNX file cannot be used.
        BackendError: Driver, library or GPU is missing.
        ExportError: TensorRT is too old or cannot build it.
        UsageError: The shapes do not fit the model.
    """
    card = read_card(onnx_file)
    shapes = shapes or default_shapes(card)
    check_shapes(shapes, card)
    trt = load_builder()
    layer = open_device(0)
    plugins = plugin_digests(card.refinement)
    if plugins:
        from export.tensorrt_plugin import register_plugins

        register_plugins()
    content = onnx_file.read_bytes()
    versions = {**card.versions, "tensorrt": trt.__version__, "engine": __version__}
    with layer.active():
        plan = _build(trt, content, shapes, layer)
    manifest = EngineManifest(
        tensorrt=trt.__version__,
        gpu=layer.gpu,
        compute_capability=layer.compute_capability,
        shapes=shapes,
        plugins=plugins,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        command=command,
        card=_within(card, shapes).model_copy(update={"versions": versions}),
    )
    # The manifest first: it names the engine's digest, so that a kill in between cannot deceive.
    with atomic_write(manifest_path(engine)) as file:
        file.write((manifest.model_dump_json(indent=2) + "\n").encode())
    with atomic_write(engine) as file:
        file.write(plan)
    return manifest


def _within(card: ModelCard, shapes: Shapes) -> ModelCard:
    """The card with sizing that keeps images below the largest shape."""
    stride, sizing = card.preprocessing.stride, card.sizing
    # Sides are rounded to strides, up, too.
    most = max(min(shapes[2][1:]) // stride * stride, 16)
    limited = Sizing(
        long_side=None if sizing.long_side is None else min(sizing.long_side, most),
        max_long_side=min(sizing.max_long_side, most),
        tile=None if sizing.tile is None else min(sizing.tile, most),
        overlap=min(sizing.overlap, most // 2),
    )
    return card.model_copy(update={"sizing": limited})


def _build(trt: Any, content: bytes, shapes: Shapes, layer: DeviceLayer) -> bytes:
    logger = _logger(trt)
    builder = trt.Builder(logger)
    flags = 0
    for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"):
        # Releases differ in which of them they still need.
        flag = getattr(trt.NetworkDefinitionCreationFlag, name, None)
        flags |= 0 if flag is None else 1 << int(flag)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(min(parser.num_errors, 3)))
        raise ExportError(f"TensorRT {trt.__version__} cannot read the graph: {reasons}; try another --opset")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((*shape, 3) for shape in shapes))
    config.add_optimization_profile(profile)
    config.progress_monitor = _monitor(trt)
    # Timings hold for one kind of GPU only, of which several may share a compute capability.
    gpu = re.sub(r"[^A-Za-z0-9.-]+", "_", layer.gpu)
    name = f"{trt.__version__}-{layer.compute_capability}-{gpu}.timing"
    cache_file = ptx_cache.folder().parent / "tensorrt" / name
    _attach_timings(config, _read(cache_file))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"TensorRT {trt.__version__} cannot build the engine: {logger.last or 'no reason given'}; "
            "try smaller --shapes, or --refine none"
        )
    _keep_timings(config, cache_file)
    return bytes(memoryview(plan))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error and passes everything on as debug messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message.strip().partition("\n")[0]
            _log.debug("TensorRT: %s", message)

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the phases of a build, which may take minutes, at every tenth of each outermost one."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps
                _log.info("TensorRT: %s", phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name, 0)
            if steps >= 10 and step % (steps // 10) == 0:
                _log.info("TensorRT: %s, %d of %d", phase_name, step, steps)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _attach_timings(config: Any, content: bytes) -> None:
    """Give a build the timings of earlier ones, or an empty cache where TensorRT does not take them."""
    for given in dict.fromkeys((content, b"")):
        try:
            cache = config.create_timing_cache(given)
            if cache is not None and config.set_timing_cache(cache, False):
                return
        except Exception as error:  # bindings answer what is damaged by None, False or errors of several kinds
            _log.debug("a timing cache cannot be used: %s", error)


def _keep_timings(config: Any, path: Path) -> None:
    """Keep the timing cache; without one the next build is only slower, so that nothing here may fail an export."""
    try:
        os.makedirs(path.parent, exist_ok=True)
        content = bytes(memoryview(config.get_timing_cache().serialize()))
        with atomic_write(path) as file:
            file.write(content)
    except Exception as error:  # as above
        _log.debug("the timing cache cannot be kept: %s", error)
