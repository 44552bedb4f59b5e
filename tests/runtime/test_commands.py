from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_deploy.artifact import KNOWN_SUFFIXES
from wsss_deploy.card import ModelCard
from wsss_deploy.cli import bench, doctor, predict
from wsss_deploy.cli.common import ArgumentParser, run_command
from wsss_deploy.cli.output_names import output_names
from wsss_deploy.errors import ImageError
from wsss_deploy.image_files import find_images

pytest.importorskip("onnxruntime")


def call(command, capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        command.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.fixture
def folder(tmp_path, picture):
    path = tmp_path / "photos"
    path.mkdir()
    Image.fromarray(picture).save(path / "b.png")
    Image.fromarray(picture[:, ::-1]).save(path / "a.png")
    (path / "notes.txt").write_text("not an image")
    (path / ".hidden.png").touch()
    return path


def test_predict_a_folder(folder, tmp_path, color_onnx, picture, capsys):
    out = tmp_path / "deep" / "out"
    status, text, errors = call(predict, capsys, folder, "--model", color_onnx, "--out", out)
    assert (status, errors) == (0, "")
    expected = ["a_mask.png", "a_overlay.png", "b_mask.png", "b_overlay.png", "predictions.json"]
    assert sorted(os.listdir(out)) == expected
    mask = Image.open(out / "b_mask.png")
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), picture.argmax(2))
    assert Image.open(out / "b_overlay.png").size == (60, 40)
    record = json.loads((out / "predictions.json").read_text())
    assert [item["mask"] for item in record["images"]] == ["a_mask.png", "b_mask.png"]
    assert record["failed"] == []
    assert record["runtime"]["backend"] == "onnxruntime"
    assert {entry["name"]: entry["share"] for entry in record["images"][0]["classes"]} == pytest.approx(
        {"red": 0.375, "green": 0.375, "blue": 0.25}
    )
    assert "2 segmented with model.onnx in onnxruntime on cpu" in text


def test_threads_and_tiles_reach_the_runtime(folder, tmp_path, color_onnx, capsys):
    options = ("--model", color_onnx, "--device", "cpu", "--json", "--threads", "2", "--tile", "32")
    status, text, _ = call(predict, capsys, folder, *options, "--out", tmp_path / "out")
    assert status == 0
    assert json.loads(text)["runtime"]["threads"] == 2


