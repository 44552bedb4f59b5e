"""Pictures of the demo's tabs for the documents, in light, dark and narrow, and what axe-core says about each.

    python benchmarks/demo_screens.py quickstart --out docs/images

The folder is one of `wsss-quickstart`; its images are copied and annotated with a few of its scribbles, and its
training stands for one that was started in the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from demo.runs import NETWORKS

LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 800}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "has_touch": True},
}
RULES = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']}"
SERIOUS = ("serious", "critical")
MAX_SIDE, QUALITY = 1280, 60


def prepare(quickstart: Path, folder: Path) -> Path:
    data = folder / "scenes"
    (data / "images").mkdir(parents=True)
    (data / "scribbles").mkdir()
    shutil.copy(quickstart / "data" / "classes.txt", data)
    images = sorted((quickstart / "data" / "images").iterdir())[:12]
    for index, path in enumerate(images):
        shutil.copy(path, data / "images")
        if index < 5:
            shutil.copy(quickstart / "data" / "scribbles" / f"{path.stem}.png", data / "scribbles")
    run = data / "runs" / "run-001"
    shutil.copytree(quickstart / "run", run)
    for name in ("model.pt", "model.onnx"):
        shutil.copy(quickstart / name, run)
    iterations = int((run / "log.csv").read_text().splitlines()[-1].split(",")[0])
    network = next(iter(NETWORKS))
    settings = {"supervision": "scribbles", "network": network, "iterations": iterations}
    (run / "page.json").write_text(json.dumps(settings))
    return data


def open_tabs(page: Page) -> dict[str, Callable[[], None]]:
    def segment() -> None:
        page.locator("#timing table").wait_for()
        page.locator("#overlay img").wait_for()

    def why() -> None:
        page.get_by_role("tab", name="Why", exact=True).click()
        page.locator("#why-told dl").wait_for()
        page.get_by_role("tab", name="Neighbours").click()
        page.locator("#why-pixel img").wait_for()

    def compare() -> None:
        page.get_by_role("tab", name="Compare", exact=True).click()
        page.locator("#compare-told table").first.wait_for()

    def annotate() -> None:
        page.get_by_role("tab", name="Annotate", exact=True).click()
        page.locator("#annotate .images").select_option(index=1)
        page.locator("#annotate .about").get_by_text("confidence").wait_for()

    def train() -> None:
        page.get_by_role("tab", name="Train", exact=True).click()
        page.locator("#train-runs").get_by_text("run-001").wait_for()
        page.locator("#train-chart svg").first.wait_for()

    return {"segment": segment, "why": why, "compare": compare, "annotate": annotate, "train": train}


def findings(page: Page, script: str) -> list[str]:
    page.evaluate(script)
    result = page.evaluate(f"axe.run(document, {RULES})")
    return [
        f"{each['impact']}: {each['id']} ({len(each['nodes'])}): {each['nodes'][0]['html'][:160]}"
        for each in result["violations"]
    ]


def save(page: Page, target: Path) -> None:
    page.wait_for_timeout(600)  # transitions
    raw = target.with_suffix(".png")
    page.screenshot(path=raw, full_page=True)
    with Image.open(raw) as image:
        image.thumbnail((MAX_SIDE, 4 * MAX_SIDE))
        image.convert("RGB").save(target, quality=QUALITY, method=6)
    raw.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--look", choices=LOOKS, action="append", help="only this one")
    parser.add_argument("--json", type=Path, help="write the findings, a list for each tab and look")
    parser.add_argument("--check", action="store_true", help="exit 1 when axe-core has a serious or critical finding")
    arguments = parser.parse_args()
    import axe_playwright_python

    from demo.app import build_app
    from demo.models import find_examples
    from demo.server import listen, make_server

    script = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    models = [arguments.quickstart / name for name in ("model.onnx", "model.pt")]
    with tempfile.TemporaryDirectory() as folder, listen("127.0.0.1", 0) as listener, sync_playwright() as playwright:
        data = prepare(arguments.quickstart, Path(folder))
        page_app = build_app(models, find_examples(models[0]), data=data)
        server = make_server(page_app, "127.0.0.1")
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for look in arguments.look or LOOKS:
            context = browser.new_context(**LOOKS[look])
            context.set_default_timeout(120_000)
            page = context.new_page()
            page.goto(address)
            for name, open_tab in open_tabs(page).items():
                open_tab()
                save(page, arguments.out / f"demo_{name}_{look}.webp")
                found[f"{name} {look}"] = findings(page, script)
                for finding in found[f"{name} {look}"]:
                    print(f"{name} {look}: {finding}", flush=True)
            context.close()
        browser.close()
        server.should_exit = True
        page_app.runs.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    serious = [f"{where}: {text}" for where, texts in found.items() for text in texts if text.startswith(SERIOUS)]
    print(f"{len(found)} pictures, {sum(map(len, found.values()))} findings, {len(serious)} serious or critical")
    for line in serious if arguments.check else ():
        print(f"MISSED: {line}")
    return 1 if arguments.check and serious else 0


if __name__ == "__main__":
    sys.exit(main())
