from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest

from wsss_deploy.artifact import load_model, read_card, save_model
from wsss_deploy.errors import ArtifactError, WsssError
from wsss_deploy.files import atomic_write

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)


def test_model_comes_back_as_it_was(tmp_path, color_card):
    whole = torch.arange(1000.0)
    tensors = {"a.weight": whole[:4].view(2, 2), "b": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    tensors["gradient"] = torch.nn.Parameter(torch.zeros(3))
    path = tmp_path / "new folder" / "model.pt"
    save_model(path, color_card, tensors)
    card, loaded = load_model(path)
    assert card == read_card(path) == color_card
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert path.stat().st_size < 8000  # the view's thousand neighbours stayed behind
    assert os.listdir(path.parent) == ["model.pt"]


def test_cards_are_read_without_torch_or_onnxruntime(tmp_path, color_card, color_onnx):
    path = tmp_path / "model.pt"
    save_model(path, color_card, OrderedDict(weight=torch.zeros(2, 3)))
    code = (
        "import sys\nfrom wsss_deploy.artifact import read_card\n"
        "for path in sys.argv[1:]:\n    print(read_card(path).name)\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, path, color_onnx], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["colour", "colour"], run.stderr


def test_state_dict_saved_by_torch_with_metadata_is_read(tmp_path, color_card):
    state_dict = torch.nn.BatchNorm2d(3).state_dict()  # an OrderedDict with _metadata
    path = tmp_path / "model.pt"
    torch.save({"format": "wsss-deploy", "card": color_card.to_plain(), "state_dict": state_dict}, path)
    assert read_card(path) == color_card
    assert load_model(path)[1].keys() == state_dict.keys()


class Attack:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_malicious_pickles_are_refused_and_do_nothing(tmp_path, color_card):
    target = tmp_path / "owned"
    bad = tmp_path / "model.pt"
    for content in (
        Attack(target),
        {"format": "wsss-deploy", "card": color_card.to_plain(), "state_dict": {"weight": Attack(target)}},
    ):
        torch.save(content, bad)
        for read in (read_card, load_model):
            with pytest.raises(ArtifactError, match=r"model\.pt: refused, because loading it would run .*open"):
                read(bad)
    bad.write_bytes(pickle.dumps(Attack(target)))
    with pytest.raises(ArtifactError, match="not a zip file"):
        load_model(bad)
    assert not target.exists()


def test_torch_itself_loads_weights_only(tmp_path, color_card, monkeypatch):
    # Were the first check to miss something, torch.load must still be the safe kind.
    from wsss_deploy import artifact

    target, bad = tmp_path / "owned", tmp_path / "model.pt"
    torch.save(Attack(target), bad)
    monkeypatch.setattr(artifact, "read_card", lambda path: color_card)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(bad)
    assert not target.exists()


def test_a_training_state_is_told_from_files_of_other_origin(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "wsss-deploy-training-state", "module": {"weight": torch.zeros(2)}}, path)
    for read in (read_card, load_model):
        with pytest.raises(ArtifactError, match=r"checkpoint\.pt: is the training state of a run.*use the run's model"):
            read(path)
    torch.save({"format": "somebody's", "module": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(ArtifactError, match="other origin: found the keys format, module"):
        read_card(path)


def test_pickle_with_a_giant_memo_index_costs_no_memory(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02Nr\xff\xff\xff\xff.")  # None, LONG_BINPUT 2**32 - 1
    with pytest.raises(ArtifactError, match="other origin"):
        read_card(path)


def save_tiny(path, card):
    save_model(path, card, {"weight": torch.arange(5000.0), "bias": torch.ones(7)})
    return path.read_bytes()


def test_a_model_cut_short_is_refused(tmp_path, color_card, color_onnx):
    for path, content in (
        (tmp_path / "cut.pt", save_tiny(tmp_path / "whole.pt", color_card)),
        (tmp_path / "cut.onnx", color_onnx.read_bytes()),
    ):
        for length in (1, 3, 10, len(content) // 3, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(ArtifactError, match=path.name):
                read_card(path)


def test_damaged_tensors_are_noticed(tmp_path, color_card):
    path = tmp_path / "model.pt"
    content = bytearray(save_tiny(path, color_card))
    at = bytes(content).index(np.arange(5000, dtype=np.float32).tobytes()) + 4000
    content[at] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.pt.*(damaged|cannot be loaded)"):
        load_model(path)


def test_random_damage_never_escapes_as_another_error(tmp_path, color_card, color_onnx):
    for path, content, read in (
        (tmp_path / "fuzz.pt", save_tiny(tmp_path / "whole.pt", color_card), load_model),
        (tmp_path / "fuzz.onnx", color_onnx.read_bytes(), read_card),
    ):
        for round_number in range(150):
            damaged = bytearray(content)
            for position in RNG.integers(0, len(content), 1 + round_number % 20):
                damaged[position] = int(RNG.integers(256))
            path.write_bytes(damaged)
            with suppress(ArtifactError):  # anything else would escape
                read(path)


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_random_bytes_never_escape_as_another_error(tmp_path, suffix):
    path = tmp_path / f"random{suffix}"
    for start in (b"", b"PK\x03\x04", b"\x08\x08"):
        for length in range(1, 120, 3):
            path.write_bytes(start + RNG.bytes(length))
            with pytest.raises(ArtifactError, match="random"):
                read_card(path)


def test_foreign_files_say_what_is_missing(tmp_path, color_card):
    cases = []
    for name, content, expected in (
        ("weights.pt", {"layer.weight": torch.zeros(1)}, r"found the keys layer\.weight, expected format"),
        ("list.pt", [1, 2], "found a list"),
        ("half.pt", {"format": "wsss-deploy", "card": color_card.to_plain()}, "lacks state_dict"),
        ("card.pt", {"format": "wsss-deploy", "card": {"name": 3}, "state_dict": {}}, "classes: Field required"),
        ("new.pt", {"format": "wsss-deploy", "card": {**color_card.to_plain(), "format_version": 9}, "state_dict": {}},
         "format_version is 9, this release reads 1"),
    ):  # fmt: skip
        torch.save(content, tmp_path / name)
        cases.append((tmp_path / name, expected))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    cases.append((tmp_path / "zip.pt", "zip file without a model"))
    (tmp_path / "swapped.pt").write_bytes(b"\x08\x0a" + bytes(50))
    cases.append((tmp_path / "swapped.pt", "not a zip file"))
    (tmp_path / "empty.pt").touch()
    cases.append((tmp_path / "empty.pt", "is empty"))
    (tmp_path / "model.tflite").write_bytes(b"1234")
    cases.append((tmp_path / "model.tflite", r"'\.tflite', known are \.pt, \.onnx, \.engine"))
    cases.append((tmp_path, "is a folder"))
    cases.append((tmp_path / "absent.pt", "no such model file"))
    for path, expected in cases:
        for read in (read_card, load_model):
            with pytest.raises(ArtifactError, match=expected) as raised:
                read(path)
            assert str(path) in str(raised.value)


def test_foreign_onnx_models_say_what_is_missing(tmp_path, onnx_bytes, color_card):
    path = tmp_path / "other.onnx"
    path.write_bytes(onnx_bytes(None))
    with pytest.raises(ArtifactError, match="lacks the metadata entry 'wsss_card'"):
        read_card(path)
    save_tiny(tmp_path / "model.pt", color_card)
    (tmp_path / "model.pt").rename(tmp_path / "renamed.onnx")
    with pytest.raises(ArtifactError, match="no ONNX model"):
        read_card(tmp_path / "renamed.onnx")


def test_onnx_metadata_of_a_large_model_needs_no_reading_of_tensors(tmp_path, color_card, onnx_bytes):
    content = onnx_bytes(color_card)
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:  # a further field, number 20 of 3 GB, as a hole in the file, and then metadata
        length, varint = 3 * 2**30, bytearray()
        while length:
            varint.append(length & 0x7F | (0x80 if length > 0x7F else 0))
            length >>= 7
        file.write(b"\xa2\x01" + varint)
        file.seek(3 * 2**30, os.SEEK_CUR)
        file.write(content)
    assert read_card(path) == color_card


def test_load_model_refuses_onnx(color_onnx):
    with pytest.raises(ArtifactError, match=r"pass the model\.pt"):
        load_model(color_onnx)


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"new and half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_unwritable_places_are_clear_errors(tmp_path, color_card):
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt").mkdir()
    for path in (tmp_path / "file" / "model.pt", tmp_path / "folder.pt"):
        with pytest.raises(WsssError, match="cannot be written"):
            save_model(path, color_card, {"a": torch.zeros(1)})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.pt"]
