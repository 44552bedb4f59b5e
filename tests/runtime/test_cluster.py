"""Ray Data on this machine: every image once, whatever happens to workers."""

from __future__ import annotations

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from wsss_deploy import Segmenter
from wsss_deploy.cli.predict import main
from wsss_deploy.cluster import ParquetImages, Predictor, _record, predict_on_ray
from wsss_deploy.errors import BackendError, UsageError, WsssError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

pytestmark = pytest.mark.timeout(300)


class DiesOnce(Predictor):
    """The first worker that comes to it dies after it has written its masks and before it has reported them."""

    def __call__(self, batch):
        found = super().__call__(batch)
        try:
            os.close(os.open(self._out / "died", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return found
        os._exit(1)


class CannotBegin(Predictor):
    """A worker that fails before its first block."""

    def __init__(self, *_):
        raise BackendError("no room for the model")


class CannotGoOn(Predictor):
    """A worker that fails on every block."""

    def __call__(self, batch):
        raise ZeroDivisionError("a defect")


@pytest.fixture(scope="module")
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.fromarray(np.roll(picture, 3 * index, axis=1)).save(tmp_path / "images" / f"{index:02}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_a_dead_worker_loses_and_doubles_nothing(cluster, folder, color_onnx, capfd):
    images, out = sorted((folder / "images").iterdir()), folder / "out"
    found = predict_on_ray(images, color_onnx, out, workers=2, batch=3, predictor=DiesOnce)
    assert (out / "died").exists(), "nobody died, so nothing was tested"
    assert "max_restarts" not in capfd.readouterr().err, "Ray warns of what cannot be"
    assert [item["mask"] for item in found["images"]] == [f"{index:02}_mask.png" for index in range(12)]
    (failure,) = found["failed"]
    assert failure["image"].endswith("broken.png")
    assert "is not an image" in failure["error"]
    alone = Segmenter(color_onnx)
    for index in range(12):
        expected = alone.predict(folder / "images" / f"{index:02}.png").mask
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"{index:02}_mask.png")), expected)
    assert len(list(out.glob("*.png"))) == 12


def test_a_table_of_images(cluster, folder, color_onnx, capsys):
    import pyarrow
    import pyarrow.parquet

    content = {"name": ["nothing"], "image": [None]}
    for index in range(5):
        buffer = io.BytesIO()
        Image.open(folder / "images" / f"{index:02}.png").save(buffer, "PNG")
        content["name"].append(f"left/{index}.png")
        content["image"].append(buffer.getvalue())
    table = folder / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table(content), table)
    assert run(table, "--model", color_onnx, "--out", folder / "out", "--ray", "--workers", 1) == 1
    told = capsys.readouterr()
    assert "5 segmented on the cluster" in told.out
    assert "nothing: the table holds no image for it" in told.err
    record = json.loads((folder / "out" / "predictions.json").read_text())
    assert [item["mask"] for item in record["images"]] == [f"{index}_mask.png" for index in range(5)]
    assert (folder / "out" / "3_mask.png").is_file()
    assert [ran["backend"] for ran in record["runtimes"]] == ["onnxruntime"]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "out" / "4_mask.png")
    assert run(table, "--model", color_onnx, "--out", folder / "out", "--ray") == 1
    assert "would overwrite (4_mask.png)" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"has no column picture \(columns: name, image\)"):
        predict_on_ray(ParquetImages(table, image="picture"), color_onnx, folder / "out")
    texts = {"name": ["a"], "image": ["text"]}
    pyarrow.parquet.write_table(pyarrow.table(texts), table)
    with pytest.raises(UsageError, match="column image is of type string, expected binary"):
        predict_on_ray(ParquetImages(table), color_onnx, folder / "out")
    pyarrow.parquet.write_table(pyarrow.table({key: [value[1]] * 2 for key, value in content.items()}), table)
    with pytest.raises(UsageError, match=r"holds 'left/0\.png' more than once"):
        predict_on_ray(ParquetImages(table), color_onnx, folder / "out")


