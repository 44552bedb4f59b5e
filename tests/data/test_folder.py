"""The folder layout: what it gives, and a clear error for every fault."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import detect_layout, open_dataset
from wsss_deploy.errors import DataError, UsageError


def test_gives_what_is_there(folder_set):
    source = open_dataset(folder_set)
    assert source.name == "shapes"
    assert source.classes == ("background", "disc", "bar")
    assert source.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert dict(source.splits) == {"train": ("a", "b", "c"), "val": ("d",)}
    assert source.kinds("a") == {"masks", "scribbles", "points", "tags"}
    assert source.tags("a") == (1, 2)
    assert source.load_image("a").shape == (48, 64, 3)
    mask = source.load_labels("a", "masks")
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 2, 255}
    assert np.count_nonzero(source.load_labels("a", "points") != 255) == 3


def test_supervision_may_differ_from_image_to_image(folder_set):
    (folder_set / "masks" / "a.png").unlink()
    (folder_set / "scribbles" / "b.png").unlink()
    (folder_set / "tags.json").write_text('{"c": ["bar"]}')
    source = open_dataset(folder_set)
    assert source.kinds("a") == {"scribbles", "points"}
    assert source.kinds("b") == {"masks", "points"}
    assert source.tags("a") is None
    assert source.tags("c") == (2,)
    with pytest.raises(DataError, match="'a' has no masks; it has points, scribbles"):
        source.load_labels("a", "masks")


def test_without_splits_all_images_train(folder_set):
    for path in (folder_set / "splits").iterdir():
        path.unlink()
    assert dict(open_dataset(folder_set).splits) == {"train": ("a", "b", "c", "d")}


def test_split_lines_may_be_file_names(folder_set):
    (folder_set / "splits" / "train.txt").write_text("\ufeffa.png\r\nb\r\n\r\n")
    assert open_dataset(folder_set).splits["train"] == ("a", "b")


def test_json_entries_may_be_file_names(folder_set):
    (folder_set / "images" / "a.png").rename(folder_set / "images" / "v1.jpg.png")
    (folder_set / "points" / "b.png").unlink()
    (folder_set / "splits" / "train.txt").write_text("v1.jpg\nb.png\n")
    (folder_set / "tags.json").write_text('{"v1.jpg": [1], "b.png": [2], "c.PNG": ["disc"]}')
    (folder_set / "points.json").write_text('{"b.png": [{"x": 3, "y": 7, "cls": 2}]}')
    source = open_dataset(folder_set)
    assert [source.tags(name) for name in ("v1.jpg", "b", "c", "d")] == [(1,), (2,), (1,), None]
    assert source.load_labels("b", "points")[7, 3] == 2
    assert source.splits["train"] == ("v1.jpg", "b")


def test_entries_never_take_the_labels_of_a_file_in_a_subfolder(folder_set):
    (folder_set / "images" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder_set / "images" / "more" / "a.png")
    (folder_set / "tags.json").write_text('{"more/a.png": [1], "b": [2]}')
    source = open_dataset(folder_set)
    assert source.tags("a") is None
    assert source.tags("b") == (2,)


def test_jfif_is_read_as_the_jpeg_that_it_is(folder_set):
    image = Image.open(folder_set / "images" / "a.png")
    image.save(folder_set / "images" / "a.jfif", format="JPEG")
    (folder_set / "images" / "a.png").unlink()
    assert open_dataset(folder_set).load_image("a").shape == (48, 64, 3)


def test_a_split_of_files_that_are_not_read_says_so(folder_set):
    (folder_set / "images" / "a.png").rename(folder_set / "images" / "a.heic")
    with pytest.raises(DataError, match=r"train\.txt: 1 name of a file .*'a' is images/a\.heic\); convert") as caught:
        open_dataset(folder_set)
    assert "do not exist" not in str(caught.value)


def test_points_json_is_read_where_there_is_no_png(folder_set):
    (folder_set / "points" / "a.png").unlink()
    points = {"a": [{"x": 3, "y": 7, "cls": 2}, {"x": 60, "y": 1, "cls": "disc"}], "b": [{"x": 0, "y": 0, "cls": 1}]}
    (folder_set / "points.json").write_text(json.dumps(points))
    source = open_dataset(folder_set)
    labels = source.load_labels("a", "points")
    assert labels[7, 3] == 2
    assert labels[1, 60] == 1
    assert np.count_nonzero(labels != 255) == 2
    assert source.load_labels("b", "points")[0, 0] == 255, "the PNG goes first"


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"x": 64, "y": 0, "cls": 1}, "outside the image of 64x48"),
        ({"x": 1, "y": 0, "cls": 3}, "unknown class in cls; expected an id below"),
    ],
)
def test_bad_points_are_named(folder_set, point, message):
    (folder_set / "points" / "a.png").unlink()
    (folder_set / "points.json").write_text(json.dumps({"a": [point]}))
    with pytest.raises(DataError, match=f"'a': point .*{message}"):
        open_dataset(folder_set).load_labels("a", "points")


def test_values_are_ids_whatever_the_palette_and_depth(folder_set):
    source = open_dataset(folder_set)
    mask = source.load_labels("a", "masks")
    Image.fromarray(mask).save(folder_set / "masks" / "a.png")
    assert np.array_equal(source.load_labels("a", "masks"), mask), "grey"
    Image.fromarray(mask.astype(np.uint16)).save(folder_set / "masks" / "a.png")
    assert np.array_equal(source.load_labels("a", "masks"), mask), "16-bit grey"


def test_a_colour_mask_is_refused(folder_set):
    Image.new("RGB", (64, 48)).save(folder_set / "masks" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has colours \(mode RGB\).*palette or grey PNG"):
        open_dataset(folder_set).load_labels("a", "masks")


def test_size_and_ids_are_told_together(folder_set, labels_writer):
    labels_writer(folder_set / "masks" / "a.png", np.full((10, 20), 7))
    with pytest.raises(DataError, match=r"a\.png: is 20x10, its image 64x48 .*; holds class id 7, expected 0\.\.2"):
        open_dataset(folder_set).load_labels("a", "masks")


def test_exif_turns_the_image_but_not_the_labels(folder_set):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder_set / "images" / "a.png").save(folder_set / "images" / "a.png", exif=exif)
    source = open_dataset(folder_set)
    assert source.load_image("a").shape == (64, 48, 3)
    with pytest.raises(DataError, match="turned by 90 degrees"):
        source.load_labels("a", "masks")


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_file_cut_short_is_named(folder_set, folder):
    path = folder_set / folder / "a.png"
    path.write_bytes(path.read_bytes()[:100])
    source = open_dataset(folder_set)
    with pytest.raises(DataError, match=f"{folder}.*a.png: .*(cut short|damaged)"):
        source.load_image("a") if folder == "images" else source.load_labels("a", "masks")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("splits/train.txt", "a\nmissing\n", "names images that do not exist: missing"),
        ("splits/train.txt", "", "is empty"),
        ("tags.json", '{"a": [3]}', r"unknown tag 3 in 1 image \(first: 'a'\); expected ids below 3"),
        ("tags.json", '{"a": ["cat"]}', r"unknown tag 'cat' in 1 image \(first: 'a'\); expected ids below 3"),
        ("tags.json", '{"a": [1], "a.png": [2]}', "1 image has more than one entry .*'a' and 'a.png' for image 'a'"),
        ("points.json", '{"a.png": [], "a": []}', "1 image has more than one entry .*'a.png' and 'a' for image 'a'"),
        ("tags.json", "[1]", "holds a list, expected an object"),
        ("tags.json", "{", "not readable JSON"),
        ("points.json", '{"a": 1}', "'a': expected a list"),
        ("classes.txt", "x\n\ny\n", "line 2 is empty"),
        ("classes.txt", "x\nx\n", "occur twice"),
        ("classes.txt", "x\n", "1 classes, expected 2 to 255"),
    ],
)
def test_unusable_lists_do_not_open(folder_set, file, text, message):
    (folder_set / file).write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(folder_set)


def test_no_images_no_classes_no_folder(folder_set, tmp_path):
    (folder_set / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt: missing; write one class name a line"):
        open_dataset(folder_set)
    (tmp_path / "phone" / "images" / "june").mkdir(parents=True)
    for name in ("x.HEIC", "y.heic", "z.avif", "bare", "june/w.jpg", ".hidden"):
        (tmp_path / "phone" / "images" / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "phone")
    assert "images: 4 files are not read (.heic 2, .avif 1, no ending 1): convert them to JPEG" in str(caught.value)
    assert "1 file is not read, since in subfolders (first: june/w.jpg): move" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images; expected images"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown data set format 'tfrecord'"):
        open_dataset(folder_set, "tfrecord")


def test_a_palette_that_tells_nothing_is_replaced(folder_set):
    for path in folder_set.glob("masks/*.png"):
        image = Image.open(path)
        image.putpalette([value // 3 for value in range(768)])
        image.save(path)
    assert open_dataset(folder_set).palette[1] == (128, 0, 0)


def test_layouts_are_told_apart(folder_set, tmp_path):
    assert detect_layout(folder_set) == "folder"
    for number, (name, layout) in enumerate(
        [("VOC2012/JPEGImages", "voc"), ("annotations/instances_val.json", "coco"), ("images", "folder")]
    ):
        (tmp_path / str(number) / name).mkdir(parents=True)
        assert detect_layout(tmp_path / str(number)) == layout


@pytest.mark.parametrize(
    ("name", "train", "val", "classes", "kinds"),
    [
        ("voc_animals", 1250, 172, 7, {"masks", "points", "tags"}),
        ("camvid", 367, 101, 11, {"masks"}),
        ("acdc_scribbles", 400, 60, 4, {"masks", "scribbles"}),
    ],
)
def test_real_sets(shared, name, train, val, classes, kinds):
    source = open_dataset(shared / "data" / name)
    assert (len(source.splits["train"]), len(source.splits["val"]), len(source.classes)) == (train, val, classes)
    first = source.splits["train"][0]
    assert source.kinds(first) == kinds
    image = source.load_image(first)
    for kind in kinds - {"tags"}:
        assert source.load_labels(first, kind).shape == image.shape[:2]


def test_points_json_of_the_real_set_gives_its_pngs(shared, tmp_path):
    real = shared / "data" / "voc_animals"
    source = open_dataset(real)
    for entry in real.iterdir():
        if entry.name not in ("points", "LICENSE-OR-TERMS.md"):
            (tmp_path / entry.name).symlink_to(entry)
    other = open_dataset(tmp_path)
    for name in source.splits["val"][:20]:
        assert np.array_equal(source.load_labels(name, "points"), other.load_labels(name, "points"))
