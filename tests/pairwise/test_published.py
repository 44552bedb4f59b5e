"""Every form against the published modules' own outputs (shared/parity)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsss_deploy.pairwise import PairwiseParameters, affinity, native, numpy_form, refine

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


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("form", ["cpu", "plain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-7), (np.float32, 1e-5)])
def test_outputs(vector, library, form, dtype, tolerance, request):
    if form == "cpu":
        request.getfixturevalue("compiled")
    parameters, data = vector
    masks, guide = data["masks"].astype(dtype), data["imgs"].astype(dtype)
    if library == "torch":
        masks, guide = torch.from_numpy(masks), torch.from_numpy(guide)
    out = refine(masks, guide, parameters, form=library if form == "plain" else form)
    assert deviation(out, data["out_f64"]) < tolerance


def test_every_instruction_set(vector, isa):
    parameters, data = vector
    guide = data["imgs"].astype(np.float64)
    masks = np.ascontiguousarray(numpy_form.resize(data["masks"].astype(np.float64), *guide.shape[2:]))
    out = np.empty_like(masks)
    native.refine(parameters, masks, guide, None, out, 2, isa)
    assert deviation(out, data["out_f64"]) < 1e-7


@pytest.mark.parametrize("form", ["cpu", "numpy"])
def test_weights(vector, form, request):
    if form == "cpu":
        request.getfixturevalue("compiled")
    parameters, data = vector
    if "weights_f64" not in data:
        pytest.skip("this vector has no weights")
    weights = affinity(data["imgs"].astype(np.float64), parameters, form=form)
    assert deviation(weights, data["weights_f64"]) < 1e-7
    np.testing.assert_allclose(weights.sum(1), 1.01 if parameters.kind == "par" else 0.99, rtol=1e-12)


@pytest.mark.parametrize("form", ["cpu", "torch"])
def test_gradients(vector, form, request):
    if form == "cpu":
        request.getfixturevalue("compiled")
    parameters, data = vector
    if "cotangent" not in data:
        pytest.skip("this vector has no gradients")
    guide = torch.from_numpy(data["imgs"]).double().requires_grad_()
    masks = torch.from_numpy(data["masks"]).double().requires_grad_()
    out = refine(masks, guide, parameters, form=form)
    grads = torch.autograd.grad(out, (guide, masks), torch.from_numpy(data["cotangent"]))
    assert deviation(grads[0], data["grad_imgs_f64"]) < 1e-6
    assert deviation(grads[1], data["grad_masks_f64"]) < 1e-6
