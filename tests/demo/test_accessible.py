"""axe-core finds nothing serious in any tab, light or dark, and no tab scrolls sideways on a phone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")
axe = pytest.importorskip("axe_playwright_python", reason="needs axe-core: pip install 'wsss-deploy[dev]'")
pytestmark = pytest.mark.browser

TABS = {
    "Segment": "#overlay img",
    "Why": "#why-told dl",
    "Compare": "#compare-told table",
    "Annotate": "#annotate .stage[data-image]",
    "Train": "#train-labels p",
}


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory, tiny_model, tiny_onnx, serve):
    data = tmp_path_factory.mktemp("accessible") / "photos"
    (data / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).save(data / "images" / "photo.png")
    (data / "classes.txt").write_text("background\nbox\n")
    with serve([tiny_onnx, tiny_model], data=data, examples=[data / "images" / "photo.png"]) as url:
        yield url


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_every_tab(whole_page, visit, look):
    narrow = {"viewport": {"width": 390, "height": 844}}
    visitor = visit(whole_page, **(narrow if look == "narrow" else {"color_scheme": look}))
    page = visitor.page
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = []
    for name, there in TABS.items():
        visitor.open_tab(name)
        page.locator(there).first.wait_for()
        for pause in (400, 4000):  # colours change slowly, on a busy machine very slowly
            page.wait_for_timeout(pause)
            result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            if not result["violations"]:
                break
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} scrolls sideways"
        found += [
            f"{name}: {each['id']} ({each['impact']}): {each['nodes'][0]['html'][:200]}"
            for each in result["violations"]
            if each["impact"] in ("serious", "critical")
        ]
    assert found == []
