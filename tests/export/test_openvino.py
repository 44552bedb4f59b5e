"""OpenVINO's files: the same results as torch, the gate before them, and what is said of damaged ones."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import export.parity
from export.cli import main
from export.formats import check, read_formats
from export.patterns import pattern_image
from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card, report_name
from wsss_deploy.backends import can_run
from wsss_deploy.cli.file_checks import check_file
from wsss_deploy.errors import ArtifactError, BackendError, UsageError

openvino = pytest.importorskip("openvino")

pytestmark = pytest.mark.timeout(900)  # as in test_contract.py


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino")
    for precision in ("fp32", "bf16"):
        assert run(tiny_model, "--format", "openvino", "--precision", precision, "--out", folder) == 0
    return folder


@pytest.fixture
def copied(written, tmp_path):
    for file in written.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["model.xml", "model.bf16.xml"])
def test_the_same_masks_as_torch(written, tiny_model, name):
    model, reference = Segmenter(written / name), Segmenter(tiny_model)
    told = model.describe()
    assert (told["backend"], told["device"]) == ("openvino", "cpu")
    assert read_card(written / name).precision == ("bf16" if "bf16" in name else "fp32")
    assert json.loads((written / report_name(name)).read_text())["verdict"] == "passed"
    images = [pattern_image(height, width, 3) for height, width in ((90, 70), (33, 64), (90, 70))]
    for image, found, expected in zip(
        images, model.predict_batch(images), reference.predict_batch(images), strict=True
    ):
        assert found.mask.shape == image.shape[:2]
        assert (found.mask == expected.mask).mean() > 0.98
    np.testing.assert_array_equal(model.predict_masks(images)[1], model.predict(images[1]).mask)


def test_threads_keep_to_the_quota(written, monkeypatch):
    from wsss_deploy.backends import openvino_backend

    monkeypatch.setattr(openvino_backend, "thread_limit", lambda: 1)
    segmenter = Segmenter(written / "model.xml")
    assert segmenter.describe()["threads"] == 1
    assert segmenter.runtime._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_many_threads_give_the_masks_of_one(written):
    model = Segmenter(written / "model.xml", threads=1)
    images = [pattern_image(48 + 16 * (index % 3), 64, index) for index in range(24)]
    alone = [model.predict(image).mask for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: model.predict(image).mask, images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_kept_that_differs_from_torch(tiny_model, tmp_path, monkeypatch, capsys):
    strict = export.parity.Thresholds(score_max=0.0, score_mean=0.0, tie=0.0)
    monkeypatch.setitem(export.parity.THRESHOLDS, "bf16", strict)
    assert run(tiny_model, "--format", "openvino", "--precision", "bf16", "--out", tmp_path) != 0
    assert "model.bf16.xml: gives other results than torch" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.xml")) + list(tmp_path.glob("*.bin")) + list(tmp_path.glob(".openvino*"))


def test_damaged_files_are_named(copied):
    model, weights = copied / "model.xml", copied / "model.bin"
    assert all(item.passed for item in check_file(str(model)))
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"model\.bin beside it belongs to another model or is cut short"):
        Segmenter(model)
    assert [item.passed for item in check_file(str(model)) if item.name == "content"] == [False]
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"its weights model\.bin cannot be read"):
        Segmenter(model)
    whole = model.read_text()
    model.write_text(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="is no XML or cut short"):
        read_card(model)
    model.write_text(whole.replace("wsss_card", "others_card"))
    with pytest.raises(ArtifactError, match="of other origin"):
        read_card(model)
    model.write_text('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb">]>' + whole)
    with pytest.raises(ArtifactError, match="declares XML entities"):
        read_card(model)


def test_other_encodings_hide_nothing(copied):
    model = copied / "model.xml"
    text = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb">]>' + model.read_text().partition("?>")[2]
    for encoding, message in (("utf-16", "is no UTF-8 text"), ("utf-16-le", "declares XML entities")):
        model.write_bytes(text.encode(encoding))
        with pytest.raises(ArtifactError, match=message):
            read_card(model)


def test_bf16_is_not_proved_by_a_cpu_that_has_none(tiny_model, tmp_path, monkeypatch, capsys):
    from wsss_deploy.backends.openvino_backend import OpenVinoBackend

    told = OpenVinoBackend.describe
    monkeypatch.setattr(OpenVinoBackend, "describe", lambda self: told(self) | {"precision": "f32"})
    assert run(tiny_model, "--format", "openvino", "--precision", "bf16", "--out", tmp_path) != 0
    assert "this CPU has no bf16" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.xml"))


def test_a_graph_that_openvino_refuses(copied):
    from wsss_deploy.openvino_file import read_entries

    model = copied / "model.xml"
    model.write_text(model.read_text().replace('type="MatMul"', 'type="MatMix"', 1))
    assert read_entries(model)
    with pytest.raises(ArtifactError, match="OpenVINO cannot load it"):
        Segmenter(model)


def test_what_the_table_has(tmp_path):
    with pytest.raises(UsageError, match="--format onnx has no --precision bf16; nearest is --precision fp16"):
        check(read_formats("onnx"), "bf16", "none", False)
    with pytest.raises(UsageError, match="--format openvino has no --precision int8"):
        check(read_formats("openvino"), "int8", "none", True)
    with pytest.raises(UsageError, match="openvino has no --refine in-graph: wsss-deploy's runtime refines"):
        check(read_formats("openvino"), "fp32", "in-graph", False)


def test_other_devices_and_a_missing_runtime(written, monkeypatch):
    with pytest.raises(BackendError, match=r"OpenVINO runs model\.xml on the CPU"):
        Segmenter(written / "model.xml", device="cuda")
    monkeypatch.setattr("wsss_deploy.backends.find_spec", lambda name: None)
    assert "'wsss-deploy[openvino]'" in can_run("openvino").reason
    with pytest.raises(BackendError, match="openvino not installed"):
        Segmenter(written / "model.xml")
