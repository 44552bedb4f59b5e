"""Generated COCO sets: instances with polygons and run lengths, panoptic PNGs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from wsss_deploy.errors import DataError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (20, 10), (90, 90, 90)).save(folder / name)


def annotation(image: int, category: int, segmentation) -> dict:
    return {"id": 1, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0}


def write_json(path: Path, images: list, annotations: list, categories=CATEGORIES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.fixture
def instances(tmp_path) -> Path:
    root = tmp_path / "mini"
    write_images(root / "train2017", "1.jpg", "2.jpg")
    write_images(root / "val2017", "3.jpg")
    large, small = [2, 2, 18, 2, 18, 8, 2, 8], [4, 4, 8, 4, 8, 6, 4, 6]
    counts = {"size": [10, 20], "counts": [10, 10, 180]}
    write_json(
        root / "annotations" / "instances_train2017.json",
        [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
        # The small object comes first in the file: it must lie over the large one all the same.
        [annotation(7, 18, [small]), annotation(7, 1, [large]), annotation(8, 18, counts)],
    )
    write_json(root / "annotations" / "instances_val2017.json", [{"id": 9, "file_name": "3.jpg"}], [])
    return root


def test_instances(instances):
    source = open_dataset(instances)
    assert source.classes == ("background", "person", "dog")
    assert dict(source.splits) == {"train": ("1", "2"), "val": ("3",)}
    assert source.kinds("1") == {"masks", "tags"}
    labels = source.load_labels("1", "masks")
    assert labels[0, 0] == 0
    assert (labels == 2).sum() == 8
    assert (labels == 1).sum() == 16 * 6 - 8
    assert labels[4, 4] == 2
    assert source.tags("1") == (1, 2)


def test_run_lengths_and_images_without_objects(instances):
    source = open_dataset(instances)
    labels = source.load_labels("2", "masks")
    assert (labels[:, 1] == 2).all()
    assert (labels == 2).sum() == 10
    assert source.tags("3") == ()
    assert (source.load_labels("3", "masks") == 0).all()


def test_boxes_alone_give_tags(instances):
    path = instances / "annotations" / "instances_val2017.json"
    write_json(path, [{"id": 9, "file_name": "3.jpg"}], [{"image_id": 9, "category_id": 1, "bbox": [1, 1, 3, 3]}])
    source = open_dataset(instances)
    assert source.kinds("3") == {"tags"}
    assert source.tags("3") == (1,)


def test_panoptic(tmp_path):
    write_images(tmp_path / "images" / "val2017", "1.jpg")
    png = np.zeros((10, 20, 3), np.uint8)
    png[:, :8] = (5, 1, 2)  # 5 + 256 + 2 * 65536
    png[:, 8:12] = (9, 0, 0)
    folder = tmp_path / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True)
    Image.fromarray(png).save(folder / "1.png")
    segments = [{"id": 5 + 256 + 2 * 65536, "category_id": 18}, {"id": 9, "category_id": 1}]
    write_json(
        tmp_path / "annotations" / "panoptic_val2017.json",
        [{"id": 1, "file_name": "1.jpg"}],
        [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
    )
    source = open_dataset(tmp_path)
    assert source.classes == ("person", "dog")
    labels = source.load_labels("1", "masks")
    assert [labels[0, x] for x in (0, 9, 15)] == [1, 0, 255]
    assert source.tags("1") == (0, 1)
    png[:, 12:] = (77, 0, 0)
    Image.fromarray(png).save(folder / "1.png")
    with pytest.raises(DataError, match=r"segment 77 is not in panoptic_val2017\.json"):
        source.load_labels("1", "masks")


def test_one_folder_a_split_with_the_json_inside(tmp_path):
    for split, name in (("train", "a.jpg"), ("valid", "b.jpg")):
        write_images(tmp_path / split, name)
        write_json(tmp_path / split / "_annotations.coco.json", [{"id": 0, "file_name": name}], [])
    assert dict(open_dataset(tmp_path).splits) == {"train": ("a",), "val": ("b",)}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (annotation(9, 5, [[0, 0, 4, 0, 4, 4]]), "unknown category 5"),
        (annotation(9, 1, [[0, 0, 4]]), "unusable segmentation"),
        (annotation(9, 1, {"size": [10, 20], "counts": [5]}), "run lengths add up to 5"),
        (annotation(9, 1, {"size": [10, 21], "counts": [210]}), "is 21x10, its image 20x10"),
    ],
)
def test_bad_annotations_are_named(instances, entry, message):
    path = instances / "annotations" / "instances_val2017.json"
    write_json(path, [{"id": 9, "file_name": "3.jpg"}], [entry])
    with pytest.raises(DataError, match=rf"instances_val2017\.json: .*{message}"):
        open_dataset(instances).load_labels("3", "masks")


def test_bad_files_do_not_open(instances):
    path = instances / "annotations" / "instances_val2017.json"
    write_json(path, [{"id": 9, "file_name": "gone.jpg"}], [])
    with pytest.raises(DataError, match=r"1 image not found \(first: gone\.jpg\)"):
        open_dataset(instances)
    write_json(path, [{"id": 9, "file_name": "3.jpg"}], [], [{"id": 1, "name": "person"}])
    with pytest.raises(DataError, match="categories differ"):
        open_dataset(instances)
    path.write_text('{"images": []}')
    with pytest.raises(DataError, match="'annotations' is missing or no list"):
        open_dataset(instances)
    write_json(path, [{"id": 9}], [])
    with pytest.raises(DataError, match="an entry of 'images' has no 'file_name'"):
        open_dataset(instances)


def edit(root: Path, change) -> None:
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_images_of_another_size_than_was_annotated(instances):
    edit(instances, lambda content: content["images"][0].update(width=200, height=100))
    source = open_dataset(instances)
    with pytest.raises(DataError, match=r"1.jpg is 200 x 100 there, the file 20 x 10; restore"):
        source.load_labels("1", "masks")


def test_annotations_without_an_image_are_reported(instances):
    edit(instances, lambda content: content["annotations"].append(annotation(5, 1, [[2, 2, 8, 2, 8, 8]])))
    (problem,) = [each for each in open_dataset(instances).problems if "not in the list" in each.text]
    assert "annotations of 1 image" in problem.text
    assert "id 5" in problem.text
    assert problem.severity == "remark"  # so are parts of larger sets


@pytest.mark.parametrize("name", ["../outside.jpg", "/outside.jpg", "a/../../outside.jpg"])
def test_images_outside_of_the_data_set_are_refused(instances, name):
    edit(instances, lambda content: content["images"][0].update(file_name=name))
    with pytest.raises(DataError, match="lies outside of the data set"):
        open_dataset(instances)
