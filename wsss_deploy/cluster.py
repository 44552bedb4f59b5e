"""Many images on many machines: Ray Data gives blocks of images to workers that each hold the model (extra `ray`).

A worker writes every mask whole or not at all, under a name that belongs to its image alone. So a block that is given
out again, after a worker or a machine has died, writes the same files anew; and at the end each image has to have been
reported exactly once, or the whole is an error. Images and results lie where all machines reach them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsss_deploy.backends import check_device_name
from wsss_deploy.cli.output_names import output_names
from wsss_deploy.errors import ImageError, UsageError, WsssError
from wsss_deploy.native_stderr import without_lines
from wsss_deploy.segmentation import write_png

_log = logging.getLogger(__name__)

_WARNED = b"has constructor arguments in the object store and max_restarts > 0"
_INSTALL = "pip install 'wsss-deploy[ray]'"


@dataclass(frozen=True)
class ParquetImages:
    """Encoded images (PNG, JPEG, ...) in a Parquet file or a folder of them.

    Attributes:
        path: File or folder.
        image: Column of the files' bytes.
        name: Column of their names, each of them once.
    """

    path: Path
    image: str = "image"
    name: str = "name"


class Predictor:
    """What a worker does with its blocks; made once in each.

    Args:
        model: Path of the model file.
        out: Folder for the masks.
        device: As in `Segmenter`.
        threads: CPU threads of one inference.
        refine: As in `Segmenter`.
    """

    def __init__(self, model: str, out: str, device: str, threads: int, refine: bool | None) -> None:
        # Here: a worker loads the runtime, the process that gives out the work does not.
        from wsss_deploy.segmenter import Segmenter

        self._segmenter = Segmenter(model, device=device, threads=threads, refine=refine)
        self._out = Path(out)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Segment a block.

        Args:
            batch: Columns `source` and `target`, and `image` for images that are no files.

        Returns:
            Columns `source`, `result` (JSON), `error`, empty where there is none, and `ran` (JSON), what the worker
            runs.
        """
        ran = json.dumps(self._segmenter.describe())
        images = batch.get("image", batch["source"])
        results, errors = [], []
        for source, target, image in zip(batch["source"], batch["target"], images, strict=True):
            result, error = "", ""
            try:
                if "image" in batch and not isinstance(image, bytes):
                    raise ImageError(
                        f"{source}: the table holds no image for it; fill in the cell or leave the row out"
                    )
                given = image if "image" in batch else str(image)
                found = self._segmenter.predict(given)
                write_png(self._out / f"{target}_mask.png", found.mask_image())
                result = json.dumps({"image": str(source), "mask": f"{target}_mask.png", **found.summary()})
            except (WsssError, OSError, ValueError) as problem:  # of this image, or of a name that no file can have
                error = str(problem) if str(source) in str(problem) else f"{source}: {problem}"
            results.append(result)
            errors.append(error)
        columns = {"result": results, "error": errors, "ran": [ran] * len(results)}
        return {"source": batch["source"]} | {name: np.array(values, object) for name, values in columns.items()}


