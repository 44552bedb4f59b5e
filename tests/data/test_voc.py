"""A generated miniature of the VOC devkit with ScribbleSup's XML."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.data.voc import VOC_CLASSES
from wsss_deploy.errors import DataError

BOX = "<object><name>{}</name><difficult>0</difficult></object>"
LINE = "<polygon><tag>{}</tag>{}</polygon>"
POINT = "<point><X>{}</X><Y>{}</Y></point>"


def scribble(*lines: tuple[str, list[tuple[int, int]]], size: tuple[int, int] = (40, 30)) -> str:
    body = "".join(LINE.format(tag, "".join(POINT.format(x, y) for x, y in points)) for tag, points in lines)
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{body}</annotation>"


@pytest.fixture
def devkit(tmp_path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug", "scribbles"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name in ("2007_000001", "2007_000002", "2007_000003"):
        Image.new("RGB", (40, 30), (10, 200, 30)).save(root / "JPEGImages" / f"{name}.jpg")
        xml = f"<annotation>{BOX.format('person')}{BOX.format('tvmonitor')}{BOX.format('person')}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    first, second = np.full((30, 40), 15, np.uint8), np.full((30, 40), 20, np.uint8)
    Image.fromarray(first).save(root / "SegmentationClass" / "2007_000001.png")
    Image.fromarray(second).save(root / "SegmentationClassAug" / "2007_000001.png")
    Image.fromarray(second).save(root / "SegmentationClassAug" / "2007_000002.png")
    lines = scribble(("background", [(2, 5), (30, 5)]), ("plane", [(10, 15), (20, 25)]), ("monitor", [(35, 20)]))
    (root / "scribbles" / "2007_000001.xml").write_text(lines)
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("2007_000001\n")
    pairs = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in ("2007_000001", "2007_000002")]
    (lists / "train_aug.txt").write_text("".join(pairs))
    (lists / "val.txt").write_text("2007_000003\n")
    return root


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_it_opens_from_any_level(devkit, levels):
    root = devkit if levels == 0 else devkit.parents[levels - 1]
    source = open_dataset(root)
    assert source.name == "VOC2012"
    assert source.classes == VOC_CLASSES
    assert len(source.palette) == 21
    assert source.palette[15] == (192, 128, 128)
    assert source.splits["train_aug"] == ("2007_000001", "2007_000002")
    assert source.splits["val"] == ("2007_000003",)


def test_masks_prefer_the_original_over_the_augmented(devkit):
    source = open_dataset(devkit)
    assert np.unique(source.load_labels("2007_000001", "masks")).tolist() == [15]
    assert np.unique(source.load_labels("2007_000002", "masks")).tolist() == [20]
    assert source.kinds("2007_000003") == {"tags"}


def test_tags_come_from_the_boxes(devkit):
    assert open_dataset(devkit).tags("2007_000001") == (15, 20)


def test_points_are_read_as_of_whats_the_point(devkit):
    items = [{"x": 3, "y": 2, "cls": 15}, {"x": 30.6, "y": 20.2, "cls": "tv", "rank": 1}]
    points = {"2007_000001": items, "2007_000002.jpg": [], "2009_009999": items}
    (devkit / "points.json").write_text(json.dumps(points))
    (devkit / "points").mkdir()
    drawn = np.full((30, 40), 255, np.uint8)
    drawn[5, 6] = 7
    Image.fromarray(drawn).save(devkit / "points" / "2007_000003.png")
    (devkit / "points" / "notes.txt").write_text("")
    source = open_dataset(devkit)
    assert [name for name in source.image_names if "points" in source.kinds(name)] == list(source.image_names)
    labels = source.load_labels("2007_000001", "points")
    assert (labels[2, 3], labels[20, 30], (labels != 255).sum()) == (15, 20, 2)
    assert (source.load_labels("2007_000002", "points") == 255).all()
    assert np.array_equal(source.load_labels("2007_000003", "points"), drawn)
    found = [f"{problem.where}: {problem.text}" for problem in source.problems]
    assert any(text.startswith("points.json: 1 entry for no known image (first: '2009_009999')") for text in found)
    assert any(text.startswith("points/: 1 file not read") for text in found)


def test_a_class_of_the_sets_own_is_not_taken_for_a_short_name(devkit):
    (devkit / "classes.txt").write_text("background\ntv\nplane\nmonitor\ntvmonitor\nperson\n")
    (devkit / "points.json").write_text(json.dumps({"2007_000001": [{"x": 3, "y": 2, "cls": "tv"}]}))
    source = open_dataset(devkit)
    assert source.load_labels("2007_000001", "points")[2, 3] == 1
    assert np.unique(source.load_labels("2007_000001", "scribbles")).tolist() == [0, 2, 3, 255]


def test_scribbles_are_drawn_with_their_short_names(devkit):
    source = open_dataset(devkit)
    assert "scribbles" in source.kinds("2007_000001")
    labels = source.load_labels("2007_000001", "scribbles")
    assert set(np.unique(labels)) == {0, 1, 20, 255}
    assert (labels[4:7, 10] == 0).all()
    assert labels[3, 10] == 255
    assert labels[8, 10] == 255
    assert labels[20, 15] == 1
    assert labels[20, 35] == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (scribble(("dragon", [(1, 1)])), "unknown class 'dragon'"),
        (scribble(("cat", [(1, 1)]), size=(50, 30)), "is 50x30, its image 40x30"),
        (scribble(("cat", [("x", 1)])), "found 'x', expected a coordinate"),
        (scribble(("cat", [("1e30", 1)])), "found '1e30', expected a coordinate"),
        ("<annotation><polygon>", "not readable XML"),
        ("", "not readable XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares a DOCTYPE"),
    ],
)
def test_bad_xml_is_named(devkit, text, message):
    (devkit / "scribbles" / "2007_000001.xml").write_text(text)
    with pytest.raises(DataError, match=rf"2007_000001\.xml: .*{message}"):
        open_dataset(devkit).load_labels("2007_000001", "scribbles")


def test_a_doctype_in_another_encoding_is_refused(devkit):
    text = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    (devkit / "Annotations" / "2007_000001.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="declares a DOCTYPE"):
        open_dataset(devkit).tags("2007_000001")


def test_lists_that_name_missing_images_do_not_open(devkit):
    (devkit / "ImageSets" / "Segmentation" / "val.txt").write_text("2008_000001\n")
    with pytest.raises(DataError, match="names images that do not exist: 2008_000001"):
        open_dataset(devkit)


def test_other_classes_by_a_list(devkit):
    (devkit / "classes.txt").write_text("background\nperson\ntvmonitor\n")
    assert open_dataset(devkit).tags("2007_000001") == (1, 2)
