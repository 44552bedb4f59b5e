"""Published vectors through the production code; README_scribble.md and README_imagelevel.md say what they hold.

The case is chosen by the file's prefix and the arrays it holds, never by its number. The vectors of training from
image tags (scd_, affinity_, sfc_) are in test_image_level_vectors.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.losses import Kernel, feature_consistency_loss, feature_smoothness_loss, gated_crf_loss
from wsss_deploy.pairwise import Form, PairwiseParameters, affinity, forms, refine

Arrays = Mapping[str, np.ndarray]


def assert_close(name: str, found: torch.Tensor | float, expected: np.ndarray, tolerance: float) -> None:
    """Largest deviation within `tolerance` of the largest expected magnitude; where that is 0, exactly 0."""
    found = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    error, scale = np.abs(found - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{name}: deviates by {error:.3g}, allowed {tolerance:g} of {scale:.3g}"


def kernels_of(arrays: Arrays) -> list[Kernel]:
    descriptors = json.loads(str(arrays["kernels_desc"]))
    return [Kernel(entry.pop("weight"), entry) for entry in descriptors]


def check_gated_crf(arrays: Arrays) -> None:
    """gated_crf_ and dfr_kernel_: value and gradients at both precisions, in every form that the file holds."""
    for form in (form.name for form in forms() if form.available and form.name in ("cpu", "torch")):
        for dtype, value_tolerance, gradient_tolerance in ((torch.float64, 1e-10, 1e-10), (torch.float32, 2e-5, 5e-6)):
            for padding in (True, False) if "loss_valid_pairs_f64" in arrays else (True,):
                check_value_and_gradients(arrays, form, dtype, value_tolerance, gradient_tolerance, padding)


def check_value_and_gradients(
    arrays: Arrays,
    form: str,
    dtype: torch.dtype,
    value_tolerance: float,
    gradient_tolerance: float,
    padding: bool,
) -> None:
    logits = torch.from_numpy(arrays["logits"]).to(dtype).requires_grad_()
    probabilities = logits.softmax(dim=1)
    probabilities.retain_grad()
    if "softmax" in arrays:
        assert_close("softmax", probabilities, arrays["softmax"], value_tolerance)
    raw = {
        name.removeprefix("mod_"): torch.from_numpy(values).to(dtype).requires_grad_()
        for name, values in arrays.items()
        if name.startswith("mod_")
    }
    modalities = dict(raw)
    if bool(arrays.get("feat_l2_normalised", False)):
        modalities["feat"] = F.normalize(raw["feat"], dim=1, eps=1e-12)
    given = {
        name: torch.from_numpy(arrays[name]) for name in ("mask_src", "mask_dst", "compatibility") if name in arrays
    }
    before = {name: value.clone() for name, value in given.items()}
    with_kernel = [name for name in raw if f"grad_{name}_f64" in arrays]
    loss = gated_crf_loss(
        probabilities,
        kernels_of(arrays),
        modalities,
        int(arrays["radius"]),
        **given,
        count_padding_pairs=padding,
        kernel_gradient=bool(with_kernel),
        form=form,
    )
    loss.backward()
    assert loss.dtype == dtype
    suffix = "" if padding else "_valid_pairs"
    assert_close(f"{form} loss{suffix}", loss, arrays[f"loss{suffix}_f64"], value_tolerance)
    assert_close(f"{form} grad_logits{suffix}", logits.grad, arrays[f"grad_logits{suffix}_f64"], gradient_tolerance)
    if "grad_softmax_f64" in arrays:
        assert_close(f"{form} grad_softmax", probabilities.grad, arrays["grad_softmax_f64"], gradient_tolerance)
    for name in with_kernel:
        assert_close(f"{form} grad_{name}", raw[name].grad, arrays[f"grad_{name}_f64"], gradient_tolerance)
    if not with_kernel:
        assert all(value.grad is None for value in raw.values())
    for name, value in before.items():
        assert torch.equal(given[name].nan_to_num(-1), value.nan_to_num(-1)), f"{name} was modified"


def check_precursor(arrays: Arrays) -> None:
    """dfr_precursor_: pair terms with the release's zero padding and centre, and its regulariser of features."""
    targets, valid = torch.from_numpy(arrays["label"]), torch.from_numpy(arrays["valid"]).bool()
    # The release counts in float32, where its 1e-5 is mostly rounded away; hence 1e-7 in float64.
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 2e-5)):
        features = torch.from_numpy(arrays["feat"]).to(dtype).requires_grad_()
        radius = int(arrays["radius"])
        loss = feature_consistency_loss(features, targets, radius, label_pad=0, count_centre=True)
        loss.total.backward()
        parts = np.array([arrays[f"{name}_loss"] for name in ("bg", "fg", "neg")])
        counts = np.array([arrays[f"{name}_count"] for name in ("bg", "fg", "neg")])
        assert_close("pair terms", loss.parts, parts, tolerance)
        assert_close("counts", loss.counts, counts, tolerance)
        assert_close("pair loss", loss.total, arrays["pair_loss"], tolerance)
        assert_close("grad_feat_pair", features.grad, arrays["grad_feat_pair_f64"], tolerance)
        features.grad = None
        image = torch.from_numpy(arrays["mod_rgb"]).to(dtype)
        smooth = feature_smoothness_loss(features, image, tuple(kernels_of(arrays)), radius, valid)
        smooth.backward()
        assert_close("regulariser", smooth, arrays["reg_loss"], tolerance)
        assert_close("grad_feat_reg", features.grad, arrays["grad_feat_reg_f64"], tolerance)