def predict_on_ray(
    images: Sequence[Path] | ParquetImages,
    model: Path,
    out: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    device: str = "auto",
    refine: bool | None = None,
    batch: int = 8,
    predictor: type[Predictor] = Predictor,
) -> dict[str, Any]:
    """Segment images on a Ray cluster and write `NAME_mask.png` for each.

    Args:
        images: Image files, or a Parquet table that holds them.
        model: The model file; every machine reads it there.
        out: Folder for the masks, on storage that every machine shares.
        address: Of the cluster; None starts Ray on this machine, or uses one that is running in this process.
        workers: Copies of the model, at most as many as the cluster's CPUs (or GPUs) allow, which is None's choice.
        threads: CPU threads of a worker.
        device: As in `Segmenter`; "cuda", and "auto" where the cluster has GPUs, reserves one for each worker.
        refine: As in `Segmenter`.
        batch: Images in a block.
        predictor: What a worker does.

    Returns:
        `images`, the summaries in the order of the sources, `failed`, images with their errors, and `runtimes`, the
        different ones of `Segmenter.describe` among the workers.

    Raises:
        UsageError: Ray is not installed or not to be reached, no worker fits into the cluster, the table is not as
            described, or there is no such device.
        WsssError: An image was lost or reported twice, or the workers failed altogether.
    """
    check_device_name(device)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a segmenter reports to nobody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f"predicting on a cluster needs Ray; {_INSTALL}") from error
    if device.startswith("cuda:"):
        raise UsageError(f"device {device}: the cluster chooses the GPU of each worker; use 'cuda'")
    sources = source_names(images)
    if not sources:
        raise UsageError("there is no image to segment; pass some, or a table with rows")
    if not _log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a failure is told once, by the error
    targets = dict(zip(sources, output_names([Path(source) for source in sources]), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster at '{address}' ({str(error).strip().partition(chr(10))[0]}); start one with "
                "`ray start --head`, check the address, or leave it out to use this machine"
            ) from error
    try:
        total = ray.cluster_resources()
        gpu = model.suffix != ".xml" and (device == "cuda" or (device == "auto" and total.get("GPU", 0) > 0))
        # One CPU stays for reading the table; workers that hold all of them would wait for it in vain.
        spare = 1 if isinstance(images, ParquetImages) else 0
        most = (int(total.get("CPU", 0)) - spare) // threads
        most = min(most, int(total.get("GPU", 0))) if gpu else most
        if most < 1:
            wanted = f"{threads + spare} CPUs{' and a GPU' if gpu else ''}"
            raise UsageError(
                f"not one worker fits: {wanted} are needed, the cluster has {total.get('CPU', 0):.0f} CPUs and "
                f"{total.get('GPU', 0):.0f} GPUs; lower --threads, or take another --device"
            )
        count = min(workers or most, most, len(sources))
        rows = _rows(ray.data, images, targets).map_batches(
            predictor,
            fn_constructor_args=(str(model.absolute()), str(out.absolute()), device, threads, refine),
            batch_size=batch,
            concurrency=count,
            num_gpus=1 if gpu else 0,
            num_cpus=threads,
        )
        # Ray Data lets dead workers begin anew and gives them their arguments by its store, of which Ray warns each
        # time. This process holds them until all is done: they cannot be lost while a worker may need them.
        with nullcontext() if _log.isEnabledFor(logging.DEBUG) else without_lines(_WARNED):
            found = rows.take_all()
    except ray.exceptions.RayError as error:
        raise WsssError(f"the workers failed ({_root(str(error))}); --debug shows all of it") from error
    finally:
        if started:
            ray.shutdown()
    return _record(sources, found)


def _root(text: str) -> str:
    """What a worker raised first, from the tracebacks that Ray's errors are made of."""
    raised: list[str] = re.findall(r"^(?:\w+\.)*([A-Z]\w*(?:: .+)?)$", text, re.MULTILINE)
    lines = raised or [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    return lines[0].strip()[:300]


def source_names(images: Sequence[Path] | ParquetImages) -> list[str]:
    """What the images are called in results; file names without folder and suffix are made of it.

    Raises:
        UsageError: The table is not as described.
    """
    if not isinstance(images, ParquetImages):
        return [str(path.absolute()) for path in images]
    import pyarrow
    import pyarrow.dataset

    table = images

    try:
        dataset = pyarrow.dataset.dataset(table.path, format="parquet")
    except (OSError, ValueError) as error:
        raise UsageError(f"{table.path}: cannot be read as Parquet ({str(error).partition(chr(10))[0]})") from error
    missing = [column for column in (table.image, table.name) if column not in dataset.schema.names]
    if missing:
        raise UsageError(
            f"{table.path}: has no column {' and '.join(missing)} (columns: {', '.join(dataset.schema.names)}); name "
            "them with --image-column and --name-column"
        )
    kind = dataset.schema.field(table.image).type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise UsageError(f"{table.path}: column {table.image} is of type {kind}, expected binary: the images' files")
    cells = dataset.to_table(columns=[table.name])[table.name].to_pylist()
    if not cells:
        raise UsageError(f"{table.path}: holds no rows, expected one for each image")
    if None in cells:
        raise UsageError(
            f"{table.path}: column {table.name} is empty in row {cells.index(None) + 1}; names tell results apart"
        )
    names = [str(name) for name in cells]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            f"{table.path}: column {table.name} holds '{twice[0]}' more than once; names tell results apart"
        )
    return names


def _rows(data: Any, images: Sequence[Path] | ParquetImages, targets: Mapping[str, str]) -> Any:
    if not isinstance(images, ParquetImages):
        return data.from_items([{"source": source, "target": target} for source, target in targets.items()])
    table = images

    def named(row: dict[str, Any]) -> dict[str, Any]:
        source = str(row[table.name])
        return {"source": source, "target": targets[source], "image": row[table.image]}

    return data.read_parquet(str(table.path)).select_columns([table.image, table.name]).map(named)


def _record(sources: Sequence[str], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries and errors, when every image was reported once."""
    counts = Counter(str(row["source"]) for row in found)
    lost = [source for source in sources if not counts[source]]
    doubled = [source for source, count in counts.items() if count > 1]
    if lost or doubled:
        raise WsssError(
            f"of {len(sources)} images {len(lost)} were lost and {len(doubled)} reported twice "
            f"({(lost + doubled)[0]}); run it again, finished masks are only written anew"
        )
    by_source = {str(row["source"]): row for row in found}
    ordered = [by_source[source] for source in sources]
    return {
        "images": [json.loads(row["result"]) for row in ordered if not row["error"]],
        "failed": [{"image": str(row["source"]), "error": str(row["error"])} for row in ordered if row["error"]],
        "runtimes": [json.loads(text) for text in sorted({str(row["ran"]) for row in found})],
    }
