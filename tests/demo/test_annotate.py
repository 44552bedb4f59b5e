"""Annotating in a real browser: what is drawn with the mouse or the keyboard is what lies on disk, pixel by pixel."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")
pytestmark = pytest.mark.browser

WIDTH, HEIGHT = 120, 80


@pytest.fixture
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos") / "photos"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(4):
        image = rng.integers(90, 120, (HEIGHT, WIDTH, 3), np.uint8)
        image[20:60, 30 + 10 * index : 70 + 10 * index] = (200, 60, 60)
        Image.fromarray(image).save(root / "images" / f"photo{index}.png")
    return root


@pytest.fixture
def annotate_address(folder, color_segmenter, serve):
    with serve(color_segmenter, data=folder) as url:
        yield url


class Annotator:
    """A visitor in the tab Annotate."""

    def __init__(self, visitor) -> None:
        self.visitor, self.page = visitor, visitor.page
        visitor.open_tab("Annotate")
        self.page.locator("#annotate .annotator").wait_for()

    def name_classes(self, *names: str) -> None:
        self.page.locator("#class-names").fill("\n".join(names))
        self.page.get_by_role("button", name="Use these classes").click()

    def wait_for(self, name: str) -> None:
        self.page.locator(f"#annotate .stage[data-image='{name}']").wait_for()

    def saved(self) -> None:
        self.page.locator("#annotate .saved").get_by_text("Saved").wait_for()

    def choose(self, name: str) -> None:
        self.page.locator("#annotate .classes").get_by_label(name).check()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where on the screen the middle of a pixel of the image is."""
        box = self.page.locator("#annotate .stage").bounding_box()
        return box["x"] + (x + 0.5) * box["width"] / WIDTH, box["y"] + (y + 0.5) * box["height"] / HEIGHT

    def stroke(self, *places: tuple[int, int]) -> None:
        mouse = self.page.mouse
        self.page.locator("#annotate .stage").scroll_into_view_if_needed()
        mouse.move(*self.at(*places[0]))
        mouse.down()
        for place in places[1:]:
            mouse.move(*self.at(*place))
        mouse.up()
        self.saved()


