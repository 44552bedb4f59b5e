"""What the page is made of, without a browser."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from demo import Limits
from demo.colormap import ANCHORS, colorize
from demo.folder import AnnotatedFolder
from demo.markup import legend, run_status
from demo.models import find_examples, find_model
from demo.registry import Models
from demo.runs import RunStatus, Settings
from demo.segmenting import SHOWN_SIDE, confidence_image, segment_upload, shown, uploaded_file
from demo.server import is_loopback, listen
from wsss_deploy.errors import ImageError, UsageError, WsssError
from wsss_deploy.segmentation import ClassShare


def test_importing_the_package_is_light():
    check = "import demo, sys; print([name for name in ('gradio', 'torch', 'onnxruntime') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_limits_are_checked_before_decoding(color_segmenter, half_and_half):
    with pytest.raises(ImageError, match=r"^half.png: 200 × 120 is 0 megapixels"):
        segment_upload(color_segmenter, half_and_half, Limits(max_pixels=200 * 120 - 1))
    with pytest.raises(ImageError, match=r"^half.png: .* MB, this page accepts"):
        segment_upload(color_segmenter, half_and_half, Limits(max_bytes=half_and_half.stat().st_size - 1))
    result = segment_upload(color_segmenter, half_and_half, Limits(max_pixels=200 * 120))
    assert result.mask.shape == (120, 200)


def test_large_images_are_shown_smaller_and_saved_whole(color_segmenter, stripes):
    path = stripes("large.png", 2 * SHOWN_SIDE, 30, (250, 0, 0), (0, 0, 250))
    result = segment_upload(color_segmenter, path, Limits())
    kept = shown(result, "large", color_segmenter.card)
    assert result.mask.shape == (30, 2 * SHOWN_SIDE)
    assert kept.image.shape == (15, SHOWN_SIDE, 3)
    assert kept.mask.shape == (15, SHOWN_SIDE)
    assert set(np.unique(kept.mask)) == {0, 2}
    assert confidence_image(result).size == (SHOWN_SIDE, 15)
    assert kept.overlay(0.0).size == (SHOWN_SIDE, 15)


def test_extreme_shapes(color_segmenter, tmp_path):
    for size in ((1, 1), (1, 5000)):
        Image.new("RGB", size, (0, 250, 0)).save(tmp_path / "thin.png")
        result = segment_upload(color_segmenter, tmp_path / "thin.png", Limits())
        assert (result.mask == 1).all()
        kept = shown(result, "thin", color_segmenter.card)
        assert min(kept.mask.shape) == 1
        assert kept.overlay(0.5).size == confidence_image(result).size


def test_colors_span_the_unit_interval():
    image = colorize(np.array([[0.0, 1.0, 2.0, -1.0]]))
    assert [image.getpixel((x, 0)) for x in range(4)] == [ANCHORS[0], ANCHORS[-1], ANCHORS[-1], ANCHORS[0]]
    lightness = np.asarray(colorize(np.linspace(0, 1, 64)[None]).convert("L"), int)[0]
    assert (np.diff(lightness) >= 0).all()


def test_legend_escapes_names():
    html = legend([ClassShare(0, "<script>a&b", (1, 2, 3), 0.0004, 0.5)])
    assert "<script>" not in html
    assert "&lt;script&gt;a&amp;b" in html
    assert "&lt;0.1 %" in html


def test_finding_a_model(tmp_path):
    assert find_model(tmp_path) is None
    (tmp_path / "quickstart").mkdir()
    for name in ("quickstart/model.onnx", "model.pt", "model.onnx"):  # each is preferred to those before
        (tmp_path / name).touch()
        assert find_model(tmp_path) == tmp_path / name


def test_examples_are_images_that_the_model_was_not_trained_on(tmp_path, stripes):
    model = tmp_path / "model.onnx"
    assert find_examples(model) == []
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for name in ("a", "b", "c"):
        stripes(f"data/images/{name}.png", 8, 8, (9, 9, 9))
    (images / "broken.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("no image")
    assert [path.name for path in find_examples(model)] == ["a.png", "b.png", "c.png"]
    assert len(find_examples(model, limit=2)) == 2
    (tmp_path / "data" / "splits").mkdir()
    (tmp_path / "data" / "splits" / "val.txt").write_text("c\n")
    assert [path.name for path in find_examples(model)] == ["c.png"]


def test_listening():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.4", "example.org"))
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(WsssError, match=f"port {port} on 127.0.0.1 is in use .* --port N"):
            listen("127.0.0.1", port)
    for host in ("203.0.113.7", "no such host"):
        with pytest.raises(UsageError, match="no address of this machine"):
            listen(host, 0)


def test_only_uploads_are_read(tmp_path):
    uploads = tmp_path / "uploads"
    (uploads / "0123").mkdir(parents=True)
    for path in (uploads / "0123" / "photo.png", tmp_path / "secret.png"):
        path.touch()
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    photo = {"path": str(uploads / "0123" / "photo.png")}
    assert uploaded_file(photo, uploads) == (uploads / "0123" / "photo.png").resolve()
    outside = ("/etc/passwd", "http://192.0.2.1/a.png", "", "a\0b", None, 7, str(tmp_path / "secret.png"))
    inside = (f"{uploads}/../secret.png", f"{uploads}/link.png", f"{uploads}/absent.png", str(uploads))
    for upload in ("/etc/passwd", [photo], {}, {"url": "data:image/png;base64,AAAA", "path": None}):
        with pytest.raises(ImageError, match="no uploaded file"):
            uploaded_file(upload, uploads)
    for path in (*outside, *inside):
        with pytest.raises(ImageError, match="no uploaded file"):
            uploaded_file({"path": path}, uploads)


def test_predictions_have_the_colours_of_the_brushes(color_segmenter, stripes, tmp_path):
    from demo.annotating import Annotating

    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    stripes("photo.png", 60, 40, (250, 10, 10), (10, 10, 250)).rename(data / "images" / "photo.png")
    mask = Image.fromarray(np.zeros((40, 60), np.uint8))
    brushes = [(9, 9, 9), (1, 200, 2), (3, 4, 205)]
    mask.putpalette([value for color in brushes for value in color])
    mask.save(data / "masks" / "other.png")
    (data / "classes.txt").write_text("\n".join(color_segmenter.card.classes) + "\n")
    folder = AnnotatedFolder(data)
    assert folder.palette == tuple(brushes)
    functions = {each.__name__: each for each in Annotating(folder, Models(color_segmenter)).functions()}
    answer = functions["predict"]({"name": "photo"})
    with Image.open(io.BytesIO(base64.b64decode(answer["image"].partition(",")[2]))) as tint:
        assert [tint.getpixel((x, 20)) for x in (5, 55)] == [(*brushes[0], 255), (*brushes[2], 255)]


def test_a_training_before_its_first_step_shows_no_figure():
    settings = Settings("tags", "Pretrained (a download)", 500)
    status = RunStatus("run-001", "training", settings, 0, {}, "classifier of positions")
    assert "getting ready" in run_status(status)
    assert "of 500" not in run_status(status)
    assert "20 of 500 iterations" in run_status(replace(status, iteration=20))
    assert "0 of 500 iterations" in run_status(replace(status, state="queued"))
