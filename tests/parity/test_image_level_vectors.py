"""Published vectors of training from image tags through the production code; README_imagelevel.md says what they hold.

The case is chosen by the file's prefix and the arrays it holds, never by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional as F

from training.cam.image_bank import ImageBank
from training.cam.labels import LabelRule, band_labels, byte_image, plain_labels, present_cams, refined_labels
from training.cam.maps import multi_scale_cams
from training.cam.propagation import propagated_cams, refined_in_box
from training.cam.prototypes import (
    fuse_kinds,
    fuse_scales,
    normalise_by_peak,
    pixel_correlation,
    prototype_cams,
    prototypes,
    seeds,
)
from training.losses.attention_affinity import affinity_labels, affinity_loss, window_mask
from training.losses.balanced_cross_entropy import balanced_cross_entropy
from training.losses.self_correspondence import sample_points, self_correspondence_loss
from training.losses.shared_feature import (
    classification_loss,
    distribution_coefficients,
    prototype_consistency,
    scale_consistency,
)
from training.methods.cam_methods import SharedFeatureCams, TaggedImages
from training.methods.tag_settings import SharedFeatureSettings
from training.optimiser import learning_rate
from training.recipe import Optimisation
from wsss_deploy.card import Preprocessing
from wsss_deploy.pairwise import PairwiseParameters

Arrays = Mapping[str, np.ndarray]


def assert_close(name: str, found: torch.Tensor | float, expected: np.ndarray, tolerance: float) -> None:
    """Largest deviation within `tolerance` of the largest expected magnitude; where that is 0, exactly 0."""
    found = np.asarray(found.detach() if isinstance(found, torch.Tensor) else found, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    error, scale = np.abs(found - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{name}: deviates by {error:.3g}, allowed {tolerance:g} of {scale:.3g}"


def double(arrays: Arrays, name: str, gradient: bool = False) -> torch.Tensor:
    return torch.from_numpy(arrays[name]).double().requires_grad_(gradient)


def check_self_correspondence(arrays: Arrays) -> None:
    """scd_: loss, gradients to both logits and none to CAMs; samples where the file holds them."""
    names = ("feats", "feats_pos", "code", "code_pos")
    points = [torch.from_numpy(arrays[name]) for name in ("coords1", "coords2")]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        maps = [torch.from_numpy(arrays[name]).to(dtype).requires_grad_() for name in names]
        loss = self_correspondence_loss(*maps, *points)
        loss.backward()
        assert_close("loss", loss, arrays["loss_f64"], tolerance)
        assert maps[0].grad is None
        assert maps[1].grad is None
        for name, value in zip(names[2:], maps[2:], strict=True):
            assert_close(f"grad_{name}", value.grad, arrays[f"grad_{name}_f64"], tolerance * 10)
        for index, name in enumerate(names):
            if f"{name}_sampled_f64" in arrays:
                found = sample_points(maps[index], points[index % 2])
                assert_close(f"{name}_sampled", found, arrays[f"{name}_sampled_f64"], tolerance)


def check_affinity(arrays: Arrays) -> None:
    """affinity_: CAMs over scales, labels from CAMs, affinity and its loss, propagation, the schedule."""
    parts = {
        "aff_pred": check_affinity_loss,
        "cam_f64": check_multi_scale_cams,
        "refined_label_par": check_labels,
        "warmup_iter": check_schedule,
    }
    found = [check for key, check in parts.items() if key in arrays]
    assert len(found) == 1, f"no case for a file with {sorted(arrays)}"
    found[0](arrays)


def check_affinity_loss(arrays: Arrays) -> None:
    height, width = arrays["hw"].tolist()
    radius = int(arrays["radius"])
    assert np.array_equal(window_mask(height, width, radius).numpy(), arrays["mask"] == 1)
    labels = affinity_labels(torch.from_numpy(arrays["cam_label"]), (height, width), radius)
    assert np.array_equal(labels.numpy(), arrays["aff_label"])
    predicted = double(arrays, "aff_pred", gradient=True)
    loss = affinity_loss(predicted, labels)
    loss.backward()
    assert_close("loss", loss, arrays["loss_f64"], 1e-9)
    assert_close("grad_aff_pred", predicted.grad, arrays["grad_aff_pred_f64"], 1e-6)


def check_multi_scale_cams(arrays: Arrays) -> None:
    weight = double(arrays, "weight")

    def scores(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.avg_pool2d(image, 16, stride=16, ceil_mode=True), weight)

    found = multi_scale_cams(scores, double(arrays, "inputs"), arrays["scales"].tolist())
    assert_close("cam", found, arrays["cam_f64"], 1e-9)
    inputs = torch.from_numpy(arrays["inputs"])
    normalisation = Preprocessing(
        mean=tuple(value / 255 for value in (123.675, 116.28, 103.53)),
        std=tuple(value / 255 for value in (58.395, 57.12, 57.375)),
        stride=16,
    )
    levels = inputs * torch.tensor((58.395, 57.12, 57.375)).view(1, 3, 1, 1)
    levels = levels + torch.tensor((123.675, 116.28, 103.53)).view(1, 3, 1, 1)
    # Inside the byte's range, and not where a rounding error decides between two grey levels.
    sure = (levels > 0) & (levels < 255) & ((levels + 0.5).frac() - 0.5).abs().gt(2e-3)
    image = byte_image(inputs, normalisation)
    assert_close("denorm2", image[sure], torch.from_numpy(arrays["denorm2"])[sure].numpy(), 1e-6)
    assert torch.equal((image * 255).round()[sure].to(torch.uint8), torch.from_numpy(arrays["denorm_u8"])[sure])


def check_labels(arrays: Arrays) -> None:
    tags, cams, image = (double(arrays, name) for name in ("cls_label", "cams", "imgs"))
    valid = torch.zeros(len(cams), *cams.shape[-2:], dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(valid, arrays["img_box"].tolist(), strict=True):
        mask[top:bottom, left:right] = True
    high, low = float(arrays["high_thre"]), float(arrays["low_thre"])
    present = present_cams(cams, tags)
    assert_close("valid_cam", present, arrays["valid_cam"], 1e-7)
    assert np.array_equal(plain_labels(present, float(arrays["bkg_score"])), arrays["cam_label_plain"])
    assert np.array_equal(band_labels(present, high, low, valid), arrays["cam_label_ignore_mid"])
    for kind in ("par", "varm"):
        refiner = PairwiseParameters(
            kind=kind, dilations=tuple(arrays["dilations"].tolist()), iterations=int(arrays["num_iter"])
        )
        found = refined_labels(image, cams, tags, valid, LabelRule(high, low, refiner))
        wrong = (found.numpy() != arrays[f"refined_label_{kind}"]).mean()
        assert wrong <= 1e-3, f"{kind}: {wrong:.2%} of the labels differ"
        assert refined_labels(image.float(), cams.float(), tags, valid, LabelRule(high, low, refiner)).eq(found).all()
    affinity_matrix, radius = double(arrays, "aff"), int(arrays["aff_radius"])
    coarse = double(arrays, "cams_low_f64")
    for background, key in ((low, "prop_l_f64"), (high, "prop_h_f64")):
        spread = propagated_cams(coarse, tags, affinity_matrix, radius, background)
        assert_close(key, spread, arrays[key], 1e-7)
    boxes = torch.from_numpy(arrays["img_box"])
    sharp = refined_in_box(image, double(arrays, "prop_l_f64"), tags, boxes, LabelRule(refiner=refiner_of(arrays)))
    assert_close("prop_l_par", sharp, arrays["prop_l_par_f64"], 1e-5)
    logits = double(arrays, "seg_logits", gradient=True)
    loss = balanced_cross_entropy(logits, torch.from_numpy(arrays["refined_label_par"]).long())
    loss.backward()
    assert_close("seg_loss", loss, arrays["seg_loss_f64"], 1e-9)
    assert_close("grad_seg_logits", logits.grad, arrays["grad_seg_logits"], 1e-6)


def refiner_of(arrays: Arrays) -> PairwiseParameters:
    dilations, iterations = tuple(arrays["dilations"].tolist()), int(arrays["num_iter"])
    return PairwiseParameters(kind="par", dilations=dilations, iterations=iterations)


def check_schedule(arrays: Arrays) -> None:
    """The published factor jumps at the end of the warm-up; it is the recipe's `schedule: switch`."""
    total = int(arrays["max_iter"])
    settings = Optimisation(
        iterations=total,
        learning_rate=float(arrays["base_lr"][0]),
        warmup=int(arrays["warmup_iter"]) / total,
        power=float(arrays["power"]),
        schedule="switch",
        warmup_start=float(arrays["warmup_ratio"]),
    )
    found = [learning_rate(int(step), settings) for step in arrays["steps"]]
    factor = float(arrays["base_lr"][1] / arrays["base_lr"][0])
    assert_close("lr", torch.tensor([[rate, factor * rate] for rate in found]), arrays["lr"], 1e-6)


