from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torchmetrics.classification import MulticlassJaccardIndex

from training.evaluate import Evaluator, boundary_band
from wsss_deploy.errors import DataError

CLASSES = ("a", "b", "c", "d")


def random_pair(rng, shape=(37, 53), ignored=0.1):
    truth = np.kron(rng.integers(0, 3, (8, 8)), np.ones((8, 8))).astype(np.uint8)[: shape[0], : shape[1]]
    truth = truth[: shape[0], : shape[1]]
    prediction = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 3, truth.shape), truth).astype(np.uint8)
    return prediction, np.where(rng.random(truth.shape) < ignored, 255, truth).astype(np.uint8)


def test_iou_equals_torchmetrics_over_all_images():
    rng = np.random.default_rng(0)
    evaluator = Evaluator(CLASSES)
    reference = MulticlassJaccardIndex(4, ignore_index=255, average=None)
    for _ in range(4):
        prediction, truth = random_pair(rng)
        evaluator.update(prediction, truth)
        reference.update(torch.from_numpy(prediction.astype(int)), torch.from_numpy(truth.astype(int)))
    result = evaluator.result()
    assert result.iou[:3] == pytest.approx(reference.compute()[:3].tolist(), abs=1e-6)
    assert np.isnan(result.iou[3])
    assert result.miou == pytest.approx(np.mean(result.iou[:3]))
    assert result.foreground_miou == pytest.approx(np.mean(result.iou[1:3]))


def test_dice_follows_from_iou():
    rng = np.random.default_rng(1)
    evaluator = Evaluator(CLASSES)
    evaluator.update(*random_pair(rng))
    result = evaluator.result()
    for dice, iou in zip(result.dice[:3], result.iou[:3], strict=True):
        assert dice == pytest.approx(2 * iou / (1 + iou))


def test_a_class_that_is_only_predicted_counts_as_zero():
    evaluator = Evaluator(CLASSES)
    prediction = np.zeros((10, 10), np.uint8)
    prediction[0] = 2
    evaluator.update(prediction, np.zeros((10, 10), np.uint8))
    assert evaluator.result().iou[2] == 0
    assert evaluator.result().miou == pytest.approx((0.9 + 0) / 2)


def test_the_boundary_band_is_the_mask_minus_its_erosion():
    rng = np.random.default_rng(2)
    mask = rng.random((40, 60)) < 0.9
    for distance in (1, 2, 4):
        eroded = binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)
        assert np.array_equal(boundary_band(mask, distance), mask & ~eroded)


def test_boundary_iou_sees_what_iou_does_not():
    truth = np.zeros((200, 200), np.uint8)
    truth[40:160, 40:160] = 1
    shifted = np.roll(truth, 4, axis=1)
    evaluator = Evaluator(("a", "b"))
    evaluator.update(shifted, truth)
    result = evaluator.result()
    assert result.iou[1] > 0.93
    assert result.boundary_iou[1] < 0.65
    same = Evaluator(("a", "b"))
    same.update(truth, truth)
    assert same.result().mean_boundary_iou == 1


def test_unusable_masks_are_refused():
    evaluator = Evaluator(CLASSES)
    with pytest.raises(DataError, match="expected equal"):
        evaluator.update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    with pytest.raises(DataError, match="class id 7"):
        evaluator.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 7, np.uint8))
    with pytest.raises(DataError, match="no image"):
        evaluator.result()


def test_the_table_ends_with_the_miou():
    evaluator = Evaluator(CLASSES)
    evaluator.update(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8))
    lines = evaluator.result({"split": "val"}).table().splitlines()
    assert lines[-1] == "mIoU 1.0000"
    assert any("split=val" in line for line in lines)
    assert evaluator.result().to_plain()["iou"] == {"a": 1.0, "b": None, "c": None, "d": None}
