"""The model that comes with the page."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from demo.cli import _models
from demo.models import STARTER, find_examples
from wsss_deploy import Segmenter

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'wsss-deploy[cpu]'")


def test_it_segments_scenes_that_it_has_not_seen(tmp_path):
    from training.data.synthetic import write_scenes

    write_scenes(tmp_path / "scenes", train=20, val=1, size=128, seed=1)  # it was trained on seed 0
    segmenter = Segmenter(STARTER)
    count = len(segmenter.card.classes)
    confusion = np.zeros((count, count), np.int64)
    for path in sorted((tmp_path / "scenes" / "masks").glob("train_*.png")):
        with Image.open(path) as image:
            truth = np.asarray(image)
        mask = segmenter.predict(tmp_path / "scenes" / "images" / path.name).mask
        known = truth != 255
        confusion += np.bincount(count * truth[known].astype(int) + mask[known], minlength=count**2).reshape(count, -1)
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    assert iou.mean() > 0.8


def test_what_is_opened(tmp_path, monkeypatch, tiny_onnx):
    monkeypatch.chdir(tmp_path)
    assert _models(None, None) == [STARTER]
    assert len(find_examples(STARTER)) == 6
    run = tmp_path / "photos" / "runs" / "run-001"
    run.mkdir(parents=True)
    assert _models(None, tmp_path / "photos") == [STARTER]
    (run / "model.onnx").write_bytes(tiny_onnx.read_bytes())
    assert _models(None, tmp_path / "photos") == []  # the folder's own models are offered
    (run / "other.onnx").write_bytes(tiny_onnx.read_bytes())
    assert _models(run, None) == [run / "model.onnx", run / "other.onnx"]
    (run / "model.onnx").unlink()
    assert _models(run, None) == [run / "other.onnx"]
    (tmp_path / "model.onnx").write_bytes(tiny_onnx.read_bytes())
    assert [path.name for path in _models(None, None)] == ["model.onnx"]


@pytest.mark.browser
def test_the_first_page_view_segments(serve, visit):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")
    with serve([STARTER], examples=find_examples(STARTER)) as url:
        visitor = visit(url)
        visitor.wait_for_result()
        assert visitor.natural_size("#overlay img") == (128, 128)
        assert len(visitor.page.locator("#legend tbody tr").all()) > 1