def check_shared_features(arrays: Arrays) -> None:
    """sfc_: head and total loss, pixel correlation and prototypes, the losses alone, the image bank, CAM fusion."""
    parts = {
        "w_classifier": check_head,
        "norm_cam_in": check_prototypes,
        "cam_proto_raw": check_shared_feature_losses,
        "bank_image_id": check_bank,
        "proto_fused": check_fusion,
    }
    found = [check for key, check in parts.items() if key in arrays]
    assert len(found) == 1, f"no case for a file with {sorted(arrays)}"
    found[0](arrays)


VOC_COUNTS = (590, 504, 705, 468, 714, 393, 1150, 1005, 1228, 267, 613, 1188, 445, 492, 4155, 522, 300, 649, 503, 567)


class Levels:
    """An encoder whose maps are given: of the half view, which the method makes itself."""

    stride, indices = 1, (0, 1, 2, 3)

    def __init__(self, channels, half, maps):
        self.channels, self.half, self.maps = channels, half, maps

    def __call__(self, image):
        assert_close("half view", image, self.half.numpy(), 1e-6)
        return self.maps


def check_head(arrays: Arrays) -> None:
    weights = {name.removeprefix("w_"): torch.from_numpy(arrays[name]) for name in arrays if name.startswith("w_")}
    sides = [weights[f"side{level}"] for level in range(1, 5)]
    channels = [side.shape[1] for side in sides]
    settings = SharedFeatureSettings(pooling=1.0, sides=tuple(side.shape[0] for side in sides))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-4)):
        image, tags = torch.from_numpy(arrays["image"]).to(dtype), torch.from_numpy(arrays["label"]).to(dtype)
        valid = torch.from_numpy(arrays["valid_mask_full"])[:, 0] != 0
        levels = {
            view: [torch.from_numpy(arrays[f"x{level}_{view}"]).to(dtype).requires_grad_() for level in range(1, 5)]
            for view in "ab"
        }
        half = F.interpolate(image, scale_factor=0.5, mode="bilinear", align_corners=True)
        encoder = Levels(channels, half, levels["b"])
        method = SharedFeatureCams(settings, encoder, 21, image.shape[-1], VOC_COUNTS, 660.0).to(dtype)
        named = {"classifier.weight": weights["classifier"], "embed.weight": weights["f9"]}
        method.head.load_state_dict(named | {f"side.{level}.weight": side for level, side in enumerate(sides)})
        maps = []
        method.head.register_forward_hook(lambda head, given, found, maps=maps: maps.append((given[2], found)))
        loss = method.terms(encoder, TaggedImages(image, valid, tags), dict(enumerate(levels["a"])))
        for view, (mask, seen) in zip("ab", maps, strict=True):
            assert np.array_equal(mask.numpy(), arrays[f"valid_mask_lr_{view}"])
            found = {
                "score": seen.scores[:, :, None, None],
                "cam0": seen.classifier,
                "cam1": seen.smoothed,
                "cam2": seen.prototype,
                "prototypes": seen.prototypes,
            }
            for name, value in found.items():
                assert_close(f"{name}_{view}", value, arrays[f"{name}_{view}_f64"], tolerance)
        total = sum(loss.values())
        total.backward()
        names = {"cls": "classification", "pdw": "prototype", "wdw": "scale"}
        for name, value in {**{short: loss[name] for short, name in names.items()}, "total": total}.items():
            assert_close(f"loss_{name}", value, arrays[f"loss_{name}_f64"], tolerance)
        head = method.head
        gradients = {"classifier": head.classifier.weight.grad, "f9": head.embed.weight.grad}
        gradients |= {f"side{level}": layer.weight.grad for level, layer in enumerate(head.side, start=1)}
        for name, value in gradients.items():
            assert_close(f"grad_w_{name}", value, arrays[f"grad_w_{name}"], 10 * tolerance)
        for view in "ab":
            assert_close(f"grad_x4_{view}", levels[view][3].grad, arrays[f"grad_x4_{view}"], 10 * tolerance)
            assert all(level.grad is None for level in levels[view][:3])