def labels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def disc_line(y: int, left: int, right: int, radius: int) -> np.ndarray:
    """A horizontal stroke: the pixels at most `radius` away from one of its middle line."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    beyond = np.maximum(np.maximum(left - columns, columns - right), 0)
    return beyond**2 + (rows - y) ** 2 <= radius**2


def test_a_person_annotates(annotate_address, folder, visit):
    annotator = Annotator(visit(annotate_address))
    page = annotator.page
    annotator.name_classes("background", "box")
    annotator.wait_for("photo0")
    assert (folder / "classes.txt").read_text() == "background\nbox\n"
    assert page.locator("#annotate .count").inner_text() == "0 of 4 annotated"

    annotator.stroke((40, 40), (60, 40))
    expected = np.full((HEIGHT, WIDTH), 255, np.uint8)
    expected[disc_line(40, 40, 60, 3)] = 1
    file = folder / "scribbles" / "photo0.png"
    np.testing.assert_array_equal(labels(file), expected)
    with Image.open(file) as image:
        assert image.getpalette()[3:6] == [128, 0, 0]
    page.get_by_text("1 of 4 annotated").wait_for()

    annotator.choose("background")
    annotator.stroke((10, 10), (100, 10))
    expected[disc_line(10, 10, 100, 3)] = 0
    np.testing.assert_array_equal(labels(file), expected)

    page.locator("#annotate").get_by_label("Eraser").check()
    annotator.stroke((50, 40), (50, 40))
    erased = expected.copy()
    erased[disc_line(40, 50, 50, 3)] = 255
    np.testing.assert_array_equal(labels(file), erased)
    page.keyboard.press("z")  # undo
    page.wait_for_function("document.querySelector('#annotate [data-do=undo]').disabled === false")
    annotator.saved()
    wait_until(page, lambda: (labels(file) == expected).all())

    page.locator("#annotate").get_by_label("Point").check()
    annotator.choose("box")
    page.mouse.click(*annotator.at(80, 70))
    wait_until(page, (folder / "points" / "photo0.png").is_file)
    points = labels(folder / "points" / "photo0.png")
    assert points[70, 80] == 1
    assert (points != 255).sum() == 1

    page.locator("#annotate .tags").get_by_label("box").check()
    wait_until(page, (folder / "tags.json").is_file)
    assert json.loads((folder / "tags.json").read_text()) == {"photo0": [1]}

    # A reload goes on where it was left, with everything that was drawn.
    page.reload()
    annotator = Annotator(annotator.visitor)
    annotator.wait_for("photo0")
    assert page.locator("#annotate .tags").get_by_label("box").is_checked()
    annotator.choose("box")
    annotator.stroke((40, 50), (60, 50))
    expected[disc_line(50, 40, 60, 3)] = 1
    np.testing.assert_array_equal(labels(file), expected)
    page.get_by_role("button", name="Suggest next").click()
    annotator.wait_for("photo1")
    assert "without labels" in page.locator("#annotate .saved").inner_text()


def wait_until(page, condition) -> None:
    for _ in range(300):
        if condition():
            return
        page.wait_for_timeout(50)
    assert condition()


def test_keyboard_only(annotate_address, folder, visit):
    annotator = Annotator(visit(annotate_address))
    page = annotator.page
    annotator.name_classes("background", "box")
    page.locator("#annotate .stage[data-image]").wait_for()
    page.locator("#annotate .images").select_option("photo2")
    annotator.wait_for("photo2")
    page.locator("#annotate .stage").focus()
    page.keyboard.press("0")
    page.keyboard.press("[")
    for key in ("ArrowLeft", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    annotator.saved()
    file = folder / "scribbles" / "photo2.png"
    expected = np.full((HEIGHT, WIDTH), 255, np.uint8)
    expected[disc_line(HEIGHT // 2 - 2, WIDTH // 2 - 2, WIDTH // 2 - 2, 2)] = 0
    np.testing.assert_array_equal(labels(file), expected)
    page.keyboard.press(".")
    annotator.wait_for("photo3")


def test_the_least_sure_place_is_marked(tmp_path, color_segmenter, serve, visit):
    root = tmp_path / "doubtful"
    (root / "images").mkdir(parents=True)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 1] = 255
    image[20:44, 80:104] = 90  # all three colours, hence classes, are as likely
    Image.fromarray(image).save(root / "images" / "photo.png")
    (root / "classes.txt").write_text("\n".join(color_segmenter.card.classes) + "\n")
    with serve(color_segmenter, data=root) as url:
        annotator = Annotator(visit(url))
        page, place = annotator.page, annotator.page.locator("#annotate .place")
        annotator.wait_for("photo")
        least = page.locator("#annotate .least")
        least.get_by_text("inside the outline").wait_for()
        assert place.is_visible()
        drawn = page.evaluate(
            """() => {
                const image = document.querySelector("#annotate .place"), canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
                const context = canvas.getContext("2d");
                context.drawImage(image, 0, 0);
                const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
                return Array.from(data).filter((_, at) => at % 4 === 3);
            }"""
        )
        rows, columns = np.nonzero(np.reshape(drawn, (800 * HEIGHT // WIDTH, 800)))
        around = np.array([rows.min(), rows.max(), columns.min(), columns.max()]) * WIDTH / 800
        np.testing.assert_allclose(around, (20, 43, 80, 103), atol=8)

        page.locator("#annotate .stage").focus()
        page.keyboard.press("v")  # it is told and marked without the prediction, too
        page.keyboard.press("u")
        place.wait_for(state="hidden")
        assert least.inner_text() == ""
        page.keyboard.press("u")
        place.wait_for()
        assert not page.locator("#annotate .prediction").is_visible()

        # With the keyboard: the cursor goes there and draws.
        page.keyboard.press("1")
        page.keyboard.press("g")
        page.keyboard.press("Enter")
        annotator.saved()
        drawn = np.argwhere(labels(root / "scribbles" / "photo.png") != 255)
        assert (drawn.min(axis=0) >= (20 - 4, 80 - 4)).all()
        assert (drawn.max(axis=0) < (44 + 4, 104 + 4)).all()

        for y in (24, 32, 40):
            annotator.stroke((82, y), (102, y))
        least.get_by_text("sure enough").wait_for()
        assert not place.is_visible()
        assert page.locator("#annotate [data-do=go]").is_disabled()


def test_two_people_at_one_image(annotate_address, folder, visit):
    (folder / "classes.txt").write_text("background\nbox\n")
    pair = [Annotator(visit(annotate_address)) for _ in range(2)]
    for annotator in pair:
        annotator.page.locator("#annotate .stage[data-image]").wait_for()
        annotator.page.locator("#annotate .images").select_option("photo3")
        annotator.wait_for("photo3")
    first, second = pair
    first.choose("box")
    first.stroke((40, 40), (60, 40))
    page = second.page
    page.mouse.move(*second.at(20, 20))
    page.mouse.down()
    page.mouse.up()
    page.locator("#annotate .message").get_by_text("changed elsewhere").wait_for()
    kept = labels(folder / "scribbles" / "photo3.png")
    assert (kept[disc_line(40, 40, 60, 3)] == 1).all()
    assert kept[20, 20] == 255
    second.choose("background")
    second.stroke((20, 20), (20, 20))  # on top of the newer state
    assert labels(folder / "scribbles" / "photo3.png")[20, 20] == 0


def test_a_missing_background_is_told_before_the_classes_are_used(tmp_path, color_segmenter, serve, visit):
    root = tmp_path / "animals"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 90)).save(root / "images" / "photo.png")
    with serve(color_segmenter, data=root) as url:
        annotator = Annotator(visit(url))
        page = annotator.page
        message = page.locator("#annotate .message")
        annotator.name_classes("cat", "dog")
        message.get_by_text("image tags cannot be learnt from").wait_for()
        assert not (root / "classes.txt").exists()
        # Another text is another question.
        page.locator("#class-names").fill("dog\ncat")
        message.wait_for(state="hidden")
        page.get_by_role("button", name="Use these classes").click()
        message.get_by_text("The first class is 'dog'").wait_for()
        page.get_by_role("button", name="Use them without a background").click()
        annotator.wait_for("photo")
        assert not message.is_visible()
        assert (root / "classes.txt").read_text() == "dog\ncat\n"


@pytest.fixture
def troubled(tmp_path_factory):
    """Images of which the first and the third cannot be read, and a large one."""
    root = tmp_path_factory.mktemp("troubled") / "troubled"
    (root / "images").mkdir(parents=True)
    for name in ("b", "d", "e", "f"):
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 90)).save(root / "images" / f"{name}.png")
    for name in ("a", "c"):
        (root / "images" / f"{name}.png").write_bytes(b"no image")
    Image.new("RGB", (2048, 1024)).save(root / "images" / "large.png")
    (root / "classes.txt").write_text("background\nbox\n")
    return root


@pytest.fixture
def troubled_address(troubled, color_segmenter, serve):
    with serve(color_segmenter, data=troubled) as url:
        yield url


def warns_before_leaving(page) -> bool:
    return page.evaluate("""() => {
        const stop = (event) => event.stopImmediatePropagation(); // gradio would close its connection
        window.addEventListener("beforeunload", stop, true);
        const stays = !window.dispatchEvent(new Event("beforeunload", { cancelable: true }));
        window.removeEventListener("beforeunload", stop, true);
        return stays;
    }""")


def test_images_that_cannot_be_read(troubled_address, troubled, visit):
    annotator = Annotator(visit(troubled_address))
    page, chosen = annotator.page, annotator.page.locator("#annotate .images")
    unreadable, message = page.locator("#annotate .unreadable"), page.locator("#annotate .message")

    def opens_as_unreadable(name: str) -> None:
        unreadable.get_by_text(f"{name} cannot be annotated").wait_for()
        message.get_by_text(f"{name}.png: is not an image").wait_for()
        assert chosen.input_value() == name
        assert str(troubled) not in message.inner_text()
        assert page.locator("#annotate .stage[data-image]").count() == 0
        page.mouse.click(*annotator.at(40, 40))
        page.keyboard.press("z")
        assert page.locator("#annotate .saved").inner_text() == ""

    opens_as_unreadable("a")
    page.get_by_role("button", name="Next ›").click()
    annotator.wait_for("b")
    assert not message.is_visible()
    page.get_by_role("button", name="Next ›").click()
    opens_as_unreadable("c")
    page.get_by_role("button", name="Suggest next").click()
    annotator.wait_for("d")
    page.locator("#annotate .saved").get_by_text("without labels").wait_for()
    page.get_by_role("button", name="‹ Previous").click()
    opens_as_unreadable("c")
    page.get_by_role("button", name="‹ Previous").click()
    annotator.wait_for("b")
    assert not (troubled / "scribbles").exists()

    # The width that is set holds for small images; on large ones it grows, so that it looks the same.
    assert page.locator("#annotate .width").inner_text() == "7"
    chosen.select_option("large")
    annotator.wait_for("large")
    assert page.locator("#annotate .width").inner_text() == "25"


def test_a_stroke_ends_where_the_image_is_left(troubled_address, troubled, visit):
    annotator = Annotator(visit(troubled_address))
    page, mouse = annotator.page, annotator.page.mouse
    page.locator("#annotate .unreadable").or_(page.locator("#annotate .stage[data-image]")).first.wait_for()
    page.locator("#annotate .images").select_option("d")
    annotator.wait_for("d")
    page.locator("#annotate .stage").scroll_into_view_if_needed()
    annotator.choose("box")
    mouse.move(*annotator.at(20, 20))
    mouse.down()
    mouse.move(*annotator.at(40, 20))
    page.keyboard.press("0")  # another class: what follows is no part of it
    mouse.move(*annotator.at(40, 60))
    mouse.up()
    annotator.saved()
    expected = np.full((HEIGHT, WIDTH), 255, np.uint8)
    expected[disc_line(20, 20, 40, 3)] = 1
    file = troubled / "scribbles" / "d.png"
    np.testing.assert_array_equal(labels(file), expected)

    mouse.move(*annotator.at(60, 40))
    mouse.down()
    mouse.move(*annotator.at(80, 40))
    page.keyboard.press(".")
    annotator.wait_for("e")
    mouse.move(*annotator.at(80, 70))
    mouse.up()
    first = expected.copy()
    expected[disc_line(40, 60, 80, 3)] = 0
    np.testing.assert_array_equal(labels(file), expected)  # opening another one has waited for it
    annotator.stroke((10, 10), (10, 10))
    only = np.full((HEIGHT, WIDTH), 255, np.uint8)
    only[disc_line(10, 10, 10, 3)] = 0
    np.testing.assert_array_equal(labels(troubled / "scribbles" / "e.png"), only)

    # Undo in the middle of a stroke takes that stroke back, and each further one the stroke before it.
    page.keyboard.press(",")
    annotator.wait_for("d")
    annotator.stroke((5, 60), (100, 75))
    mouse.move(*annotator.at(20, 20))
    mouse.down()
    mouse.move(*annotator.at(90, 50))
    page.keyboard.press("z")
    mouse.up()
    page.keyboard.press("z")
    wait_until(page, lambda: (labels(file) == expected).all())
    assert (labels(file) != first).any()


def test_what_cannot_be_saved_is_kept(troubled_address, troubled, visit):
    annotator = Annotator(visit(troubled_address))
    page, file = annotator.page, troubled / "scribbles" / "f.png"
    page.locator("#annotate .unreadable").or_(page.locator("#annotate .stage[data-image]")).first.wait_for()
    page.locator("#annotate .images").select_option("f")
    annotator.wait_for("f")
    assert not warns_before_leaving(page)
    mouse, calls = page.mouse, "**/component_server/**"

    def draw(y: int) -> None:
        mouse.move(*annotator.at(40, y))
        mouse.down()
        mouse.move(*annotator.at(60, y))
        mouse.up()

    def fail(route) -> None:
        if '"save_labels"' not in (route.request.post_data or ""):
            route.continue_()
            return
        # The first request arrives, only its answer is lost; the page must not take its own stroke for another's.
        if not file.exists():
            route.fetch()
        route.abort("aborted")

    expected = np.full((HEIGHT, WIDTH), 255, np.uint8)
    page.route(calls, fail)
    draw(20)
    page.locator("#annotate .unsaved").get_by_text("Not saved yet: f").wait_for()
    expected[disc_line(20, 40, 60, 3)] = 1
    draw(50)
    assert warns_before_leaving(page)
    # It can be left and is there again.
    page.keyboard.press(",")
    annotator.wait_for("e")
    assert page.locator("#annotate .unsaved").is_visible()
    assert warns_before_leaving(page)
    page.keyboard.press(".")
    annotator.wait_for("f")
    draw(70)
    page.keyboard.press(",")
    annotator.wait_for("e")
    np.testing.assert_array_equal(labels(file), expected)
    page.unroute(calls, fail)
    for y in (50, 70):
        expected[disc_line(y, 40, 60, 3)] = 1
    wait_until(page, lambda: (labels(file) == expected).all())  # by itself
    wait_until(page, lambda: not warns_before_leaving(page))  # the answer comes after the file
    assert page.locator("#annotate .unsaved").is_hidden()
    assert not page.locator("#annotate .message").is_visible()


def test_a_busy_server_is_asked_again(troubled_address, visit):
    annotator = Annotator(visit(troubled_address))
    page, turned_away = annotator.page, []
    page.locator("#annotate .unreadable").or_(page.locator("#annotate .stage[data-image]")).first.wait_for()

    def busy(route) -> None:
        function = json.loads(route.request.post_data)["fn_name"]
        if function in turned_away:
            route.continue_()
            return
        turned_away.append(function)
        route.fulfill(json={"error": "The server is busy.", "busy": True, "conflict": False})

    page.route("**/component_server/**", busy)
    page.locator("#annotate .images").select_option("b")
    annotator.wait_for("b")
    annotator.stroke((40, 40), (60, 40))
    page.get_by_role("button", name="Suggest next").click()
    annotator.wait_for("d")
    assert {"open_image", "save_labels", "suggest"} <= set(turned_away)