def test_names_that_no_file_can_have_and_tables_without_rows(cluster, folder, color_onnx):
    import pyarrow
    import pyarrow.parquet

    image = (folder / "images" / "00.png").read_bytes()
    table = folder / "images.parquet"

    def write(names):
        typed = {"name": pyarrow.array(names, pyarrow.string()), "image": pyarrow.array([image] * len(names))}
        pyarrow.parquet.write_table(pyarrow.table(typed | {"image": typed["image"].cast(pyarrow.binary())}), table)

    write(["a\0b", "d" * 300, "../../e.png"])
    found = predict_on_ray(ParquetImages(table), color_onnx, folder / "out", workers=1)
    assert len(found["images"]) == 2
    (failure,) = found["failed"]
    assert failure["image"] == "a\0b"
    assert "null byte" in failure["error"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["d" * 200 + "_mask.png", "e_mask.png"]
    write([])
    with pytest.raises(UsageError, match="holds no rows"):
        predict_on_ray(ParquetImages(table), color_onnx, folder / "out")
    write(["a", None])
    with pytest.raises(UsageError, match="column name is empty in row 2"):
        predict_on_ray(ParquetImages(table), color_onnx, folder / "out")
    with pytest.raises(UsageError, match="no image to segment"):
        predict_on_ray([], color_onnx, folder / "out")


@pytest.mark.parametrize(
    ("predictor", "reason"),
    [(CannotBegin, "BackendError: no room for the model"), (CannotGoOn, "ZeroDivisionError: a defect")],
)
def test_what_ails_the_workers_is_told(cluster, folder, color_onnx, predictor, reason):
    with pytest.raises(WsssError) as error:
        predict_on_ray([folder / "images" / "00.png"], color_onnx, folder / "out", workers=1, predictor=predictor)
    assert str(error.value) == f"the workers failed ({reason}); --debug shows all of it"


def test_a_device_that_is_none_is_told_before_the_work(folder, color_onnx):
    with pytest.raises(UsageError, match="unknown device 'bogus'"):
        predict_on_ray([folder / "images" / "00.png"], color_onnx, folder / "out", device="bogus")


def test_every_image_has_to_be_reported_once():
    row = {"source": "a", "result": "{}", "error": "", "ran": "{}"}
    assert _record(["a"], [row]) == {"images": [{}], "failed": [], "runtimes": [{}]}
    with pytest.raises(WsssError, match="1 were lost and 0 reported twice"):
        _record(["a", "b"], [row])
    with pytest.raises(WsssError, match="0 were lost and 1 reported twice"):
        _record(["a"], [row, row])


def test_workers_that_do_not_fit_are_an_error_at_once(cluster, folder, color_onnx):
    images, out = [folder / "images" / "00.png"], folder / "out"
    with pytest.raises(UsageError, match="not one worker fits: 4 CPUs are needed, the cluster has 2 CPUs"):
        predict_on_ray(images, color_onnx, out, threads=4)
    with pytest.raises(UsageError, match="1 CPUs and a GPU are needed"):
        predict_on_ray(images, color_onnx, out, device="cuda")
    with pytest.raises(UsageError, match="the cluster chooses the GPU"):
        predict_on_ray(images, color_onnx, out, device="cuda:1")


def test_what_does_not_go_together(folder, color_onnx, capsys):
    given = (folder / "images", "--model", color_onnx, "--out", folder / "out", "--ray")
    assert run(*given, "--tile", 64) == 2
    assert "--tile and --ray do not go together" in capsys.readouterr().err
    assert run(*given, "--workers", 0) == 2
    assert run(folder / "a.parquet", *given) == 2
    assert "one table at a time" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(folder, color_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"'wsss-deploy\[ray\]'"):
        predict_on_ray([folder / "images" / "00.png"], color_onnx, folder / "out")
