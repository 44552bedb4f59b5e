"""What `wsss-export` is asked for, checked as a whole before anything slow begins."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from export.fixed_size import with_fixed_size
from export.formats import check, read_formats
from export.openvino_ir import load_openvino
from export.patterns import MOST_IMAGES
from export.quantise import split_images
from export.tensorrt_engine import check_shapes, default_shapes, load_builder, read_shapes
from export.triton import check_serving
from wsss_deploy.artifact import read_card
from wsss_deploy.bench.accuracy import find_pairs
from wsss_deploy.engine_manifest import Shapes
from wsss_deploy.errors import UsageError
from wsss_deploy.image_files import find_images
from wsss_deploy.images import load_image

#: Options that belong to one format.
_OWNED = {"shapes": "engine", "name": "triton", "max_batch": "triton", "instances": "triton"}


@dataclass(frozen=True)
class Request:
    """Arguments that fit together, the model and this machine.

    Attributes:
        formats: Names of `--format`.
        images: Files of `--images`.
        data: Folder of `--data` and its split.
        shapes: Of an engine.
        name: Of the model on a Triton server.
        instances: Copies of it on each device.
    """

    formats: frozenset[str]
    images: tuple[Path, ...]
    data: tuple[Path, str] | None
    shapes: Shapes
    name: str
    instances: int


def check_arguments(arguments: argparse.Namespace) -> Request:
    """Check everything that can be told without loading the network.

    Args:
        arguments: Of `wsss-export`.

    Raises:
        UsageError: Options that no format takes, that contradict one another, or that the model does not allow.
        ArtifactError: The model file cannot be used.
        ImageError: An image that would be looked at cannot be used.
        DataError: `--data` is no folder with masks.
        BackendError: What builds an engine is not installed, or there is no driver.
        ExportError: It is too old; `--size` does not fit the network; or the repository's folder holds something else.
    """
    formats = read_formats(arguments.format)
    check(formats, arguments.precision, arguments.refine, arguments.images is not None)
    names = frozenset(item.name for item in formats)
    for option, owner in _OWNED.items():
        if getattr(arguments, option) is not None and owner not in names:
            flag = option.replace("_", "-")
            raise UsageError(f"--{flag} is for --format {owner}; add that format, or leave --{flag} out")
    if arguments.split is not None and arguments.data is None:
        raise UsageError("--split is for --data; add the folder, or leave --split out")
    card = with_fixed_size(read_card(arguments.model), arguments.size, arguments.model.name)
    shapes = default_shapes(card) if arguments.shapes is None else read_shapes(arguments.shapes)
    name = arguments.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", card.name).strip("._-")[:128] or "wsss"
    instances = 1 if arguments.instances is None else arguments.instances
    if "engine" in names:
        check_shapes(shapes, card)
    if "triton" in names:
        repository = (arguments.out or arguments.model.parent) / "triton"
        check_serving(repository, name, arguments.max_batch, instances, shapes if "engine" in names else None)
    data = None if arguments.data is None else (arguments.data, arguments.split or "val")
    if data is not None:
        find_pairs(*data)
    images = find_images([arguments.images]) if arguments.images is not None else []
    calibration, judged = split_images(images) if arguments.precision == "int8" else ([], images[:MOST_IMAGES])
    for image in dict.fromkeys((*judged, *calibration)):
        load_image(image)
    if "engine" in names:
        load_builder()
    if "openvino" in names:
        load_openvino()
    return Request(names, tuple(images), data, shapes, name, instances)


def engine_command(arguments: argparse.Namespace) -> str:
    """The command that builds the same engine from any folder of this machine.

    Args:
        arguments: Of `wsss-export`.
    """
    paths = {"out": arguments.out or arguments.model.parent, "images": arguments.images, "data": arguments.data}
    options = {
        "precision": arguments.precision,
        "opset": arguments.opset,
        "refine": arguments.refine,
        "size": arguments.size,
        "shapes": arguments.shapes,
        **{name: None if path is None else os.path.abspath(path) for name, path in paths.items()},
        "split": arguments.split,
    }
    command = ["wsss-export", os.path.abspath(arguments.model), "--format", "engine"]
    for name, value in options.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(command)