def test_one_bad_image_does_not_stop_the_others(folder, tmp_path, color_onnx, capsys):
    whole = (folder / "a.png").read_bytes()
    (folder / "a1_cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "a2_empty.png").touch()
    out = tmp_path / "out"
    absent = tmp_path / "absent.jpg"
    status, text, errors = call(predict, capsys, absent, folder, "--model", color_onnx, "--out", out, "--json")
    assert status == 1
    lines = errors.splitlines()
    assert len(lines) == 4
    assert "absent.jpg: no such image file" in lines[0]
    assert "a1_cut.png: is damaged" in lines[1]
    assert "a2_empty.png: is empty" in lines[2]
    assert "3 of 5 images" in lines[3]
    assert sorted(os.listdir(out)) == [
        "a_mask.png", "a_overlay.png", "b_mask.png", "b_overlay.png", "predictions.json",
    ]  # fmt: skip
    record = json.loads(text)
    assert record == json.loads((out / "predictions.json").read_text())
    assert [os.path.basename(item["image"]) for item in record["failed"]] == [
        "absent.jpg", "a1_cut.png", "a2_empty.png",
    ]  # fmt: skip


def test_where_nothing_was_segmented_the_errors_stand_alone(tmp_path, color_onnx, capsys):
    options = ("--model", color_onnx, "--out", tmp_path / "out")
    status, text, errors = call(predict, capsys, tmp_path / "one.jpg", *options)
    assert (status, text) == (1, "")
    assert errors.startswith(f"wsss-predict: {tmp_path / 'one.jpg'}: no such image file")
    assert len(errors.splitlines()) == 1
    status, text, errors = call(predict, capsys, tmp_path / "one.jpg", tmp_path / "two.jpg", *options)
    assert (status, text) == (1, "")
    assert errors.splitlines()[2] == "wsss-predict: 2 of 2 images could not be segmented"
    status, text, _ = call(predict, capsys, tmp_path / "one.jpg", *options, "--json")
    assert status == 1
    assert len(json.loads(text)["failed"]) == 1


@pytest.mark.parametrize("command", [bench, doctor, predict])
def test_help_names_every_kind_of_model_file(command, capsys):
    status, text, _ = call(command, capsys, "--help")
    assert status == 0
    assert all(f"model{suffix}" in text for suffix in KNOWN_SUFFIXES)


def test_equal_names_get_different_results(folder, tmp_path, color_onnx, picture, capsys):
    other = tmp_path / "others"
    other.mkdir()
    Image.fromarray(picture).save(other / "a.png")
    Image.fromarray(picture).save(folder / "b.webp", lossless=True)
    status, _, _ = call(predict, capsys, folder, other / "*", "--model", color_onnx, "--out", tmp_path / "out")
    assert status == 0
    assert sorted(file for file in os.listdir(tmp_path / "out") if "mask" in file) == [
        "b_png_mask.png", "b_webp_mask.png", "others_a_mask.png", "photos_a_mask.png",
    ]  # fmt: skip


def test_own_results_are_replaced_and_a_users_files_are_not(folder, color_onnx, capsys):
    arguments = (folder, "--model", color_onnx, "--out", folder)
    assert call(predict, capsys, *arguments)[0] == 0
    first = sorted(os.listdir(folder))
    assert call(predict, capsys, *arguments)[0] == 0
    assert sorted(os.listdir(folder)) == first  # earlier results are not segmented in their turn
    annotated = folder / "a_mask.png"
    Image.new("L", (3, 3)).save(annotated)
    before = annotated.read_bytes()
    status, _, errors = call(predict, capsys, folder / "a.png", "--model", color_onnx, "--out", folder)
    assert status == 1
    assert "did not write and would overwrite (a_mask.png)" in errors
    assert annotated.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"--model": "absent.onnx"}, 1, "no such model file"),
        ({"--opacity": "2"}, 2, "0 to 1"),
        ({"--opacity": "much"}, 2, "invalid float"),
        ({"--device": "gpu"}, 2, "unknown device"),
        ({"images": "*.nothing"}, 1, "holds or matches no image"),
        ({"images": "."}, 1, "holds or matches no image"),
        ({"images": ""}, 1, ""),
        ({"--threads": "0"}, 2, "--threads 0: expected 1 or more"),
        ({"--workers": "2"}, 2, "--workers has no effect without --ray"),
        ({"--image-column": "c"}, 2, "--image-column has no effect without --ray"),
        ({"--overlap": "8"}, 2, "--overlap has no effect without --tile"),
        ({"--ray": "x", "--overlap": "8"}, 2, "--overlap has no effect without --tile"),
        ({"--ray": "x", "--opacity": "0.3"}, 2, "--opacity has no effect with --ray"),
        ({"--ray": "x", "--name-column": "c"}, 2, "--name-column has no effect without a table"),
        ({"--tile": "16", "--overlap": "9"}, 2, "overlap is 9 pixels, expected 0 to 8"),
        ({"--tile": "16385"}, 2, "--tile 16385: expected at most 16384 pixels"),
    ],
)
def test_bad_arguments(change, status, message, color_onnx, tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    options = {"images": "../a.png", "--model": str(color_onnx), "--out": str(tmp_path / "out"), **change}
    images = options.pop("images")
    got, _, errors = call(predict, capsys, images, *(part for option in options.items() for part in option))
    assert got == status
    assert message in errors
    assert len(errors.splitlines()) <= 2
    assert not list((tmp_path / "out").glob("*.png")) if (tmp_path / "out").exists() else True


def test_out_is_a_file(folder, color_onnx, capsys):
    status, _, errors = call(predict, capsys, folder, "--model", color_onnx, "--out", folder / "a.png")
    assert status == 1
    assert "expected a folder" in errors


def test_killed_in_the_middle_leaves_only_whole_files(tmp_path, color_onnx):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for index in range(400):
        Image.fromarray(noise).save(folder / f"{index:03}.bmp")
    code = "from wsss_deploy.cli.predict import main; main()"
    command = [sys.executable, "-c", code, folder, "--model", color_onnx, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("*_overlay.png")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    written = sorted(out.glob("*.png"))
    assert 0 < len(written) < 800
    for file in written:
        Image.open(file).load()
    assert not (out / "predictions.json").exists()


def test_output_names(tmp_path):
    names = output_names([Path(name) for name in ("x/a.jpg", "x/b.jpg", "x/b.png", "y/c.png", "z/c.png")])
    assert names == ["a", "b_jpg", "b_png", "y_c", "z_c"]
    awkward = ("y/c.png", "y/C.PNG", "y_c.gif", "y_c/x.png", "q/a_png.jpg", "q/a.png", "r/a.jpg")
    assert len({name.casefold() for name in output_names([Path(name) for name in awkward])}) == len(awkward)
    same = [Path(f"{top}/same/a.png") for top in "pqr"]
    assert len(set(output_names(same))) == 3
    long = output_names([Path("é" * 200 + ".png"), Path("é" * 200 + ".jpg")])
    assert len(set(long)) == 2
    assert all(len(name.encode()) < 230 for name in long)


def test_find_images(folder, tmp_path):
    nested = folder / "deeper"
    nested.mkdir()
    Image.new("L", (1, 1)).save(nested / "c.PNG")
    assert [path.name for path in find_images([folder])] == ["a.png", "b.png"]
    assert [path.name for path in find_images([f"{folder}/**"])] == ["a.png", "b.png", "c.PNG"]
    assert [path.name for path in find_images([folder / "b.png", folder, f"{folder}/*"])] == ["b.png", "a.png"]
    assert find_images([tmp_path / "absent.png"]) == [tmp_path / "absent.png"]
    bracket = folder / "d[1].png"
    Image.new("L", (1, 1)).save(bracket)
    assert find_images([bracket]) == [bracket]
    with pytest.raises(ImageError, match="no image"):
        find_images([f"{folder}/*.bmp"])


def test_doctor_alone(capsys):
    status, text, _ = call(doctor, capsys)
    assert status == 0
    assert "can run .onnx files: onnxruntime" in text
    status, text, _ = call(doctor, capsys, "--json")
    report = json.loads(text)
    assert status == 0
    assert report["runtimes"]["onnxruntime"]["available"]
    assert report["cpu_threads"] >= 1
    assert report["packages"]["numpy"] == np.__version__


def test_doctor_on_a_model(color_onnx, tmp_path, capsys):
    status, text, _ = call(doctor, capsys, color_onnx, "--device", "cpu")
    assert status == 0
    assert "model colour: test_vit, 3 classes: red, green, blue" in text
    assert "ran in onnxruntime" in text
    assert "on CPUExecutionProvider" in text
    report = json.loads(call(doctor, capsys, color_onnx, "--json", "--device", "cpu")[1])
    assert report["model"]["ran"]["providers"] == ["CPUExecutionProvider"]
    status, _, errors = call(doctor, capsys, tmp_path / "absent.onnx")
    assert status == 1
    assert "no such model file" in errors


def test_doctor_without_any_runtime():
    """In a process in which neither runtime can be found, as after the base install."""
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name in ('torch', 'timm', 'onnxruntime') else find(name)\n"
        "for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'scipy', 'yaml'):\n    sys.modules[name] = None\n"
        "from wsss_deploy.cli.doctor import main; main([])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "cannot run .onnx files: onnxruntime not installed; pip install 'wsss-deploy[cpu]'" in run.stdout
    assert "cannot run .pt files: torch and timm not installed" in run.stdout


BROKEN = {
    "onnxruntime": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "torch": "raise OSError('libtorch_cuda.so: cannot open shared object file')",
    "tensorrt": "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_runtime_that_is_installed_and_does_not_load(name, folder, tmp_path, color_onnx, tiny_model):
    (tmp_path / "fake" / name).mkdir(parents=True)
    (tmp_path / "fake" / name / "__init__.py").write_text(BROKEN[name])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "fake")}

    def ran(command, *arguments):
        code = f"from wsss_deploy.cli.{command} import main; main()"
        line = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)

    told = ran("doctor", "--json")
    assert told.returncode == 0, told.stderr
    runtimes = json.loads(told.stdout)["runtimes"]
    for other, found in runtimes.items():
        assert other != name or not found["available"]
    assert runtimes["onnxruntime"]["available"] == (name != "onnxruntime")
    if name != "tensorrt":  # of which the missing driver is told first
        assert "cannot open shared object file" in runtimes[name]["reason"]
        model = tiny_model if name == "torch" else color_onnx
        told = ran("predict", folder, "--model", model, "--out", tmp_path / "out")
        assert told.returncode == 1
        assert f"wsss-predict: {name} is installed, but cannot be loaded (lib" in told.stderr
        assert len(told.stderr.splitlines()) == 1


def test_tensorrt_without_a_driver_cannot_run(tmp_path, monkeypatch):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a driver")
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("__version__ = '11.4'")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._inspect_runtime(".engine", "tensorrt")
    assert not found["available"]
    assert "needs an NVIDIA driver, which is not here" in found["reason"]


def test_class_names_that_no_card_may_have_are_no_defect(color_card, capsys):
    def command(arguments):
        ModelCard.model_validate({**color_card.model_dump(), "classes": ("a", "\x1b[2J")})

    with pytest.raises(SystemExit) as ended:
        run_command(ArgumentParser("wsss-train", ""), command, [])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "wsss-train: the model's card cannot be made: classes.1: Value error, '\\x1b[2J' holds control" in told
    assert "defect" not in told
    assert "at least 2" not in told
