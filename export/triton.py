"""A model repository of NVIDIA's Triton Inference Server around an exported file.

    REPOSITORY/NAME/config.pbtxt        types, shapes, batching; the model's card as the parameter `wsss_card`
    REPOSITORY/NAME/1/model.onnx        or model.plan, a TensorRT engine

No ensemble is needed: the graph takes the bytes of images and gives scores and mask. A second export of the same name
becomes the next version; Triton serves the newest. Clients read the card through the server, see
`wsss_deploy.triton_client`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from export.scratch import scratch_folder
from wsss_deploy.artifact import read_card
from wsss_deploy.card import ModelCard
from wsss_deploy.engine_manifest import Shapes, read_manifest
from wsss_deploy.errors import ExportError, UsageError
from wsss_deploy.files import atomic_write
from wsss_deploy.sizing import seen_size

CONFIG = "config.pbtxt"
#: Images that Triton puts together where nobody says another number.
MAX_BATCH = 8
#: Platform and file name by suffix.
_PLATFORMS = {".onnx": ("onnxruntime_onnx", "model.onnx"), ".engine": ("tensorrt_plan", "model.plan")}


def check_serving(repository: Path, name: str, max_batch: int | None, instances: int, shapes: Shapes | None) -> int:
    """Check what is to be written into a repository.

    Args:
        repository: Folder of the repository; it need not exist.
        name: Of the model on the server.
        max_batch: Images that Triton puts together at most; None takes `MAX_BATCH`, or what the engine takes.
        instances: Copies of the model that run at once on each device.
        shapes: Smallest, best and largest of an engine.

    Returns:
        The number of images that Triton puts together at most.

    Raises:
        ExportError: The folder holds something else.
        UsageError: The name or a number cannot be used.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", name):
        raise UsageError(
            f"model name '{name}': expected letters, digits, '_', '.', '-', beginning with one of the first"
        )
    for option, value in (("max_batch", max_batch), ("instances", instances)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}, expected at least 1")
    folder = repository / name
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise ExportError(f"{folder}: exists and is no Triton model; choose another --out or name")
    if shapes is None:
        return max_batch or MAX_BATCH
    least, most = shapes[0][0], shapes[2][0]
    if least > 1:
        raise UsageError(f"the engine takes {least} images at least, Triton asks for one, too; begin --shapes with 1x")
    if max_batch is not None and max_batch > most:
        raise UsageError(
            f"max_batch is {max_batch}, the engine takes {most} images; lower it, or raise MAX of --shapes"
        )
    return max_batch or min(MAX_BATCH, most)


def write_repository(
    model: Path, repository: Path, name: str, *, max_batch: int | None = None, instances: int = 1, delay_us: int = 2000
) -> Path:
    """Add a model file to a repository as the newest version of a name; the file is there whole or not at all.

    Args:
        model: `model.onnx`, or `model.engine` with its manifest.
        repository: Folder of the repository; made if absent.
        name: Of the model on the server.
        max_batch: Images that Triton puts together at most, requests of one size only; None takes `MAX_BATCH`, or
            what the engine takes.
        instances: Copies of the model that run at once on each device.
        delay_us: Microseconds that a request waits for others.

    Returns:
        The model's folder, `repository/name`.

    Raises:
        ArtifactError: The file cannot be used.
        ExportError: The folder cannot be written, or holds something else.
        UsageError: The name or a number cannot be used.
    """
    suffix = model.suffix.lower()
    folder = repository / name
    shapes = read_manifest(model).shapes if suffix == ".engine" else None
    most = check_serving(repository, name, max_batch, instances, shapes)
    text = config_text(
        read_card(model), name, suffix, max_batch=most, instances=instances, delay_us=delay_us, shapes=shapes
    )
    _, file_name = _PLATFORMS[suffix]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        # Triton ignores folders whose names are no numbers.
        with scratch_folder(folder, ".writing-") as scratch:
            part = scratch / "version"
            part.mkdir()
            shutil.copyfile(model, part / file_name)
            with atomic_write(folder / CONFIG) as file:
                file.write(text.encode())
            os.rename(part, folder / str(max(versions, default=0) + 1))
    except OSError as error:
        raise ExportError(
            f"{folder}: cannot be written ({error.strerror or error}); choose a writable --out"
        ) from error
    return folder


def config_text(
    card: ModelCard,
    name: str,
    suffix: str,
    *,
    max_batch: int = MAX_BATCH,
    instances: int = 1,
    delay_us: int = 2000,
    shapes: Shapes | None = None,
) -> str:
    """The content of `config.pbtxt` (protobuf's text format of Triton's `ModelConfig`).

    Args:
        card: The model's card.
        name: Of the model on the server.
        suffix: ".onnx" or ".engine".
        max_batch: As in `write_repository`.
        instances: As in `write_repository`.
        delay_us: As in `write_repository`.
        shapes: Smallest, best and largest of an engine; the warm-up stays within.
    """
    platform, file_name = _PLATFORMS[suffix]
    height, width = seen_size(480, 640, card)
    if shapes is not None:
        (_, low_height, low_width), _, (_, most_height, most_width) = shapes
        height, width = min(max(height, low_height), most_height), min(max(width, low_width), most_width)
    lines = [
        f"name: {_quoted(name)}",
        f"platform: {_quoted(platform)}",
        f"default_model_filename: {_quoted(file_name)}",
        f"max_batch_size: {max_batch}",
        'input [ { name: "image" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] } ]',
        "output [",
        f'  {{ name: "scores" data_type: TYPE_FP32 dims: [ {len(card.classes)}, -1, -1 ] }},',
        '  { name: "mask" data_type: TYPE_UINT8 dims: [ -1, -1 ] }',
        "]",
        f"instance_group [ {{ count: {instances} kind: KIND_AUTO }} ]",
    ]
    if max_batch > 1:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}")
    lines += [
        # The first request would otherwise wait for memory and kernels.
        f'model_warmup [ {{ name: "working size" batch_size: 1 inputs {{ key: "image" value {{ data_type: TYPE_UINT8 '
        f"dims: [ {height}, {width}, 3 ] zero_data: true }} }} }} ]",
        f'parameters {{ key: "wsss_card" value {{ string_value: {_quoted(card.to_json())} }} }}',
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string of protobuf's text format; everything but plain ASCII as octal bytes."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return '"' + "".join(plain) + '"'
