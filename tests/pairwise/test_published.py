"""Every instruction set against the published modules' own outputs; tests/parity runs the forms."""

from __future__ import annotations

import numpy as np
import pytest

from wsss_deploy.pairwise import PairwiseParameters, native, numpy_form

FILES = [
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


@pytest.fixture(params=FILES)
def vector(request, shared):
    data = np.load(shared / "parity" / f"{request.param}.npz")
    parameters = PairwiseParameters(
        kind=request.param.split("_")[0],
        dilations=tuple(int(d) for d in data["dilations"]),
        iterations=int(data["num_iter"]),
    )
    return parameters, data


def deviation(ours, published) -> float:
    """Relative to the array's maximum, as the vectors' README states tolerances."""
    return float(np.abs(np.asarray(ours) - published).max() / np.abs(published).max())


def test_every_instruction_set(vector, isa):
    parameters, data = vector
    guide = data["imgs"].astype(np.float64)
    masks = np.ascontiguousarray(numpy_form.resize(data["masks"].astype(np.float64), *guide.shape[2:]))
    out = np.empty_like(masks)
    native.refine(parameters, masks, guide, None, out, 2, isa)
    assert deviation(out, data["out_f64"]) < 1e-7
