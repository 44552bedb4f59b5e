"""From strokes that are drawn in the browser to a model that segments there."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")
pytest.importorskip("onnxscript", reason="needs the extra 'export'")
pytestmark = pytest.mark.browser

SIDE = 96
ITERATIONS = 20


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Red boxes on grey: what a few strokes suffice to learn."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(5):
        image = rng.integers(90, 130, (SIDE, SIDE, 3), np.uint8)
        image[32:64, 32:80] = rng.integers(0, 30, (32, 48, 3)) + np.array([200, 30, 30])
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"scene{index}.png")
    (root / "classes.txt").write_text("background\nbox\n")
    return root


@pytest.mark.timeout(900)
def test_from_strokes_to_a_model_that_segments(scenes, serve, visit, color_segmenter):
    with serve(color_segmenter, data=scenes) as url:
        visitor = visit(url)
        page = visitor.page
        page.context.set_default_timeout(400_000)  # it trains on a machine that may be busy
        visitor.open_tab("Train")
        page.locator("#train-start").click()
        page.get_by_text("no image has labels yet").wait_for()
        draw_strokes(visitor, scenes)

        visitor.open_tab("Train")
        page.get_by_text("4 of 5 images are annotated").wait_for()
        page.locator("#train-iterations input").fill(str(ITERATIONS))
        page.locator("#train-start").click()
        page.get_by_text("run-001 is training").wait_for()
        page.locator("#train-iterations input").fill("100000")
        page.locator("#train-start").click()
        page.get_by_text("run-002 waits for the run before it").wait_for()  # queued, not mixed
        page.locator("#train-stop").click()
        page.get_by_text("run-002 is stopped").wait_for()

        page.reload()  # the training does not notice
        visitor.open_tab("Train")
        choose_run(page, "run-001")
        page.locator("#train-status").get_by_text(re.compile(r"run-001 is (training|being exported|done)")).wait_for()
        page.locator("#train-status").get_by_text("run-001 is done").wait_for()
        page.locator("#train-chart svg").first.wait_for()
        assert f"{ITERATIONS} of {ITERATIONS} iterations" in page.locator("#train-status").inner_text()
        assert (scenes / "runs" / "run-001" / "parity.json").is_file()

        # A second one is stopped in the middle and resumed.
        choose_run(page, "run-002")
        page.locator("#train-resume").click()
        page.get_by_text("run-002 is training").wait_for()
        page.get_by_text(re.compile(r"Prediction after \d+ iterations: scene4")).wait_for()
        page.locator("#train-preview img").wait_for()
        page.locator("#train-stop").click()
        page.get_by_text("run-002 is stopped").wait_for()
        assert (scenes / "runs" / "run-002" / "checkpoint.pt").is_file()

        visitor.open_tab("Segment")
        page.locator("#model input").click()
        page.get_by_role("option", name="run-001/model.onnx").click()
        page.locator("#header").get_by_text("scenes-auto").wait_for()
        visitor.upload(scenes / "images" / "scene4.png")
        visitor.wait_for_result()
        with page.expect_download() as downloading:
            page.locator("#download").click()
        mask = np.asarray(Image.open(downloading.value.path()))
        expected = np.zeros((SIDE, SIDE), bool)
        expected[32:64, 32:80] = True
        overlap = ((mask == 1) & expected).sum() / ((mask == 1) | expected).sum()
        assert overlap > 0.5, overlap
    assert shutil.rmtree(scenes / "runs") is None  # nothing holds it any more


def draw_strokes(visitor, scenes) -> None:
    page = visitor.page
    visitor.open_tab("Annotate")
    for index in range(4):
        page.locator(f"#annotate .stage[data-image=scene{index}]").wait_for()
        for name, y in (("box", 48), ("background", 12), ("background", 84)):
            page.locator("#annotate .classes").get_by_label(name).check()
            box = page.locator("#annotate .stage").bounding_box()
            at = [(box["x"] + x * box["width"] / SIDE, box["y"] + y * box["height"] / SIDE) for x in (36, 56, 76)]
            page.mouse.move(*at[0])
            page.mouse.down()
            for place in at[1:]:
                page.mouse.move(*place)
            page.mouse.up()
        page.locator("#annotate .saved").get_by_text("Saved").wait_for()
        page.get_by_role("button", name="Next ›").click()
    page.get_by_text("4 of 5 annotated").wait_for()


def choose_run(page, name: str) -> None:
    page.locator("#train-run input").click()
    page.get_by_role("option", name=name).click()