# The release keeps its position constants in float32, which the tolerance of float64 allows for.
PRECISIONS = ((torch.float64, 1e-7), (torch.float32, 1e-5))
# What a GPU's kernels take (float16 besides), and what they are held to.
PRECISIONS_ON_CUDA = ((torch.float32, 1e-4),)


def check_refiner(kind: str, arrays: Arrays) -> None:
    """par_ and varm_: refined maps, weights and gradients, in every form that can run here."""
    parameters = PairwiseParameters(
        kind=kind, dilations=tuple(arrays["dilations"].tolist()), iterations=int(arrays["num_iter"])
    )
    for form in (form.name for form in forms() if form.available):
        on_cuda = form == "cuda"
        device, precisions = ("cuda", PRECISIONS_ON_CUDA) if on_cuda else ("cpu", PRECISIONS)
        for dtype, tolerance in precisions:
            guide, masks = (torch.from_numpy(arrays[name]).to(device, dtype) for name in ("imgs", "masks"))
            as_given = (masks.numpy(), guide.numpy()) if form == "numpy" else (masks, guide)
            out = refine(*as_given, parameters, form=form)
            assert_close(f"{form} out", torch.as_tensor(out), arrays["out_f64"], tolerance)
            if "weights_f64" in arrays:
                weights = torch.as_tensor(affinity(as_given[1], parameters, form=form))
                assert_close(f"{form} weights", weights, arrays["weights_f64"], tolerance)
        # Gradients are plain torch's in every form; on a GPU they would be those of float32.
        if "cotangent" in arrays and form != "numpy" and not on_cuda:
            guide, masks = (torch.from_numpy(arrays[name]).double().requires_grad_() for name in ("imgs", "masks"))
            out = refine(masks, guide, parameters, form=form)
            out.backward(torch.from_numpy(arrays["cotangent"]).double())
            assert_close(f"{form} grad_imgs", guide.grad, arrays["grad_imgs_f64"], 1e-6)
            assert_close(f"{form} grad_masks", masks.grad, arrays["grad_masks_f64"], 1e-6)


CASES: dict[str, Callable[[Arrays], None]] = {
    "gated_crf_": check_gated_crf,
    "dfr_kernel_": check_gated_crf,
    "dfr_precursor_": check_precursor,
    "par_": partial(check_refiner, "par"),
    "varm_": partial(check_refiner, "varm"),
}


def run_case(name: str, arrays: Arrays) -> None:
    for prefix, check in CASES.items():
        if name.startswith(prefix):
            return check(arrays)
    return pytest.fail(f"{name}: no case for this family of vectors; known prefixes: {', '.join(CASES)}")


def test_vector(vector_file):
    with np.load(vector_file, allow_pickle=False) as data:
        run_case(vector_file.stem, dict(data))


@pytest.mark.parametrize("kind", ["par", "varm"])
def test_a_gpu_gets_what_its_kernels_take(shared, kind, monkeypatch):
    """Where there is a GPU, the vectors are met on it; there is none here, so the CPU's kernels stand in."""
    taken = []

    def moved(tensor, *where):
        taken.append(where)
        return to(tensor, *("cpu" if place == "cuda" else place for place in where))

    def on_cuda(function):
        def run(*arrays, form):
            assert all(array.dtype == torch.float32 for array in arrays[:-1])
            return function(*arrays, form="cpu" if form == "cuda" else form)

        return run

    to, module = torch.Tensor.to, sys.modules[__name__]
    with np.load(shared / "parity" / f"{kind}_05_grad.npz") as data:
        arrays = dict(data)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(module, "forms", lambda: [Form("cuda", True, "a stand-in")])
    for function in (refine, affinity):
        monkeypatch.setattr(module, function.__name__, on_cuda(function))
    check_refiner(kind, arrays)
    assert set(taken) == {("cuda", torch.float32)}


def test_an_unknown_family_fails():
    with pytest.raises(pytest.fail.Exception, match="known prefixes: gated_crf_"):
        run_case("mystery_01", {})


@pytest.mark.parametrize("change", ["sigma", "weight", "radius", "mask", "loss", "gradient"])
def test_the_check_notices_a_change(shared, change):
    """Every ingredient matters: what the vectors pin cannot drift unseen."""
    with np.load(shared / "parity" / "gated_crf_03_mask_src_pad.npz") as data:
        arrays = dict(data)
    check_gated_crf(arrays)
    kernel = json.loads(str(arrays["kernels_desc"]))[0]
    if change == "sigma":
        arrays["kernels_desc"] = np.array(json.dumps([kernel | {"rgb": kernel["rgb"] * (1 + 1e-6)}]))
    elif change == "weight":
        arrays["kernels_desc"] = np.array(json.dumps([kernel | {"weight": kernel["weight"] * (1 + 1e-6)}]))
    elif change == "radius":
        arrays["radius"] = arrays["radius"] - 1
    elif change == "mask":
        changed = arrays["mask_src"].copy()
        changed[tuple(np.argwhere(changed == 1)[0])] = 0
        arrays["mask_src"] = changed
    elif change == "loss":
        arrays["loss_f64"] = arrays["loss_f64"] * (1 + 1e-6)
    else:
        arrays["grad_logits_f64"] = arrays["grad_logits_f64"] * (1 + 1e-6)
    with pytest.raises(AssertionError, match="deviates"):
        check_gated_crf(arrays)
