"""The page as a visitor uses it, in a real browser."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
HALF_RED = (235, 15, 35)  # RED under the class's (220, 20, 60) at opacity 0.5
TOLERANCE = 8  # of JPEG


def close(found, expected) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= TOLERANCE


def test_segments_an_upload(address, visit, half_and_half):
    visitor = visit(address)
    page = visitor.page
    visitor.upload(half_and_half)
    visitor.wait_for_result()

    assert visitor.natural_size("#overlay img") == (200, 120)
    assert close(visitor.pixel("#overlay img", 40, 60), HALF_RED)
    assert close(visitor.pixel("#overlay img", 160, 60), (20, 35, 225))

    rows = page.locator("#legend tbody tr").all_inner_texts()
    assert len(rows) == 2  # green does not occur
    assert all("50.0 %" in row for row in rows)
    # What the card holds is shown as text and never run, neither as HTML nor as a template.
    assert any("<img src=x onerror=window.hacked=1>${6*7}{{value}}" in row for row in rows)
    assert page.evaluate("window.hacked") is None

    timing = page.locator("#timing").inner_text()
    for stage in ("Reading and resizing", "Network", "Refinement", "Scores to mask", "Total"):
        assert re.search(rf"{stage}\s+\d+\.\d", timing), timing
    assert re.search(r"PyTorch \d+\.\d+\S* on cpu", timing)
    assert "200 × 120 pixels" in timing

    with page.expect_download() as downloading:
        page.locator("#download").click()
    assert downloading.value.suggested_filename == "half_mask.png"
    mask = Image.open(downloading.value.path())
    assert mask.mode == "P"
    expected = np.zeros((120, 200), np.uint8)
    expected[:, 100:] = 2
    np.testing.assert_array_equal(np.asarray(mask), expected)

    page.get_by_role("tab", name="Confidence").click()
    assert visitor.natural_size("#confidence img") == (200, 120)
    assert min(visitor.pixel("#confidence img", 40, 60)[:2]) > 200  # sure: the light end of the scale


def test_opacity_is_blended_without_the_model(address, visit, half_and_half, color_segmenter):
    visitor = visit(address)
    visitor.upload(half_and_half)
    visitor.wait_for_result()
    calls = color_segmenter.calls
    for key, expected in (("Home", RED), ("End", (220, 20, 60))):
        before = visitor.page.locator("#overlay img").get_attribute("src")
        visitor.page.locator("#opacity input[type=range]").press(key)
        visitor.page.wait_for_function(
            "before => document.querySelector('#overlay img')?.src && "
            "document.querySelector('#overlay img').getAttribute('src') !== before",
            arg=before,
        )
        assert close(visitor.pixel("#overlay img", 40, 60), expected)
    assert color_segmenter.calls == calls


def truncated() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()[:2000]


def bomb() -> bytes:
    """A small file of 400 megapixels."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def test_bad_uploads_are_explained_and_the_page_goes_on(address, visit, half_and_half, tmp_path):
    visitor = visit(address)
    for name, content, reason in (
        ("notes.png", b"no image at all", "not an image"),
        ("short.png", truncated(), "damaged or cut short"),
        ("empty.png", b"", "empty"),
        ("bomb.png", bomb(), "megapixels|too many pixels"),
    ):
        visitor.upload({"name": name, "mimeType": "image/png", "buffer": content})
        alert = visitor.page.locator("#message [role=alert]")
        alert.wait_for()
        visitor.page.screenshot(path=tmp_path / f"{name}.png")
        text = alert.inner_text()
        assert name in text
        assert re.search(reason, text), text
        assert "tmp" not in text  # where files lie on the server is nobody's business
        assert not visitor.page.locator("#overlay img").count()
        visitor.clear()
    visitor.upload(half_and_half)
    visitor.wait_for_result()
    assert not visitor.page.locator("#message [role=alert]").count()


def test_two_visitors_do_not_see_each_other(address, visit, stripes):
    images = [stripes("first.png", 160, 90, RED, GREEN), stripes("second.png", 90, 160, BLUE, GREEN, BLUE)]
    visitors = [visit(address), visit(address)]
    for visitor, image in zip(visitors, images, strict=True):
        visitor.upload(image)
    for visitor in visitors:
        visitor.wait_for_result()
    # The slider of the first shows the first's image again, although the second's came later.
    visitors[0].page.locator("#opacity input[type=range]").press("Home")
    visitors[0].page.wait_for_function("document.querySelector('#opacity input[type=range]').value === '0'")
    assert [visitor.natural_size("#overlay img") for visitor in visitors] == [(160, 90), (90, 160)]
    for _ in range(100):
        if close(visitors[0].pixel("#overlay img", 20, 45), RED):
            break
        visitors[0].page.wait_for_timeout(100)
    assert close(visitors[0].pixel("#overlay img", 20, 45), RED)
    assert close(visitors[1].pixel("#overlay img", 10, 80), (20, 35, 225))
    assert "33.3 %" in visitors[1].page.locator("#legend").inner_text()
    assert "33.3 %" not in visitors[0].page.locator("#legend").inner_text()


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_looks(address, visit, half_and_half, tmp_path, look):
    options = {"viewport": {"width": 390, "height": 844}} if look == "narrow" else {"color_scheme": look}
    visitor = visit(address, **options)
    page = visitor.page
    visitor.upload(half_and_half)
    visitor.wait_for_result()
    visitor.natural_size("#overlay img")
    page.get_by_text("About this model").click()
    page.locator("#card dl").wait_for()
    card = page.locator("#card").inner_text()
    assert "gated_crf" in card
    assert "0.8123" in card
    page.screenshot(path=tmp_path / f"{look}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness < 80) == (look == "dark"), background


def test_examples_password_and_size_limit(color_segmenter, serve, chromium, visit, half_and_half):
    from demo import Limits

    with serve(color_segmenter, examples=[half_and_half], limits=Limits(max_bytes=5000), auth=("ada", "engine")) as url:
        context = chromium.new_context(http_credentials=None)
        page = context.new_page()
        page.goto(url)
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill("engine")
        assert not page.locator("#upload").count()
        page.get_by_role("button", name="Login").click()
        page.locator("#upload input[type=file]").wait_for(state="attached")
        page.locator("#examples img").first.click()
        page.locator("#overlay img").wait_for()
        # Replacing an example by a bad upload: gradio makes the component anew when an example is chosen.
        bad = {"name": "bad.png", "mimeType": "image/png", "buffer": b"no image"}
        page.locator("#upload input[type=file]").set_input_files(bad)
        page.locator("#message [role=alert]").get_by_text("bad.png: is not an image").wait_for()
        large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(6000)}
        page.locator("#upload").get_by_role("button", name="Remove Image").click()
        page.locator("#message [role=status]").wait_for()
        page.locator("#upload input[type=file]").set_input_files(large)
        page.get_by_text(re.compile("exceeds the maximum|too large|maximum allowed", re.IGNORECASE)).first.wait_for()
        context.close()