def check_prototypes(arrays: Arrays) -> None:
    cam, feature, weight = (double(arrays, name, gradient=True) for name in ("cam", "feat", "w_f9"))
    smoothed = pixel_correlation(cam, F.conv2d(feature, weight))
    assert_close("pcm", smoothed, arrays["pcm_f64"], 1e-9)
    smoothed.backward(double(arrays, "cotangent"))
    for name, value in {"cam": cam, "feat": feature, "w_f9": weight}.items():
        assert_close(f"grad_{name}", value.grad, arrays[f"grad_{name}"], 1e-9)
    deep = double(arrays, "hie_feat", gradient=True)
    found = prototypes(deep, seeds(double(arrays, "norm_cam_in"), double(arrays, "valid_mask")))
    cams = prototype_cams(deep, found)
    normed = normalise_by_peak(cams)
    assert_close("prototypes", found, arrays["prototypes"], 1e-9)
    assert_close("is_cam", cams, arrays["is_cam"], 1e-9)
    assert_close("is_cam_normed", normed, arrays["is_cam_normed"], 1e-9)
    normed.backward(double(arrays, "cotangent2"))
    assert_close("grad_hie_feat", deep.grad, arrays["grad_hie_feat"], 1e-8)


def check_shared_feature_losses(arrays: Arrays) -> None:
    names = ("cam1", "cam_proto_raw", "cam1_half", "score1", "score2")
    given = {name: double(arrays, name, gradient=True) for name in names}
    tags, bank = double(arrays, "label")[:, 1:], float(arrays["bank_term"])
    assert_close("dc", distribution_coefficients(arrays["class_counts"].tolist(), bank), arrays["dc"], 1e-7)
    scores = [classification_loss(given[name].mean(dim=(2, 3)), tags) for name in ("score1", "score2")]
    maps = (given[name] for name in ("cam1", "cam_proto_raw", "cam1_half"))
    smoothed, prototype, half = maps
    coefficients, settings = distribution_coefficients(arrays["class_counts"].tolist(), bank), SharedFeatureSettings()
    loss = {
        "cls": sum(scores) / 2,
        "pdw": settings.prototype_weight * prototype_consistency(smoothed, prototype, coefficients),
        "wdw": settings.scale_weight * scale_consistency(smoothed, half, tags, coefficients),
    }
    total = sum(loss.values())
    total.backward()
    for name, value in {**loss, "total": total}.items():
        assert_close(f"loss_{name}", value, arrays[f"loss_{name}"], 1e-7)
    for name, value in given.items():
        assert_close(f"grad_{name}", value.grad, arrays[f"grad_{name}"], 1e-6)


