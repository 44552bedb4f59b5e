"""Every form that tests/parity cannot run against the published modules' own outputs.

These are the single instruction sets and the CUDA kernels, by a stand-in for the driver; the ONNX functions are in
test_onnx_functions.py.
"""

from __future__ import annotations

import numpy as np
import torch

from wsss_deploy.pairwise import cuda_form, native, numpy_form


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


def test_the_cuda_kernels(vector, driver):
    parameters, data = vector
    guide = torch.from_numpy(data["imgs"].astype(np.float32))
    masks = torch.from_numpy(numpy_form.resize(data["masks"].astype(np.float32), *guide.shape[2:])).contiguous()
    out = torch.empty_like(masks)
    cuda_form.refine(parameters, masks, guide.contiguous(), None, out)
    assert deviation(out, data["out_f64"]) < 1e-5
    assert len(driver.launches) == 1 + parameters.iterations
