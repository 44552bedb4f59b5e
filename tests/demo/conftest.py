"""A page that is really served, and a real browser that looks at it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

#: What a careless or hostile card may hold; the page has to show it as text.
HOSTILE = "<img src=x onerror=window.hacked=1>${6*7}{{value}}"


@pytest.fixture(scope="session")
def color_segmenter():
    """A model whose right answer is known: the class of a pixel is its strongest colour channel."""
    nn = pytest.importorskip("torch").nn
    from wsss_deploy import Segmenter
    from wsss_deploy.card import Architecture, ModelCard, Preprocessing, Protocol, Sizing

    class ColorNetwork(nn.Module):
        def forward(self, image):  # (N, 3, H, W) -> (N, 3, H, W)
            return 8 * image

    class Counting(Segmenter):
        calls = 0

        def predict(self, image):
            type(self).calls += 1
            return super().predict(image)

    card = ModelCard(
        name="colours",
        classes=(HOSTILE, "green", "blue"),
        palette=((220, 20, 60), (0, 160, 60), (30, 60, 200)),
        architecture=Architecture(encoder="test_vit"),
        preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=4),
        sizing=Sizing(max_long_side=512),
        protocol=Protocol(
            supervision=("scribbles",), method="gated_crf", data="squares", train_images=60, iterations=500,
            batch_size=8, size=256, seed=0, weights="none", selection="last", metrics={"val_miou": 0.8123},
        ),
    )  # fmt: skip
    return Counting.from_network(ColorNetwork(), card)


@pytest.fixture
def stripes(tmp_path):
    """Write an image of vertical stripes of equal width, one of each colour."""

    def write(name: str, width: int, height: int, *colors: tuple[int, int, int]) -> Path:
        image = np.zeros((height, width, 3), np.uint8)
        for index, color in enumerate(colors):
            image[:, index * width // len(colors) : (index + 1) * width // len(colors)] = color
        Image.fromarray(image).save(tmp_path / name)
        return tmp_path / name

    return write


RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


@pytest.fixture
def half_and_half(stripes) -> Path:
    return stripes("half.png", 200, 120, RED, BLUE)


@pytest.fixture(scope="session")
def serve():
    return _serving


@contextmanager
def _serving(segmenter, **options) -> Iterator[str]:
    """Serve the page in this process, in a thread; gives its address."""
    from demo.app import build_app
    from demo.server import listen, make_server

    auth = options.pop("auth", None)
    page = build_app(segmenter, **options)
    with listen("127.0.0.1", 0) as listener:
        server = make_server(page, "127.0.0.1", auth, options.get("limits"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            if "data" in options:
                page.runs.close()


@pytest.fixture(
    scope="module"
)  # not session: playwright keeps an event loop in this thread, which other tests may need
def chromium():
    """One browser for the tests of a module, without a download: the system's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'wsss-deploy[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A browser context of its own, which writes down everything that went wrong in it."""

    def __init__(self, browser, address: str, **options) -> None:
        self.problems: list[str] = []
        self.visits = 0
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)  # a busy machine is no failure
        self.context.route(lambda url: urlsplit(url).hostname != "127.0.0.1", self._refuse)
        self.page = self.context.new_page()
        self.page.on("console", self._console)
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._answered)
        self.page.goto(address)
        self.page.locator("#upload input[type=file]").wait_for(state="attached")

    def _refuse(self, route) -> None:
        self.problems.append(f"outside request: {route.request.url}")
        route.abort()

    def _asked(self, request) -> None:
        self.visits += request.is_navigation_request()

    def _console(self, message) -> None:
        # As below: gradio reports the streams and requests that it ends itself, and those that a reload ends.
        ended = message.text.startswith("AbortError: signal is aborted")
        ended |= self.visits > 1 and message.text.startswith("Unexpected error Connection errored out")
        if message.type == "error" and not ended:
            self.problems.append(f"console error: {message.text} {message.location}")

    def _failed(self, request) -> None:
        # Aborted by the page itself: gradio ends its streams of events so, and leaves images that are replaced.
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"failed: {request.url} {request.failure}")

    def _answered(self, response) -> None:
        if response.status >= 400:
            self.problems.append(f"status {response.status}: {response.url}")

    def open_tab(self, name: str) -> None:
        """Choose a tab, in the row or, where the row is too narrow for it, in gradio's menu of further tabs."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        more = self.page.get_by_role("button", name="More tabs")
        tab.or_(more).first.wait_for()
        self.page.wait_for_timeout(300)  # gradio measures the row once more when its fonts are there
        if not tab.is_visible():
            more.click()
            self.page.locator(".overflow-dropdown").get_by_role("button", name=name, exact=True).click()
        else:
            tab.click()

    def upload(self, path: Path | dict) -> None:
        self.page.locator("#upload input[type=file]").set_input_files(path)

    def clear(self) -> None:
        self.page.locator("#upload").get_by_role("button", name="Remove Image").click()
        self.page.locator("#message [role=status]").wait_for()

    def wait_for_result(self) -> None:
        self.page.locator("#overlay img").wait_for()
        self.page.locator("#timing table").wait_for()

    def natural_size(self, selector: str) -> tuple[int, int]:
        # Waited for and read in one go: a result that comes meanwhile replaces the image or its source.
        loaded = """selector => {
            const image = document.querySelector(selector);
            return image?.complete && image.naturalWidth > 0 && [image.naturalWidth, image.naturalHeight];
        }"""
        return tuple(self.page.wait_for_function(loaded, arg=selector).json_value())

    def pixel(self, selector: str, x: int, y: int) -> tuple[int, int, int]:
        """Colour of a pixel of an image that is shown."""
        drawn = """([selector, x, y]) => {
            const image = document.querySelector(selector);
            if (!image?.complete || image.naturalWidth === 0) return false;
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(x, y, 1, 1).data].slice(0, 3);
        }"""
        return tuple(self.page.wait_for_function(drawn, arg=[selector, x, y]).json_value())


@pytest.fixture
def visit(chromium):
    """Open an address in a context of its own; at the end, nothing may have gone wrong in any of them."""
    visitors: list[Visitor] = []

    def open_page(address: str, **options) -> Visitor:
        visitors.append(Visitor(chromium, address, **options))
        return visitors[-1]

    yield open_page
    problems = [problem for visitor in visitors for problem in visitor.problems]
    for visitor in visitors:
        visitor.context.close()
    assert problems == []


@pytest.fixture(scope="session")
def address(color_segmenter) -> Iterator[str]:
    with _serving(color_segmenter) as url:
        yield url
