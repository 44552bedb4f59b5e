from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from wsss_deploy.pairwise import (
    GaussianTerm,
    MeanField,
    PairwiseParameters,
    forms,
    native,
)

TERMS = (GaussianTerm(weight=0.9, sigma_xy=6.0, sigma_rgb=0.1), GaussianTerm(weight=0.2, sigma_features=0.5))
CASES = {
    "par": PairwiseParameters(dilations=(1, 2, 4), iterations=3),
    "par-official": PairwiseParameters(iterations=2),
    "varm": PairwiseParameters(kind="varm", dilations=(1, 3), iterations=3, normalise=True),
    "gaussian": PairwiseParameters(kind="gaussian", radius=2, terms=TERMS, iterations=2),
    "gaussian-normalised": PairwiseParameters(
        kind="gaussian", dilations=(1, 5), terms=TERMS, iterations=3, normalise=True
    ),
    "mean-field": PairwiseParameters(
        kind="gaussian", radius=3, terms=TERMS, iterations=3, mean_field=MeanField(compatibility=0.7)
    ),
}


VECTORS = [
    f"{kind}_{name}"
    for kind in ("par", "varm")
    for name in (
        "01_small_weights",
        "02_official_c21_upsampled",
        "03_blocks_onehot",
        "04_flat_degenerate",
        "05_grad",
        "06_noise_15iter",
    )
]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def cases():
    return CASES


@pytest.fixture
def compiled() -> None:
    form = forms()[0]
    # Without a compiler the package installs without it, and so it does where the sources do not compile.
    if not form.available and (shutil.which("g++") or shutil.which("clang++")):
        pytest.fail(f"there is a C++ compiler, but {form.reason}")
    if not form.available:
        pytest.skip(form.reason)


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request, compiled) -> str:
    tiny = np.zeros((1, 1, 2, 2), np.float32)
    try:
        native.affinity(PairwiseParameters(dilations=(1,)), tiny, np.empty((1, 8, 2, 2), np.float32), 1, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(params=VECTORS)
def vector(request, shared):
    """Parameters and arrays of a published file."""
    data = np.load(shared / "parity" / f"{request.param}.npz")
    parameters = PairwiseParameters(
        kind=request.param.split("_")[0],
        dilations=tuple(int(d) for d in data["dilations"]),
        iterations=int(data["num_iter"]),
    )
    return parameters, data


@pytest.fixture
def scene():
    """Random guide with flat parts, and probabilities: scene(N, C, G, H, W, dtype)."""

    def make(batch=2, classes=3, channels=4, height=19, width=37, dtype=np.float64, seed=0):
        rng = np.random.default_rng(seed)
        guide = rng.random((batch, channels, height, width))
        guide[..., : height // 2, : width // 2] = 0.25
        scores = rng.random((batch, classes, height, width)) ** 4
        masks = scores / scores.sum(1, keepdims=True)
        return SimpleNamespace(guide=guide.astype(dtype), masks=masks.astype(dtype))

    return make


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""
