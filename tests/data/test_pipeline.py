"""Training samples: contents, mixed supervision, determinism and resumption."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from training.data.dataset import open_dataset
from training.data.pipeline import Augmentation, PositionSampler, TrainingSet, make_loader
from wsss_deploy.errors import DataError, UsageError

NAMES = ("a", "b", "c", "d")
PLAIN = Augmentation(size=64, scale=(1.0, 1.0), flip=0.0, photometric=None, point_radius=0)


def training_set(root, kinds="auto", augmentation=PLAIN, seed=0):
    return TrainingSet(open_dataset(root), NAMES, kinds, augmentation, seed)


def same(first, second) -> bool:
    return all(torch.equal(first[key].nan_to_num(-1), second[key].nan_to_num(-1)) for key in first)


def test_a_sample(folder_set):
    sample = training_set(folder_set, ("masks",))[0, 0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "image": (torch.uint8, (3, 64, 64)),
        "labels": (torch.int64, (64, 64)),
        "valid": (torch.bool, (64, 64)),
        "tags": (torch.float32, (3,)),
        "labelled": (torch.bool, (3,)),
    }
    valid = sample["valid"].numpy()
    assert valid.sum() == 48 * 64, "the image of 64 x 48 fits into the crop"
    source = open_dataset(folder_set)
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0)[valid], source.load_image("a").reshape(-1, 3))
    assert np.array_equal(sample["labels"].numpy()[valid], source.load_labels("a", "masks").ravel())
    assert (sample["labels"].numpy()[~valid] == 255).all()


def test_tags_are_known_or_nan(folder_set):
    (folder_set / "tags.json").write_text('{"a": [2]}')
    dataset = training_set(folder_set)
    tags = dataset[0, 0]["tags"]
    assert torch.isnan(tags[0]), "tags say nothing of the background"
    assert tags[1:].tolist() == [0, 1]
    assert torch.isnan(dataset[1, 0]["tags"]).all()


def test_labelled_classes_are_those_of_the_whole_image(folder_set, labels_writer):
    layer = np.full((48, 64), 255)
    layer[40, 60], layer[2, 2] = 2, 0
    labels_writer(folder_set / "points" / "a.png", layer)
    for largest in (1.0, 8.0):  # shrunken before the cache, and cut to a corner
        dataset = training_set(folder_set, ("points",), PLAIN.model_copy(update={"scale": (largest, largest)}))
        seen = {tuple(np.unique(dataset[0, position]["labels"])) for position in range(8)}
        assert largest == 1.0 or (0, 2, 255) not in seen
        assert all(dataset[0, position]["labelled"].tolist() == [True, False, True] for position in range(8))
        assert dataset[1, 0]["labelled"].all()


def test_the_background_may_be_anywhere(folder_set, labels_writer):
    """Who labels objects alone says nothing of the background; a data set without one says so of its class 0."""
    layer = np.full((48, 64), 255)
    labels_writer(folder_set / "points" / "a.png", layer)
    assert not any(training_set(folder_set, ("points",))[0, 0]["labelled"])
    layer[40, 60] = 2
    labels_writer(folder_set / "points" / "a.png", layer)
    assert training_set(folder_set, ("points",))[0, 0]["labelled"].tolist() == [True, False, True]
    names = (folder_set / "classes.txt").read_text().split()
    (folder_set / "classes.txt").write_text("\n".join(["sky", *names[1:]]))
    assert training_set(folder_set, ("points",))[0, 0]["labelled"].tolist() == [False, False, True]


def test_auto_takes_the_densest_and_explicit_kinds_are_merged(folder_set):
    (folder_set / "masks" / "a.png").unlink()
    source = open_dataset(folder_set)
    auto = training_set(folder_set)
    labels = auto[0, 0]["labels"].numpy()[auto[0, 0]["valid"].numpy()].reshape(48, 64)
    scribbles, points = (source.load_labels("a", kind) for kind in ("scribbles", "points"))
    assert np.array_equal(labels, np.where(scribbles == 255, points, scribbles))
    assert (auto[1, 0]["labels"] != 255).sum() > 2000, "b has a mask"
    only = training_set(folder_set, ("points",))[1, 0]["labels"]
    assert sorted(only[only != 255].tolist()) == [0, 1, 2]
    assert (training_set(folder_set, ("tags",))[1, 0]["labels"] == 255).all()


def test_images_without_the_kind_are_left_out(folder_set, caplog):
    (folder_set / "scribbles" / "b.png").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = training_set(folder_set, ("scribbles",))
    assert dataset.names == ("a", "c", "d")
    assert "1 of 4 images have no scribbles and are left out" in caplog.text
    for path in (folder_set / "scribbles").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="none of 4 images has scribbles"):
        training_set(folder_set, ("scribbles",))
    with pytest.raises(UsageError, match="unknown kinds of labels: boxes"):
        training_set(folder_set, ("boxes",))


def test_points_become_discs(folder_set):
    augmentation = PLAIN.model_copy(update={"point_radius": 3})
    labels = training_set(folder_set, ("points",), augmentation)[0, 0]["labels"]
    assert 25 <= (labels == 1).sum() <= 45


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_points_survive_any_scale(folder_set, scale):
    augmentation = PLAIN.model_copy(update={"scale": (scale, scale)})
    dataset = training_set(folder_set, ("points",), augmentation)
    for position in range(8):
        labels = dataset[0, position]["labels"]
        found = (labels != 255).sum()
        assert found == 3 if scale < 1 else 1 <= found <= 3


def test_crops_without_labels_are_drawn_again(folder_set):
    augmentation = Augmentation(size=32, scale=(2.0, 2.0), photometric=None, point_radius=0)
    dataset = training_set(folder_set, ("points",), augmentation)
    empty = sum(bool((dataset[0, position]["labels"] == 255).all()) for position in range(60))
    # One crop of the 64 x 48 image at its own size misses all three points about every other time.
    assert empty < 12


def test_a_sample_depends_on_seed_and_position_only(folder_set):
    first, second = (
        training_set(folder_set, augmentation=Augmentation(size=32)),
        training_set(folder_set, augmentation=Augmentation(size=32)),
    )
    for position in range(6):
        first[position % 4, 100 + position]  # another history, another state of the cache
        assert same(first[1, position], second[1, position])
    assert not same(first[1, 0], first[1, 1])
    assert not same(first[1, 0], training_set(folder_set, augmentation=Augmentation(size=32), seed=1)[1, 0])


def test_the_sampler_goes_on_at_any_position():
    def pairs(start):
        return list(itertools.islice(PositionSampler(5, seed=3, start=start), 20 - start))

    whole = pairs(0)
    assert [position for _, position in whole] == list(range(20))
    for epoch in range(4):
        assert sorted(index for index, _ in whole[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert whole[:5] != [(index, position + 5) for index, position in whole[5:10]]
    for start in (1, 5, 7, 19):
        assert pairs(start) == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_the_same_batches(folder_set, workers):
    dataset = training_set(folder_set, augmentation=Augmentation(size=32))

    def batches(start, count):
        return list(itertools.islice(make_loader(dataset, 3, PositionSampler(4, 0, start), workers), count))

    whole = batches(0, 4)
    assert whole[0]["image"].shape == (3, 3, 32, 32)
    for resumed, expected in zip(batches(6, 2), whole[2:], strict=True):
        assert same(resumed, expected)


def test_large_images_are_shrunk_once_and_keep_their_points(folder_set, labels_writer):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (600, 900, 3)).astype(np.uint8)).save(folder_set / "images" / "a.png")
    points = np.full((600, 900), 255)
    points[10, 20], points[599, 899] = 1, 2
    labels_writer(folder_set / "points" / "a.png", points)
    dataset = training_set(folder_set, ("points",))
    labels = dataset[0, 0]["labels"].numpy()
    valid = dataset[0, 0]["valid"].numpy()
    assert sorted(labels[labels != 255]) == [1, 2]
    assert valid.sum() == 43 * 64
    assert labels[valid].reshape(43, 64)[42, 63] == 2


@pytest.mark.parametrize(
    "options", [{"size": 8}, {"scale": (2.0, 1.0)}, {"scale": (0.0, 1.0)}, {"flip": 1.5}, {"rotate": 10}]
)
def test_augmentation_is_strict(options):
    with pytest.raises(ValidationError):
        Augmentation(**options)


def test_real_samples_are_quick(shared):
    import time

    dataset = TrainingSet(
        *(lambda source: (source, source.splits["train"][:40]))(open_dataset(shared / "data" / "voc_animals")),
        ("points",),
        Augmentation(),
        0,
    )
    for index in range(40):
        dataset[index, index]
    begin = time.process_time()
    for index in range(40):
        dataset[index, 40 + index]
    # 5 ms on an idle core; the bound leaves room for a busy machine.
    assert (time.process_time() - begin) / 40 < 0.02
