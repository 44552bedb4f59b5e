"""Which model the demo opens, and which images it offers beside it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from wsss_deploy.artifact import read_card
from wsss_deploy.backends import RUNTIMES
from wsss_deploy.errors import WsssError
from wsss_deploy.image_files import find_images

#: Looked for in the current folder, in this order.
USUAL_MODELS = ("model.onnx", "model.pt", "quickstart/model.onnx", "quickstart/model.pt")
#: Folders beside a model, in this order.
EXAMPLE_FOLDERS = ("examples", "data/images", "images")
_MAX_EXAMPLE_BYTES = 4 * 2**20
#: Opened where there is no other: the network of `wsss-quickstart` with seed 0, and validation scenes beside it.
STARTER = Path(__file__).parent / "assets" / "starter" / "model.onnx"


def find_model(folder: Path) -> Path | None:
    """The model that is opened where only a folder is known; None if there is none.

    Args:
        folder: Where to look.
    """
    return next((folder / name for name in USUAL_MODELS if (folder / name).is_file()), None)


def models_beside(model: Path) -> list[Path]:
    """Other models in a model's folder.

    Args:
        model: The model's file.
    """
    names = sorted({path for suffix in RUNTIMES for path in model.parent.glob(f"*{suffix}")})
    return [path for path in names if path.name != model.name and _is_model(path)]


def _is_model(path: Path) -> bool:
    try:
        read_card(path)
    except WsssError:
        return False
    return True


def find_examples(model: Path, limit: int = 8) -> list[Path]:
    """Images that lie beside a model.

    Where the folder is a data set with a validation split, its images are taken: those the model was not trained on.

    Args:
        model: The model's file.
        limit: At most so many.

    Returns:
        Small, readable images; empty if there is no such folder.
    """
    for name in EXAMPLE_FOLDERS:
        folder = model.parent / name
        try:
            images = find_images([folder]) if folder.is_dir() else []
        except WsssError:  # a folder without images
            continue
        held_out = _names(folder.parent / "splits" / "val.txt")
        images = [image for image in images if image.stem in held_out] or images
        usable = [image for image in images[: 4 * limit] if _is_usable(image)]
        if usable:
            return usable[:limit]
    return []


def _names(path: Path) -> frozenset[str]:
    try:
        return frozenset(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return frozenset()


def _is_usable(path: Path) -> bool:
    """Whether a browser shows it quickly: the thumbnails are the files themselves."""
    try:
        with Image.open(path) as image:
            return image.format in ("JPEG", "PNG", "WEBP") and path.stat().st_size <= _MAX_EXAMPLE_BYTES
    except Exception:  # Pillow's readers raise almost anything; a bad file is simply no example
        return False
