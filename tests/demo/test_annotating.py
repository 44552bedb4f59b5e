"""What the annotation page asks for, without a browser."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from demo.annotating import Annotating
from demo.folder import AnnotatedFolder, Conflict, encode_runs, typed_classes
from demo.registry import Models
from training.data.dataset import open_dataset
from wsss_deploy.errors import DataError, ImageError

WIDTH, HEIGHT = 30, 20


def add_image(root, name: str) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(root / "images" / name)


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for folder in ("images", "masks", "scribbles"):
        (root / folder).mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png"):
        add_image(root, name)
    (root / "classes.txt").write_text("background\nbox\n")
    return root


def functions(folder: AnnotatedFolder, models: Models | None = None):
    return {each.__name__: each for each in Annotating(folder, models or Models()).functions()}


def stroke() -> np.ndarray:
    labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    labels[5, 5:9] = 1
    return labels


def test_few_work_at_once_and_few_wait(data, monkeypatch):
    folder = AnnotatedFolder(data)
    opened, most, working, lock, go_on = AnnotatedFolder.image, 0, 0, threading.Lock(), threading.Event()

    def slow(self, name):
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        assert go_on.wait(60)
        with lock:
            working -= 1
        return opened(self, name)

    monkeypatch.setattr(AnnotatedFolder, "image", slow)
    calls = functions(folder)
    with ThreadPoolExecutor(60) as people:
        answers = [people.submit(calls["open_image"], {"name": "a"}) for _ in range(60)]
        try:  # those who are turned away have their answer at once
            turned_away = [each.result() for each in islice(as_completed(answers, timeout=60), 50)]
        finally:
            go_on.set()
        given = [each.result() for each in answers]
    assert all(answer["busy"] and answer["error"] for answer in turned_away)
    assert sum("image" in answer for answer in given) == 10
    assert most == 2
    assert "image" in calls["open_image"]({"name": "a"})  # places are free again


def test_strokes_do_not_wait_for_models(data, color_segmenter, monkeypatch):
    names = color_segmenter.card.classes
    (data / "classes.txt").write_text("\n".join(names) + "\n")
    folder, models, go_on = AnnotatedFolder(data), Models(color_segmenter), threading.Event()
    monkeypatch.setattr(Models, "open", lambda *_: go_on.wait(60) and color_segmenter)
    calls = functions(folder, models)
    with ThreadPoolExecutor(10) as people:
        waiting = [people.submit(calls["predict"], {"name": "a"}) for _ in range(10)]
        try:
            assert next(as_completed(waiting, timeout=60)).result()["busy"]
            opened = calls["open_image"]({"name": "a"})
        finally:
            go_on.set()
        assert sum("image" in answer.result() for answer in waiting) == 9
    assert opened["labels"]["scribbles"] == f"255,{WIDTH * HEIGHT}"


def test_a_missed_answer_is_no_conflict(data):
    folder = AnnotatedFolder(data)
    empty = folder.revision(np.full((HEIGHT, WIDTH), 255, np.uint8))
    first = folder.save_labels("a", "scribbles", stroke(), empty)
    assert folder.save_labels("a", "scribbles", stroke(), empty) == first
    with pytest.raises(Conflict):
        folder.save_labels("a", "scribbles", np.where(stroke() == 1, 0, stroke()).astype(np.uint8), empty)


def test_messages_name_the_file_only(data):
    for name, content in (("broken.png", b"no image"), ("empty.jpg", b"")):
        (data / "images" / name).write_bytes(content)
    half = (data / "images" / "a.png").read_bytes()
    (data / "images" / "half.png").write_bytes(half[:-30])
    calls = functions(AnnotatedFolder(data))
    for name, file in (("broken", "broken.png"), ("empty", "empty.jpg"), ("half", "half.png")):
        answers = [calls["open_image"]({"name": name})]
        if name != "half":
            answers.append(calls["save_labels"]({"name": name, "kind": "scribbles", "runs": [], "revision": ""}))
        for answer in answers:
            assert answer["error"].startswith(file)
            assert str(data) not in answer["error"]
            assert "Unexpected" not in answer["error"]


@pytest.mark.parametrize("with_model", [False, True])
def test_suggestions_pass_over_what_cannot_be_read(data, color_segmenter, with_model):
    for name in ("a", "b"):
        (data / "images" / f"{name}.png").write_bytes(b"no image")
    (data / "classes.txt").write_text("\n".join(color_segmenter.card.classes) + "\n")
    folder = AnnotatedFolder(data)
    suggest = functions(folder, Models(color_segmenter) if with_model else None)["suggest"]
    assert suggest({"name": None})["name"] == "c"
    assert suggest({"name": "a"})["name"] == "c"
    answer = suggest({"name": "c"})
    assert answer["name"] is None
    assert "2 without cannot be read" in answer["reason"]
    add_image(data, "b.png")  # repaired
    assert suggest({"name": "c"})["name"] == "b"


@pytest.fixture
def doubtful(data, color_segmenter):
    """Images with strokes and a grey part that a model of colours cannot tell: large in b, small in a, none in c."""
    (data / "classes.txt").write_text("\n".join(color_segmenter.card.classes) + "\n")
    for name, grey in (("a", 8), ("b", 16), ("c", 0)):
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        image[..., 1] = 255
        image[:, WIDTH - grey :] = 90
        Image.fromarray(image).save(data / "images" / f"{name}.png")
        labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
        labels[5, 1:3] = 1
        Image.fromarray(labels).save(data / "scribbles" / f"{name}.png")
    return functions(AnnotatedFolder(data), Models(color_segmenter))


def answer_in(calls, name: str, grey: int) -> None:
    opened = calls["open_image"]({"name": name})
    labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    labels[:, WIDTH - grey :] = 2
    revision = opened["revisions"]["scribbles"]
    request = {"name": name, "kind": "scribbles", "runs": encode_runs(labels), "revision": revision}
    assert "error" not in calls["save_labels"](request)


def test_where_all_have_labels_further_strokes_are_asked_for(doubtful):
    assert doubtful["suggest"]({"name": None})["name"] == "b"
    answer = doubtful["suggest"]({"name": "b"})
    assert answer["name"] == "a"
    assert "least sure of a part of it" in answer["reason"]
    place = doubtful["predict"]({"name": "b"})["place"]
    assert place["image"].startswith("data:image/png")
    assert (WIDTH - 16) / WIDTH < place["center"][1] < 1
    assert doubtful["predict"]({"name": "c"})["place"] is None


def test_less_sure_counts_as_well_as_larger(data, doubtful):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 1] = 255
    image[:, WIDTH - 18 :] = (90, 140, 90)  # a larger part than b's, and surer
    Image.fromarray(image).save(data / "images" / "c.png")
    assert doubtful["predict"]({"name": "c"})["place"] is not None
    assert doubtful["suggest"]({"name": None})["name"] == "b"


def test_what_was_suggested_and_left_is_not_suggested_again(doubtful):
    assert [doubtful["suggest"]({"name": "c"})["name"] for _ in range(3)] == ["b", "a", None]
    answer_in(doubtful, "b", 16)  # a new state, which leaves nothing to ask
    assert doubtful["suggest"]({"name": "c"})["reason"] == "Every image has labels."


def test_what_was_answered_is_not_asked_again(doubtful):
    assert doubtful["predict"]({"name": "b"})["place"] is not None
    answer_in(doubtful, "b", 16)
    assert doubtful["suggest"]({"name": "c"})["name"] == "a"
    answer_in(doubtful, "a", 8)
    answer = doubtful["suggest"]({"name": "b"})
    assert answer["name"] is None
    assert answer["reason"] == "Every image has labels."
    assert doubtful["predict"]({"name": "b"})["place"] is None


def test_labels_that_cannot_be_read_do_not_stop_suggestions(data, doubtful):
    kept = (data / "scribbles" / "b.png").read_bytes()
    (data / "scribbles" / "b.png").write_bytes(b"no image")
    assert doubtful["suggest"]({"name": "c"})["name"] == "a"
    (data / "scribbles" / "b.png").write_bytes(kept)  # repaired
    assert doubtful["suggest"]({"name": "c"})["name"] == "b"


def test_tags_and_masks_are_no_reason_to_ask_for_strokes(data, doubtful):
    (data / "scribbles" / "a.png").unlink()
    (data / "scribbles" / "b.png").rename(data / "masks" / "b.png")
    (data / "tags.json").write_text(json.dumps({"a": [1]}))
    assert doubtful["suggest"]({"name": "c"})["reason"] == "Every image has labels, 1 of them by masks only."


def test_that_the_time_was_short_is_told(doubtful, monkeypatch):
    monkeypatch.setattr("demo.annotating._SUGGESTION_SECONDS", -1.0)
    assert doubtful["suggest"]({"name": "c"})["reason"] == "Nothing was found in time; ask again."


def test_saving_does_not_wait_for_a_model(doubtful, color_segmenter, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    predict = type(color_segmenter).predict

    def slow(self, image):
        begun.set()
        assert go_on.wait(60)
        return predict(self, image)

    monkeypatch.setattr(type(color_segmenter), "predict", slow)
    with ThreadPoolExecutor(2) as people:
        predicting = people.submit(doubtful["predict"], {"name": "a"})
        try:
            assert begun.wait(60)
            people.submit(answer_in, doubtful, "b", 16).result(timeout=30)
        finally:
            go_on.set()
        assert "error" not in predicting.result()


def test_images_with_masks_only_are_told_apart(data):
    for name in ("a", "b", "c"):
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(data / "masks" / f"{name}.png")
    Image.fromarray(stroke()).save(data / "scribbles" / "c.png")
    calls = functions(AnnotatedFolder(data))
    answer = calls["start"]({})
    assert (answer["done"], answer["total"], answer["by_masks"]) == (3, 3, 2)
    assert calls["suggest"]({"name": "a"})["reason"] == "Every image has labels, 2 of them by masks only."


@pytest.mark.parametrize("first", ["cat", "backgrounds"])
def test_classes_without_a_background_are_asked_about_before_they_are_written(data, first):
    (data / "classes.txt").unlink()
    name_classes = functions(AnnotatedFolder(data))["name_classes"]
    answer = name_classes({"text": f"{first}\nbox\n"})
    assert answer.keys() == {"warning"}
    assert f"The first class is '{first}', expected 'background'" in answer["warning"]
    assert "image tags cannot be learnt from; points and scribbles can" in answer["warning"]
    assert not (data / "classes.txt").exists()
    answer = name_classes({"text": f"{first}\nbox\n", "confirmed": True})
    assert [each["name"] for each in answer["classes"]] == [first, "box"]
    assert (data / "classes.txt").read_text() == f"{first}\nbox\n"


@pytest.mark.parametrize("first", ["background", "Background", "_background_"])
def test_a_background_is_not_asked_about(data, first):
    (data / "classes.txt").unlink()
    answer = functions(AnnotatedFolder(data))["name_classes"]({"text": f"{first}\nbox"})
    assert answer["taggable"] == [1]
    assert (data / "classes.txt").read_text() == f"{first}\nbox\n"


def test_images_that_come_later(data):
    folder = AnnotatedFolder(data)
    calls = functions(folder)
    add_image(data, "d.png")
    add_image(data, "a.bmp")  # shares its labels with a.png and is left out
    assert calls["start"]({})["names"] == ["a", "b", "c", "d"]
    assert calls["open_image"]({"name": "d"})["width"] == WIDTH
    (data / "images" / "d.png").unlink()
    assert calls["start"]({})["names"] == ["a", "b", "c"]
    for path in (data / "images").iterdir():
        path.unlink()
    assert calls["start"]({})["names"] == ["a", "b", "c"]
    with pytest.raises(ImageError, match=r"^b\.png"):
        folder.image("b")


@pytest.mark.parametrize("entry", ["a", "a.png", "a.JPG", "images/a.png", "images/a"])
def test_tags_by_file_name_are_the_images(data, entry):
    folder = AnnotatedFolder(data)
    (data / "tags.json").write_text(json.dumps({entry: [1], "gone.png": [1], "other/a.png": ["dog"]}))
    assert folder.tags("a") == [1]
    assert folder.labelled() == {"a"}
    folder.save_tags("a", [1])
    written = json.loads((data / "tags.json").read_text())
    assert written == {"a": [1], "gone.png": [1], "other/a.png": ["dog"]}, "not twice, which no reader takes"
    assert open_dataset(data).tags("a") == (1,)


def test_two_entries_for_one_image_are_not_chosen_between(data):
    folder = AnnotatedFolder(data)
    content = {"a": [1], "a.png": []}
    (data / "tags.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="more than one entry for the image 'a'; keep one"):
        folder.tags("a")
    folder.save_tags("b", [1])
    assert json.loads((data / "tags.json").read_text()) == {**content, "b": [1]}, "both stay for the user to see"


def test_class_names_with_control_characters_are_refused():
    with pytest.raises(DataError, match=r"line 2, 'road\\x1b\[2J', holds control characters"):
        typed_classes("background\nroad\x1b[2J")
