"""The tabs Segment, Why and Compare as a person uses them, and the page inside another application."""

from __future__ import annotations

import json
import re
import shutil
import threading

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def two_models(tmp_path_factory, tiny_model, tiny_onnx, serve):
    folder = tmp_path_factory.mktemp("pair") / "pair"
    folder.mkdir()
    files = [folder / "model.onnx", folder / "model.pt"]
    shutil.copy(tiny_onnx, files[0])
    shutil.copy(tiny_model, files[1])
    with serve(files) as url:
        yield url


def choose(page, dropdown: str, option: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def text_of(page, selector: str, pattern: str) -> str:
    page.locator(selector).get_by_text(re.compile(pattern)).first.wait_for()
    return page.locator(selector).inner_text()


def download(page, selector: str):
    with page.expect_download() as downloading:
        page.locator(selector).click()
    return downloading.value


def test_segment_labels_downloads_and_another_runtime(two_models, visit, half_and_half):
    visitor = visit(two_models)
    page = visitor.page
    visitor.upload(half_and_half)
    visitor.wait_for_result()
    assert "ONNX Runtime" in page.locator("#timing").inner_text()
    coco = json.loads(download(page, "#download-coco").path().read_text())
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (200, 120)
    assert sum(annotation["area"] for annotation in coco["annotations"]) == 200 * 120
    assert [category["name"] for category in coco["categories"]] == ["background", "circle", "square", "star"]
    assert download(page, "#download-overlay").suggested_filename == "half_overlay.jpg"
    shown = {category["name"] for category in coco["categories"]} & set(page.locator("#legend").inner_text().split())
    page.get_by_role("tab", name="Labels").click()
    page.locator("#regions img").first.wait_for()
    assert set(page.locator("#regions .legend-item").all_inner_texts()) == shown
    choose(page, "model", "pair/model.pt")
    text_of(page, "#timing", "PyTorch")
    assert "PyTorch" in page.locator("#header").inner_text()


def test_why(two_models, visit, half_and_half):
    visitor = visit(two_models)
    page = visitor.page
    visitor.upload(half_and_half)
    visitor.wait_for_result()
    visitor.open_tab("Why")  # the image comes along
    assert "5 steps" in text_of(page, "#why-told", "Changed")
    page.locator("#why-iterations input[type=range]").press("Home")
    assert "0.00 %" in text_of(page, "#why-told", "0 iterations")
    page.locator("#why-iterations input[type=range]").press("End")
    text_of(page, "#why-told", "30 steps")

    page.get_by_role("tab", name="Neighbours").click()
    assert visitor.natural_size("#why-pixel img") == (600, 360)  # small images are drawn larger
    before = text_of(page, "#why-listens", "for 90 %")
    box = page.locator("#why-pixel img").bounding_box()
    shrunk = min(box["width"] / 600, box["height"] / 360, 1)  # the image lies in the middle of its box
    page.mouse.click(box["x"] + box["width"] / 2 - shrunk * 600 / 4, box["y"] + box["height"] / 2)
    page.wait_for_function("Math.abs(document.querySelector('#why-x input[type=range]').value - 25) < 2")
    page.wait_for_function("before => document.querySelector('#why-listens').innerText !== before", arg=before)
    page.get_by_role("tab", name="Activation").click()
    assert visitor.natural_size("#why-activation img") == (200, 120)
    before = page.locator("#why-activation img").get_attribute("src")
    choose(page, "why-class", "star")
    page.wait_for_function(
        "before => document.querySelector('#why-activation img')?.getAttribute('src') !== before", arg=before
    )
    text_of(page, "#why-learned", "Highest score")


def test_paste(two_models, visit, half_and_half, stripes):
    visitor = visit(two_models)
    paste = """bytes => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(bytes)], "pasted.png", {type: "image/png"}));
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: files, bubbles: true}));
    }"""
    visitor.page.evaluate(paste, list(half_and_half.read_bytes()))
    visitor.wait_for_result()
    assert visitor.natural_size("#overlay img") == (200, 120)
    second = stripes("second.png", 90, 160, (250, 10, 10), (10, 10, 250))
    visitor.page.evaluate(paste, list(second.read_bytes()))  # replaces what is there
    visitor.page.wait_for_function("document.querySelector('#overlay img')?.naturalWidth === 90")


def test_compare(two_models, visit, half_and_half):
    visitor = visit(two_models)
    page = visitor.page
    visitor.open_tab("Compare")
    page.locator("#compare-upload input[type=file]").set_input_files(half_and_half)
    told = text_of(page, "#compare-told", "PyTorch")
    agreement = float(re.search(r"([\d.]+) %\s+of the pixels agree", told)[1])
    assert agreement > 99  # the export gives what the network gives
    assert "ONNX Runtime" in told
    for side in ("left", "right", "difference"):
        assert visitor.natural_size(f"#compare-{side} img") == (200, 120)


def test_first_page_view_segments_an_example(two_models, color_segmenter, serve, visit, half_and_half):
    with serve(color_segmenter, examples=[half_and_half]) as url:
        visitor = visit(url)
        visitor.wait_for_result()
        assert visitor.natural_size("#overlay img") == (200, 120)


def test_inside_another_application(color_segmenter, visit, half_and_half):
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from demo import build_app
    from demo.server import listen

    app = FastAPI()
    app.get("/health")(lambda: {"alive": True})
    gr.mount_gradio_app(app, build_app(color_segmenter), path="/segment", footer_links=[])
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            visitor = visit(f"http://127.0.0.1:{listener.getsockname()[1]}/segment/")
            visitor.upload(half_and_half)
            visitor.wait_for_result()
            assert visitor.page.request.get(visitor.page.url.replace("segment/", "health")).json() == {"alive": True}
        finally:
            server.should_exit = True
            thread.join(timeout=20)
