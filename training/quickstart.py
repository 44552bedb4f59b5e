"""`wsss-quickstart`: the whole path on scenes that it draws itself, from scribbles to an exported model.

No network, no downloads, no GPU: scenes are drawn, a small hierarchical vision transformer is trained from scratch
with the Gated CRF loss, exported to ONNX in a process of its own, and the exported file segments the validation
scenes.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wsss_deploy.cli.common import ArgumentParser, run_command, seed_number
from wsss_deploy.errors import ExportError, TrainingError

_log = logging.getLogger(__name__)

#: TinyViT (arXiv 2207.10666), narrower and one block a stage: convolutions at stride 4, window attention from 8 on.
RECIPE: Mapping[str, Any] = {
    "supervision": "scribbles",
    "method": {
        "name": "gated_crf",
        "start": 0.3,
        "stride": 4,
        "radius": 5,
        "kernels": [{"weight": 1.0, "xy": 6.0, "rgb": 0.25}],
    },
    "model": {
        "encoder": "tiny_vit_5m_224",
        "encoder_options": {
            "embed_dims": [64, 96, 128, 160],
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 3, 4, 5],
            "window_sizes": [8, 8, 8, 4],
            "mbconv_expand_ratio": 2.0,
            "drop_path_rate": 0.0,
        },
        "decoder": "light",
        "decoder_width": 64,
        "weights": "none",
    },
    "augmentation": {"size": 128, "scale": [0.9, 1.15]},
    "inference_long_side": 128,
    "optimisation": {
        "iterations": 900,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "decoder_factor": 1.0,
        "ema": 0.99,
    },
}
TRAIN_SCENES, VAL_SCENES = 400, 60
PRODUCTS = ("model.pt", "model.onnx", "parity.json", "contact_sheet.png")
_STAGE = ".unfinished"
_SHEET_ROWS = 5


@dataclass(frozen=True)
class Summary:
    """What a quickstart achieved.

    Attributes:
        folder: Where everything lies.
        miou: Of the exported model on the validation scenes, whole images.
        iou: Per class.
        seconds: Wall time of everything.
    """

    folder: Path
    miou: float
    iou: Mapping[str, float]
    seconds: float


def quickstart(
    out: Path,
    seed: int = 0,
    iterations: int | None = None,
    scenes: tuple[int, int] = (TRAIN_SCENES, VAL_SCENES),
    show: bool = True,
) -> Summary:
    """Draw scenes, train, export, predict.

    Everything is made in a hidden folder inside `out` and moved to its place at the end, so that a run that was
    stopped leaves nothing that looks finished; the next run into the same folder starts over.

    Args:
        out: Folder for the results; made when absent.
        seed: Seed of scenes and training.
        iterations: Optimiser steps; None takes the recipe's.
        scenes: Number of training and validation scenes.
        show: Progress of the training on the terminal.

    Raises:
        TrainingError: `out` holds a finished quickstart, or files of those names from elsewhere.
        ExportError: The export failed.
    """
    started = time.monotonic()
    stage = _claim(out)
    # Here, not above: torch takes seconds to import, and wrong arguments should not wait for it.
    from training.data.dataset import open_dataset
    from training.data.synthetic import write_scenes
    from training.evaluate import evaluate
    from training.run import resolve_recipe, run
    from wsss_deploy import Segmenter

    _log.info("1/4 drawing %d scenes with scribbles", sum(scenes))
    data = write_scenes(stage / "data", *scenes, seed=seed)
    source = open_dataset(data)

    steps = iterations or RECIPE["optimisation"]["iterations"]
    _log.info("2/4 training from the scribbles: Gated CRF, %d iterations, from scratch", steps)
    chosen = {"seed": seed, "optimisation": {"iterations": steps}, "evaluation": {"every": steps}}
    recipe = resolve_recipe(source, None, [RECIPE, chosen])
    model = run(recipe, source, stage / "run", show=show).model
    model = model.replace(stage / "model.pt")
    (stage / "run" / "checkpoint.pt").unlink(missing_ok=True)  # the run is finished; nothing is left to resume

    _log.info("3/4 exporting to ONNX and comparing with torch")
    _export(model, stage)

    _log.info("4/4 segmenting the validation scenes with the exported model")
    segmenter = Segmenter(stage / "model.onnx")
    result = evaluate(segmenter, source, source.splits["val"], "val")
    _write_sheet(stage / "contact_sheet.png", source, segmenter, result.miou)
    _finish(stage, out)
    return Summary(out, result.miou, dict(zip(result.classes, result.iou, strict=True)), time.monotonic() - started)


def _claim(out: Path) -> Path:
    """An empty stage inside `out`."""
    stage = out / _STAGE
    moved = [out / name for name in (*PRODUCTS, "run", "data") if (out / name).exists()]
    if moved and not stage.exists():
        raise TrainingError(
            f"{out}: already holds {moved[0].name}; choose another --out, or delete the folder to start over"
        )
    try:
        if stage.exists():
            _log.info("%s: an earlier quickstart was stopped here; starting over", out)
            shutil.rmtree(stage)
        stage.mkdir(parents=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot be used ({error.strerror}); choose another --out") from error
    return stage


def _finish(stage: Path, out: Path) -> None:
    """Move the results to their places, what tells a finished run last."""
    for name in ("data", "run", *PRODUCTS):
        target = out / name
        if target.is_dir():
            shutil.rmtree(target)
        (stage / name).replace(target)
    stage.rmdir()


def _export(model: Path, out: Path) -> None:
    # The packages do not import each other: export is the command that users have, too.
    command = [sys.executable, "-m", "export.cli", str(model), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ExportError(f"the export failed: {lines[-1]}; install the extra 'export' if it is missing")


def _write_sheet(path: Path, source: Any, segmenter: Any, miou: float) -> None:
    from training.contact_sheet import SheetRow, contact_sheet

    rows = []
    for name in source.splits["val"][:_SHEET_ROWS]:
        image = source.load_image(name)
        rows.append(
            SheetRow(
                image=image,
                weak=source.load_labels(name, "scribbles"),
                prediction=segmenter.predict(image).mask,
                truth=source.load_labels(name, "masks"),
            )
        )
    title = "wsss-deploy quickstart"
    caption = f"Validation scenes, not seen in training. Learned from scribbles, exported to ONNX: mIoU {miou:.3f}"
    contact_sheet(rows, source.classes, source.palette, title, caption).save(path)


def _report(summary: Summary) -> str:
    out = summary.folder
    width = max(len(name) for name in summary.iou)
    lines = ["", *(f"  {name:<{width}}  IoU {value:.3f}" for name, value in summary.iou.items())]
    lines += [
        "",
        f"{out / 'model.pt'}, model.onnx, parity.json: the model, its export, and the proof that both agree",
        f"{out / 'contact_sheet.png'}: look at this first",
        "",
        "next:",
        f"  wsss-predict {out / 'data' / 'images'} --model {out / 'model.onnx'} --out predictions",
        f"  wsss-demo {out / 'model.onnx'}",
        "  wsss-train YOUR_DATA --supervision scribbles --out runs/yours    # the folder layout: docs/data.md",
        "",
        f"done in {summary.seconds:.0f} s",
        f"mIoU {summary.miou:.4f}",
    ]
    return "\n".join(lines)


def _run(arguments: argparse.Namespace) -> None:
    print(_report(quickstart(arguments.out, arguments.seed)))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-quickstart`."""
    parser = ArgumentParser(
        "wsss-quickstart",
        "Draw synthetic scenes, train from scribbles, export, predict: a few minutes on two CPU cores.",
        "example:\n  wsss-quickstart --out quickstart",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything")
    parser.add_argument(
        "--seed", type=seed_number, default=0, metavar="N", help="seed of scenes and training (default: 0)"
    )
    run_command(parser, _run, argv)


if __name__ == "__main__":
    main()