def check_bank(arrays: Arrays) -> None:
    steps, batch, classes = arrays["labels"].shape
    bank, arrived = ImageBank(classes, 2), 0
    for step in range(steps):
        ids = torch.arange(1, batch + 1) + arrived
        arrived += batch
        tags = torch.from_numpy(arrays["labels"][step]).float()
        bank.update(ids.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.ones(batch, 2, 2, dtype=torch.bool), tags)
        assert np.array_equal(bank.images[:, 0, 0, 0].numpy(), arrays["bank_image_id"][step])
        assert np.array_equal(bank.tags.numpy(), arrays["bank_label"][step])
        assert np.array_equal(bank.filled.numpy(), arrays["bank_image_id"][step] > 0)


def check_fusion(arrays: Arrays) -> None:
    size, keys = tuple(arrays["size"].tolist()), torch.from_numpy(arrays["keys"])
    assert np.array_equal(keys.numpy(), np.flatnonzero(arrays["label"]))
    fused = {}
    for kind in ("cls", "proto"):
        scales = [torch.from_numpy(arrays[f"{kind}_cam_{index}"])[None] for index in range(4)]
        fused[kind] = fuse_scales(scales, size)[:, keys]
        assert_close(f"{kind}_fused", fused[kind][0], arrays[f"{kind}_fused"], 1e-5)
    final = fuse_kinds(fused["cls"], fused["proto"])
    assert_close("final", final[0], arrays["final"], 1e-5)
    assert np.array_equal(final[0].argmax(0).numpy(), arrays["fg_argmax_key"])
    unsure = torch.cat([final[:, :1] * 0.5, final[:, 1:]], dim=1)
    assert np.array_equal(unsure[0].argmax(0).numpy(), arrays["bg_argmax_key"])


CASES: dict[str, Callable[[Arrays], None]] = {
    "scd_": check_self_correspondence,
    "affinity_": check_affinity,
    "sfc_": check_shared_features,
}


def run_case(name: str, arrays: Arrays) -> None:
    next(check for prefix, check in CASES.items() if name.startswith(prefix))(arrays)


def test_vector(vector_file):
    with np.load(vector_file, allow_pickle=False) as data:
        run_case(vector_file.stem, dict(data))
