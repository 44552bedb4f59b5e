"""`wsss-check`: true counts, every fault in one list, the right exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import check
from training.data.dataset import read_dataset
from training.data.inspection import inspect
from training.data.reading import IMAGE_SUFFIXES


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            check.main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return call


def problems(root) -> list[str]:
    found = inspect(read_dataset(root), root).problems
    return [f"{problem.severity} {problem}" for problem in found]


def test_a_sound_set_has_no_problems(folder_set, run):
    status, out, _ = run(folder_set)
    assert status == 0
    assert "shapes: 4 images, 3 classes" in out
    assert out.rstrip().endswith("no problems")
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "3", "3", "3", "3", "3"] in rows
    assert "100.00%" in out, "scribbles agree with the masks"


def test_counts_as_json(folder_set, run):
    status, out, _ = run(folder_set, "--json")
    assert status == 0
    train = json.loads(out)["splits"]["train"]
    mask = read_dataset(folder_set).load_labels("a", "masks")
    assert train["class_pixels"]["masks"] == [3 * int((mask == index).sum()) for index in (0, 1, 2, 255)]
    assert train["class_images"]["points"] == [3, 3, 3, 3]
    assert train["class_images"]["tags"] == [0, 3, 3, 0]


def test_every_fault_is_in_the_list(folder_set, labels_writer, run):
    images, masks = folder_set / "images", folder_set / "masks"
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:200])
    labels_writer(masks / "b.png", np.full((48, 64), 9))
    labels_writer(folder_set / "scribbles" / "b.png", np.full((47, 64), 1))
    labels_writer(masks / "orphan.png", np.zeros((4, 4)))
    (masks / "notes.txt").write_text("x")
    Image.new("RGB", (64, 48)).save(folder_set / "points" / "c.png")
    tags = {"a": [1, 2], "b": [1, 2], "c": [1, 2, 8], "d": [2], "ghost": [1]}
    (folder_set / "tags.json").write_text(json.dumps(tags))
    (folder_set / "splits" / "train.txt").write_text("a\nb\nb\nc\nmissing\n")
    (folder_set / "splits" / "val.txt").write_text("d\nc\n")
    shutil.copy(images / "b.png", images / "e.png")
    Image.new("RGB", (8, 8)).save(images / "f.jpg")
    Image.new("RGB", (8, 8)).save(images / "f.png")
    expected = [
        "error images/a.png: is damaged or cut short",
        "error masks/b.png: holds class id 9, expected 0..2 or 255",
        "error scribbles/b.png: is 64x47, its image 64x48",
        "error masks/orphan.png: label without an image of that name",
        "error masks/: 1 file not read, since not .png (first: notes.txt)",
        "error points/c.png: has colours (mode RGB)",
        "error tags.json: unknown tag 8 in 1 image (first: 'c'); expected ids below 3",
        "error tags.json: 1 entry for no known image (first: 'ghost')",
        "remark masks/d: has masks of disc, but its tags say absent",
        "error splits/train.txt: names images that do not exist: missing",
        "remark splits/train.txt: 1 name listed more than once",
        "error splits: splits train and val share 1 image (c)",
        "remark images: the files of b, e are identical",
        "remark images: 2 images without any label (e, f)",
        "remark splits: 2 images in no split (e, f)",
        "the same name occurs 2 times (f.jpg, f.png)",
    ]
    found = problems(folder_set)
    for text in expected:
        assert any(text in line for line in found), f"{text} not in {found}"
    status, out, _ = run(folder_set)
    assert status == 1
    assert str(folder_set) not in out, "files are named relative to the set"


def test_weak_labels_that_differ_from_the_mask_are_remarked(folder_set, labels_writer, run):
    points = np.full((48, 64), 255)
    points[45, 5], points[16, 16] = 2, 1
    labels_writer(folder_set / "points" / "a.png", points)
    status, out, _ = run(folder_set)
    assert status == 0
    assert "points: 1 of 8 pixels in train differ from the mask (12.50%)" in out


def test_copies_across_splits_are_errors(folder_set):
    shutil.copy(folder_set / "images" / "a.png", folder_set / "images" / "d.png")
    found = problems(folder_set)
    assert any(line.startswith("error images: the files of a, d are identical and lie in different") for line in found)


def test_trainval_may_share_images(folder_set):
    (folder_set / "splits" / "trainval.txt").write_text("a\nb\nc\nd\n")
    assert not [line for line in problems(folder_set) if line.startswith("error")]


def test_classes_that_nothing_labels_are_remarked(folder_set):
    with (folder_set / "classes.txt").open("a") as file:
        file.write("star\n")
    assert "remark splits: train has no label of star" in problems(folder_set)


def test_the_background_may_be_left_out_of_tags_but_not_of_pixel_labels(folder_set, labels_writer):
    for kind in ("masks", "points"):
        shutil.rmtree(folder_set / kind)
    scribbles = np.full((48, 64), 255)
    scribbles[16, 8:24], scribbles[36, 34:56] = 1, 2
    for name in ("a", "b", "c", "d"):
        labels_writer(folder_set / "scribbles" / f"{name}.png", scribbles)
    assert "remark splits: train has no label of background" in problems(folder_set)
    shutil.rmtree(folder_set / "scribbles")
    assert problems(folder_set) == []
    (folder_set / "tags.json").write_text(json.dumps({name: ["disc"] for name in ("a", "b", "c", "d")}))
    assert "remark splits: train has no label of bar" in problems(folder_set)


def test_a_misspelt_tag_is_one_line_with_a_guess(folder_set):
    tags = {"a": ["Disc", "BAR"], "b": ["Disc", "Disc"], "c": ["disc", "yeti"], "d": ["dsic"]}
    (folder_set / "tags.json").write_text(json.dumps(tags))
    expected = "expected ids below 3 or names of classes.txt"
    assert [line for line in problems(folder_set) if "unknown tag" in line] == [
        f"error tags.json: unknown tag 'Disc' in 2 images (first: 'a'); did you mean 'disc'? {expected}",
        f"error tags.json: unknown tag 'BAR' in 1 image (first: 'a'); did you mean 'bar'? {expected}",
        f"error tags.json: unknown tag 'yeti' in 1 image (first: 'c'); {expected}",
        f"error tags.json: unknown tag 'dsic' in 1 image (first: 'd'); did you mean 'disc'? {expected}",
    ]


def test_files_that_are_not_read_as_images_are_remarked(folder_set, run):
    images = folder_set / "images"
    (images / "june" / ".cache").mkdir(parents=True)
    for name in (
        "e.heic",
        "f.HEIC",
        "g.avif",
        "h",
        "june/i.jpg",
        "june/.cache/j.jpg",
        ".k.heic",
        "e.aae",
        "ghost.json",
    ):
        (images / name).write_bytes(b"x")
    tags = {"a": [1, 2], "e": [1], "f.HEIC": [1], "june/i.jpg": [2], "ghost": [1]}
    (folder_set / "tags.json").write_text(json.dumps(tags))
    assert [line for line in problems(folder_set) if "not read" in line or "ghost" in line] == [
        "error tags.json: 2 names of files that are not read (first: 'e' is images/e.heic); "
        "convert them to JPEG or PNG",
        "error tags.json: 1 name of a file that is not read (first: 'june/i.jpg' is images/june/i.jpg); "
        "move them into images/ itself",
        "error tags.json: 1 entry for no known image (first: 'ghost'); add the image or remove the entry",
        "remark images: 6 files are not read (.heic 2, .aae 1, .avif 1, .json 1, no ending 1): "
        "convert them to JPEG or PNG if they are images",
        "remark images: 1 file is not read, since in subfolders (first: june/i.jpg): move them into images/ itself",
    ]
    (folder_set / "tags.json").write_text('{"a": [1, 2], "b": [1, 2], "c": [1, 2], "d": [1, 2]}')
    assert run(folder_set)[0] == 0, "files that nothing names are no error"


def test_the_endings_in_the_document_are_those_that_are_read():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    listed = re.search(r"directly in `images/` that end in (.*?), in upper", text, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\.\w+)`", listed[1])) == IMAGE_SUFFIXES


@pytest.mark.parametrize("name", ["tags.csv", "Tags.txt", "labels.json", "label.CSV"])
def test_a_file_that_looks_like_tags_is_remarked_where_tags_json_is_missing(folder_set, name):
    (folder_set / name).write_text("a,1\n")
    (folder_set / "labels.txt").write_text("disc\n")
    assert problems(folder_set) == [], "tags.json is there"
    (folder_set / "tags.json").unlink()
    (found,) = problems(folder_set)
    assert found.startswith(f"remark {name}: is not read; if it holds the tags, write them as tags.json")


def test_tags_without_a_background_are_remarked(folder_set):
    text = "tags alone cannot train a set whose class 0 is not called background"
    assert not any(text in line for line in problems(folder_set))
    classes = (folder_set / "classes.txt").read_text().splitlines()
    (folder_set / "classes.txt").write_text("\n".join(["road", *classes[1:]]) + "\n")
    assert any(line.startswith(f"remark tags: {text}") for line in problems(folder_set))
    (folder_set / "tags.json").unlink()
    assert not any(text in line for line in problems(folder_set))


def test_not_a_data_set(tmp_path, run):
    status, _, error = run(tmp_path)
    assert status == 1
    assert "no images; expected images/*.jpg" in error
    assert run(tmp_path / "nowhere")[0] == 1
    assert run()[0] == 2


def test_other_layouts(tmp_path, run):
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / "x.jpg")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "x.xml").write_text("<annotation><object><name>yeti</name></object></annotation>")
    status, out, _ = run(tmp_path)
    assert status == 1
    assert "error   Annotations/x.xml: unknown class 'yeti'" in out


def test_counts_of_a_real_set(shared):
    root = shared / "data" / "acdc_scribbles"
    report = inspect(read_dataset(root), root)
    assert report.errors == 0
    train, val = report.splits["train"], report.splits["val"]
    assert train.class_pixels["scribbles"][:4] == [138079, 24374, 39387, 27127]
    assert train.class_images["masks"][:4] == [400, 319, 386, 380]
    assert val.class_images["masks"][:4] == [60, 49, 58, 58]
    both, agree = train.compared["scribbles"]
    assert round(agree / both, 4) == 0.9999
