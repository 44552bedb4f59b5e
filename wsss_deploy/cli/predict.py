"""wsss-predict: segment images and write masks and overlays."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wsss_deploy.artifact import read_card
from wsss_deploy.card import LARGEST_SIDE, Sizing
from wsss_deploy.cli.common import MODEL_FILES, ArgumentParser, run_command
from wsss_deploy.cli.output_names import output_names, replaceable
from wsss_deploy.environment import thread_limit
from wsss_deploy.errors import BackendError, ImageError, UsageError, WsssError
from wsss_deploy.files import atomic_write
from wsss_deploy.image_files import find_images
from wsss_deploy.segmentation import write_png
from wsss_deploy.segmenter import Segmenter
from wsss_deploy.tiling import Tiling

RECORD = "predictions.json"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-predict`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-predict",
        "Segment images. Writes NAME_mask.png (pixel values are class ids) and NAME_overlay.png for each, and "
        f"{RECORD} with the classes' shares and the timing.",
        "An image that cannot be used is reported at the end and does not stop the others; the exit status is then 1.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or quoted patterns")
    parser.add_argument("--model", required=True, metavar="FILE", help=MODEL_FILES)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the runtime (default: its own, within what this process may use; with --ray 1)",
    )
    parser.add_argument("--opacity", type=float, metavar="X", help="of the overlay's tint, 0 to 1 (default: 0.5)")
    parser.add_refinement()
    parser.add_argument(
        "--tile", type=int, metavar="PX", help="cut larger images into windows of PX pixels; none is resized"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="that windows of --tile share (default: 64, or half a tile)"
    )
    cluster = parser.add_argument_group("on a cluster (extra ray)", "Masks alone are written, no overlays.")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="share the images among workers of a Ray cluster; without ADDRESS on this machine. IMAGE may be a table, "
        "NAME.parquet",
    )
    cluster.add_argument("--workers", type=int, metavar="N", help="copies of the model (default: as many as fit)")
    cluster.add_argument("--image-column", metavar="C", help="of a table: encoded images (default: image)")
    cluster.add_argument("--name-column", metavar="C", help="of a table: their names (default: name)")
    parser.add_argument("--json", action="store_true", help=f"print the content of {RECORD} instead of a summary")
    run_command(parser, _predict, argv)


def _predict(arguments: argparse.Namespace) -> int:
    for option in ("workers", "threads"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            raise UsageError(f"--{option} {getattr(arguments, option)}: expected 1 or more")
    if arguments.ray is not None:
        return _predict_on_ray(arguments)
    _refuse(arguments, ("workers", "image_column", "name_column"), "without --ray")
    if arguments.tile is None:
        _refuse(arguments, ("overlap",), "without --tile")
    opacity = 0.5 if arguments.opacity is None else arguments.opacity
    if not 0 <= opacity <= 1:
        raise UsageError(f"--opacity {opacity}: expected a number from 0 to 1")
    out: Path = arguments.out
    images = _images(arguments)
    names = output_names(images)
    _check_targets(out, names)
    sizing = None
    if arguments.tile is not None:
        tiling = Tiling(
            arguments.tile, min(64, arguments.tile // 2) if arguments.overlap is None else arguments.overlap
        )
        if tiling.tile > LARGEST_SIDE:
            raise UsageError(f"--tile {tiling.tile}: expected at most {LARGEST_SIDE} pixels")
        planned = read_card(arguments.model).sizing.model_dump()
        sizing = Sizing(**{**planned, "tile": tiling.tile, "overlap": tiling.overlap})
    segmenter = Segmenter(
        arguments.model,
        arguments.device,
        threads=arguments.threads or thread_limit(),
        refine=arguments.refine,
        sizing=sizing,
    )

    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    console = Console(stderr=True)
    columns = (TextColumn("segmenting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for image, name in zip(progress.track(images), names, strict=True):
            try:
                result = segmenter.predict(image)
            except (ImageError, BackendError) as error:  # of this image; an ArtifactError would be of all
                message = str(error) if str(image) in str(error) else f"{image}: {error}"
                failed.append({"image": str(image), "error": message})
                continue
            mask, overlay = _targets(out, name)
            write_png(mask, result.mask_image())
            write_png(overlay, result.overlay(opacity=opacity))
            done.append({"image": str(image), "mask": mask.name, "overlay": overlay.name, **result.summary()})

    record = {"format": "wsss-predict", "runtime": segmenter.describe(), "images": done, "failed": failed}
    text = json.dumps(record, indent=2) + "\n"
    with atomic_write(out / RECORD) as file:
        file.write(text.encode())
    if arguments.json or done:
        sys.stdout.write(text if arguments.json else _report(record, out))
    return _tell(failed, len(images))


def _predict_on_ray(arguments: argparse.Namespace) -> int:
    from wsss_deploy.cluster import ParquetImages, predict_on_ray, source_names

    if arguments.tile is not None:
        raise UsageError("--tile and --ray do not go together; set the card's sizing.tile, or leave one out")
    _refuse(arguments, ("overlap",), "without --tile")
    _refuse(arguments, ("opacity",), "with --ray, which writes no overlays")
    out: Path = arguments.out
    tables = [path for path in arguments.images if path.endswith(".parquet")]
    if tables and len(arguments.images) > 1:
        raise UsageError(f"{tables[0]}: one table at a time; put its parts into one folder NAME.parquet")
    images: list[Path] | ParquetImages
    if tables:
        images = ParquetImages(Path(tables[0]), arguments.image_column or "image", arguments.name_column or "name")
    else:
        _refuse(arguments, ("image_column", "name_column"), "without a table, NAME.parquet")
        images = _images(arguments)
    try:
        names = source_names(images)
    except ImportError as error:
        raise UsageError("reading a table needs Ray's extra; pip install 'wsss-deploy[ray]'") from error
    _check_targets(out, output_names([Path(name) for name in names]))
    read_card(arguments.model)  # what is wrong with the file is told here, not by every worker
    found = predict_on_ray(
        images,
        Path(arguments.model),
        out,
        address=arguments.ray or None,
        workers=arguments.workers,
        threads=arguments.threads or 1,
        device=arguments.device,
        refine=arguments.refine,
    )
    text = json.dumps({"format": "wsss-predict", **found}, indent=2) + "\n"
    with atomic_write(out / RECORD) as file:
        file.write(text.encode())
    count = len(found["images"])
    if arguments.json or count:
        sys.stdout.write(text if arguments.json else f"{count} segmented on the cluster; results in {out}\n")
    return _tell(found["failed"], count + len(found["failed"]))


def _refuse(arguments: argparse.Namespace, options: Sequence[str], where: str) -> None:
    """Refuse options that would do nothing."""
    for option in options:
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} has no effect {where}; leave it out")


def _images(arguments: argparse.Namespace) -> list[Path]:
    images = [image for image in find_images(arguments.images) if not _is_result(image, arguments.out)]
    if not images:
        raise ImageError(f"{', '.join(arguments.images)}: holds only results of wsss-predict; pass the images")
    return images


def _tell(failed: Sequence[dict[str, str]], total: int) -> int:
    """Exit status, after a line for each image that failed."""
    for failure in failed:
        sys.stderr.write(f"wsss-predict: {failure['error']}\n")
    if failed and total > 1:  # of a single image, the line above has said it
        sys.stderr.write(f"wsss-predict: {len(failed)} of {total} images could not be segmented\n")
    return 1 if failed else 0


def _targets(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}_mask.png", out / f"{name}_overlay.png"


def _is_result(image: Path, out: Path) -> bool:
    """Whether a file was written by an earlier run into the same folder."""
    return (
        image.stem.endswith(("_mask", "_overlay"))
        and os.path.abspath(image.parent) == os.path.abspath(out)
        and replaceable(image)
    )


def _check_targets(out: Path, names: Sequence[str]) -> None:
    if out.exists() and not out.is_dir():
        raise WsssError(f"{out}: is a file, expected a folder for the results; choose another --out")
    targets = [out / RECORD, *(target for name in names for target in _targets(out, name))]
    taken = [target.name for target in targets if target.exists() and not replaceable(target)]
    if taken:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise WsssError(
            f"{out}: holds files that wsss-predict did not write and would overwrite ({', '.join(taken[:3])}{more}); "
            "choose another --out"
        )


def _report(record: dict[str, Any], out: Path) -> str:
    lines = []
    for item in record["images"]:
        shares = ", ".join(f"{entry['name']} {entry['share']:.1%}" for entry in item["classes"])
        lines.append(f"{item['image']}  {sum(item['timing_ms'].values()):.0f} ms  {shares}")
    runtime = record["runtime"]
    lines.append(
        f"{len(record['images'])} segmented with {runtime['model']} in {runtime['backend']} on {runtime['device']}, "
        f"{'not refined' if runtime['refinement']['form'] == 'none' else 'refined'}; results in {out}"
    )
    return "\n".join(lines) + "\n"
