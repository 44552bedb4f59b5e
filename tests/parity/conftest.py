"""Where the vectors are: --vectors DIR, or the shared folder's `parity`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Families of test_image_level_vectors.py; every other file, known or not, belongs to test_vectors.py.
_IMAGE_LEVEL = ("scd_", "affinity_", "sfc_")
_DEFAULT = Path(os.environ.get("WSSS_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "parity"


def pytest_addoption(parser):
    parser.addoption("--vectors", type=Path, help="folder of published vectors (*.npz); every file in it is run")


def _folder(config) -> Path | None:
    # Unknown when only a folder above this one was named on the command line.
    return config.getoption("--vectors", default=None)


def pytest_configure(config):
    folder = _folder(config)
    if folder is not None and not any(folder.glob("*.npz")):
        state = "holds no *.npz file" if folder.is_dir() else "is not a folder"
        raise pytest.UsageError(f"--vectors {folder}: {state}; give the folder of the vector files")


def pytest_generate_tests(metafunc):
    if "vector_file" not in metafunc.fixturenames:
        return
    folder = _folder(metafunc.config) or _DEFAULT
    ours = metafunc.module.__name__.endswith("test_image_level_vectors")
    files = sorted(path for path in folder.glob("*.npz") if path.stem.startswith(_IMAGE_LEVEL) == ours)
    absent = pytest.mark.skip(reason="no vectors: set WSSS_SHARED to the shared folder, or give --vectors DIR")
    values = files or [pytest.param(None, marks=absent, id="no-vectors")]
    metafunc.parametrize("vector_file", values, ids=lambda value: value.stem if value else None)
