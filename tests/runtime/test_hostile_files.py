"""Damaged and hostile model files: always one clear error, never another exception, never a file read outside."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card
from wsss_deploy.card import ModelCard
from wsss_deploy.cli.doctor import main
from wsss_deploy.cli.file_checks import check_file
from wsss_deploy.engine_manifest import EngineManifest, manifest_path
from wsss_deploy.errors import ArtifactError, WsssError
from wsss_deploy.onnx_check import check_onnx

onnx = pytest.importorskip("onnx")
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def model(onnx_bytes, color_card):
    return onnx.load_from_string(onnx_bytes(color_card))


def saved(model, folder):
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def outside(model, location, **entries):
    tensor = model.graph.initializer.add(name="gain2", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


LOCATIONS = ["/etc/passwd", "../secret", "a/../../secret", "..\\secret", "C:\\secret", "", ".", "link", "a\0b"]


@pytest.mark.parametrize("location", [*LOCATIONS, "*/_ORT_MEM_ADDR_/*"])
def test_data_outside_of_the_folder_is_refused(model, tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "in"
    folder.mkdir()
    os.symlink(tmp_path / "secret", folder / "link")
    outside(model, location)
    path = saved(model, folder)
    with pytest.raises(ArtifactError, match=r"outside of the model's folder|damaged"):
        Segmenter(path, device="cpu")


def test_data_inside_of_the_folder_has_to_be_there(model, tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(16))
    outside(model, "data.bin", offset=0, length=16)
    check_onnx(saved(model, tmp_path))
    (tmp_path / "data.bin").write_bytes(bytes(15))
    with pytest.raises(ArtifactError, match="is cut short"):
        check_onnx(saved(model, tmp_path))
    (tmp_path / "data.bin").unlink()
    with pytest.raises(ArtifactError, match="cannot be used"):
        check_onnx(saved(model, tmp_path))


@pytest.mark.parametrize("dims", [[2**40], [2**31, 2**31], [-1], [10**6] * 8])
@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_tensors_that_declare_more_than_there_is(model, tmp_path, dims, where):
    tensor = onnx.TensorProto(name="huge", data_type=onnx.TensorProto.FLOAT, dims=dims, raw_data=bytes(4))
    if where == "initializer":
        model.graph.initializer.append(tensor)
    else:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["huge"], value=tensor))
    with pytest.raises(ArtifactError, match="tensor 'huge' declares"):
        Segmenter(saved(model, tmp_path), device="cpu")


@pytest.mark.parametrize("kind", ["STRING", "FLOAT8E4M3FN", "INT4", "FLOAT4E2M1"])
def test_types_of_few_bits_and_strings_are_counted(model, tmp_path, kind):
    tensor = onnx.TensorProto(name="huge", data_type=getattr(onnx.TensorProto, kind), dims=[2**34])
    if kind != "STRING":
        tensor.raw_data = bytes(16)
    model.graph.initializer.append(tensor)
    with pytest.raises(ArtifactError, match="tensor 'huge' declares"):
        check_onnx(saved(model, tmp_path))


def test_tensors_of_few_bits_and_strings_that_are_whole(model, tmp_path):
    onnx_types = onnx.TensorProto
    for kind, content in ((onnx_types.INT4, {"raw_data": bytes(2)}), (onnx_types.FLOAT8E5M2, {"raw_data": bytes(3)})):
        model.graph.initializer.append(onnx.TensorProto(name=str(kind), data_type=kind, dims=[3], **content))
    texts = onnx_types(name="texts", data_type=onnx_types.STRING, dims=[2], string_data=[b"a", b""])
    model.graph.initializer.append(texts)
    check_onnx(saved(model, tmp_path))


def test_a_name_that_hides_its_end(model, tmp_path):
    outside(model, "./" * 2045 + "model.onnx/../../secret")
    with pytest.raises(ArtifactError, match="a name of 4113 bytes"):
        check_onnx(saved(model, tmp_path))


def number(value):
    """A number as protobuf writes it."""
    low = bytes([value & 127 | (128 if value > 127 else 0)])
    return low + (number(value >> 7) if value > 127 else b"")


def part(field, content):
    """A field of bytes."""
    return number(field << 3 | 2) + number(len(content)) + content


LOCATION = part(1, b"location") + part(2, b"../secret")
# What a lenient reader takes for the location, and a strict one for something else.
DISGUISES = {
    "the key once more, as a number": part(13, LOCATION + b"\x08x"),
    "the key once more, of eight bytes": part(13, LOCATION + b"\x09location"),
    "the key once more": part(13, LOCATION + part(1, b"checksum")),
    "the key once more, before the value": part(13, part(1, b"checksum") + LOCATION),
    "the value once more": part(13, LOCATION + part(2, b"data.bin")),
    "the location once more": part(13, LOCATION) + part(13, part(1, b"location") + part(2, b"data.bin")),
    "of a number too large for a reader": number((13 << 3 | 2) + (1 << 32)) + number(len(LOCATION)) + LOCATION,
    "an entry of eight bytes": number(13 << 3 | 1) + bytes(8) + part(13, LOCATION),
    "raw data twice": part(9, bytes(16)) + part(9, bytes(16)),
    "a type of four bytes": number(2 << 3 | 5) + bytes(4),
    "a type twice": part(9, bytes(16)) + b"\x10\x01" * 2,
    "a type of more than 64 bits": part(9, bytes(16)) + b"\x10\x81" + b"\x80" * 8 + b"\x02",
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_fields_that_readers_could_take_differently(model, tmp_path, disguise):
    (tmp_path / "data.bin").write_bytes(bytes(16))
    tensor = part(8, b"gain2") + b"\x08\x04" + (b"" if "type" in disguise else b"\x10\x01") + DISGUISES[disguise]
    graph = model.graph.SerializeToString() + part(5, tensor)
    model.ClearField("graph")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString() + part(7, graph))
    with pytest.raises(ArtifactError, match=r"is no ONNX model, or a damaged one"):
        check_onnx(path)


def test_two_graphs_that_a_reader_would_merge(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString() + part(7, part(1, part(4, b"Neg"))))
    with pytest.raises(ArtifactError, match="field 7 comes twice"):
        check_onnx(path)


def test_packed_sides_are_read(model, tmp_path):
    tensor = part(1, number(2) + number(300)) + b"\x10\x01" + part(9, bytes(8))
    graph = model.graph.SerializeToString() + part(5, tensor)
    model.ClearField("graph")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString() + part(7, graph))
    with pytest.raises(ArtifactError, match="declares 2 x 300 elements"):
        check_onnx(path)


@pytest.mark.parametrize("offset", ["-0", "1_0", " 0", "0x0", ""])
def test_offsets_are_plain_numbers(model, tmp_path, offset):
    (tmp_path / "data.bin").write_bytes(bytes(64))
    outside(model, "data.bin", offset=offset)
    with pytest.raises(ArtifactError, match="is no plain number"):
        check_onnx(saved(model, tmp_path))


@pytest.mark.parametrize("where", ["graph", "attribute"])
def test_sparse_tensors_are_refused(model, tmp_path, where):
    values = onnx.TensorProto(name="few", data_type=onnx.TensorProto.FLOAT, dims=[1], raw_data=bytes(4))
    indices = onnx.TensorProto(data_type=onnx.TensorProto.INT64, dims=[1], raw_data=bytes(8))
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[2**34])
    if where == "graph":
        model.graph.sparse_initializer.append(sparse)
    else:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["few"], sparse_value=sparse))
    with pytest.raises(ArtifactError, match="holds a sparse tensor"):
        check_onnx(saved(model, tmp_path))


def add_function(model, name, called):
    function = model.functions.add(name=name, domain="local", input=["x"], output=["y"])
    function.opset_import.extend([onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("local", 1)])
    names = ["x", *(f"m{index}" for index in range(len(called) - 1)), "y"]
    for operator, before, after in zip(called, names, names[1:], strict=False):
        domain = "local" if operator.startswith("F") else ""
        function.node.append(onnx.helper.make_node(operator, [before], [after], domain=domain))
    return function


def call(model, name):
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    model.graph.node.insert(0, onnx.helper.make_node(name, ["image"], ["z"], domain="local"))


def test_functions_that_double_at_every_call(model, tmp_path):
    add_function(model, "F0", ["Neg"])
    for index in range(1, 30):
        add_function(model, f"F{index}", [f"F{index - 1}"] * 2)
    call(model, "F10")  # a thousand operators are a model
    check_onnx(saved(model, tmp_path))
    model.graph.node[0].op_type = "F29"
    with pytest.raises(ArtifactError, match="more than 1,000,000 operators"):
        check_onnx(saved(model, tmp_path))


@pytest.mark.parametrize("length", [1, 2, 5000])
def test_functions_that_call_one_another_without_end(model, tmp_path, length):
    for index in range(length):
        add_function(model, f"F{index}", [f"F{(index + 1) % length}"])
    call(model, "F0")
    with pytest.raises(ArtifactError, match="without end"):
        check_onnx(saved(model, tmp_path))


def test_defaults_of_functions_are_checked(model, tmp_path):
    tensor = onnx.TensorProto(name="huge", data_type=onnx.TensorProto.FLOAT, dims=[2**40], raw_data=bytes(4))
    function = add_function(model, "F", ["Neg"])
    function.attribute_proto.append(onnx.helper.make_attribute("value", tensor))
    with pytest.raises(ArtifactError, match="tensor 'huge' declares"):
        check_onnx(saved(model, tmp_path))


def test_operators_of_unknown_domains(model, tmp_path):
    model.graph.node.append(onnx.helper.make_node("Run", ["image"], ["y"], domain="com.example"))
    with pytest.raises(ArtifactError, match=r"needs the operator 'com\.example::Run'"):
        Segmenter(saved(model, tmp_path), device="cpu")


def test_unknown_standard_operators(model, tmp_path):
    model.graph.node.append(onnx.helper.make_node("Nonsense", ["image"], ["y"]))
    with pytest.raises(ArtifactError, match="needs the operator 'Nonsense', which is not among those of an export"):
        Segmenter(saved(model, tmp_path), device="cpu")


def endless(operator):
    """A node whose body hands on its condition; as a loop it goes on for 2**63 - 1 rounds."""
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [value("i", onnx.TensorProto.INT64, []), value("c", onnx.TensorProto.BOOL, [])],
        [value("d", onnx.TensorProto.BOOL, [])],
    )
    return onnx.helper.make_node(operator, ["", ""], [], body=body)


@pytest.mark.parametrize("where", ["graph", "function"])
@pytest.mark.parametrize("domain", ["", "ai.onnx"])
@pytest.mark.parametrize("operator", ["Loop", "Scan", "If", "SequenceMap", "RandomUniform"])
def test_operators_that_repeat_branch_or_draw_numbers(model, tmp_path, operator, domain, where):
    node = endless(operator)
    node.domain = domain
    if where == "graph":
        model.graph.node.append(node)
    else:
        add_function(model, "F", ["Neg"]).node.append(node)
        call(model, "F")
    with pytest.raises(ArtifactError, match=f"needs the operator '{operator}', which is not among those of an export"):
        Segmenter(saved(model, tmp_path), device="cpu")


def test_sizes_made_while_the_graph_runs_are_not_limited(model, tmp_path):
    node = onnx.helper.make_node
    model.graph.node.extend(
        [
            node("Shape", ["image"], ["shape"]),
            node("ConstantOfShape", ["shape"], ["zeros"]),
            node("Tile", ["zeros", "shape"], ["tiled"]),
            node("ReduceLogSumExp", ["tiled"], ["reduced"]),
        ]
    )
    check_onnx(saved(model, tmp_path))


def test_graphs_inside_of_operators(model, tmp_path):
    model.graph.node.append(endless("Identity"))
    with pytest.raises(ArtifactError, match="a graph inside of an operator"):
        check_onnx(saved(model, tmp_path))


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
def test_functions_with_the_name_of_an_operator_of_the_runtime(model, tmp_path, domain):
    add_function(model, "Loop", ["Neg"]).domain = domain
    with pytest.raises(ArtifactError, match=f"function '{domain}::Loop' with the name of a runtime's own operator"):
        check_onnx(saved(model, tmp_path))


def refusal(reader, *arguments):
    """The message of a refusal, or None; any other exception is the test's failure."""
    try:
        reader(*arguments)
    except ArtifactError as error:
        return str(error)
    return None


changes = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=12), st.integers(0, 12)), min_size=1, max_size=4)


def changed(content, edits):
    for position, inserted, dropped in edits:
        position %= len(content) + 1
        content = content[:position] + inserted + content[position + dropped :]
    return content


@FUZZ
@given(edits=changes)
def test_fuzzed_onnx(onnx_bytes, color_card, tmp_path, edits):
    path = tmp_path / "model.onnx"
    path.write_bytes(changed(onnx_bytes(color_card), edits))
    for reader in (read_card, check_onnx):
        assert str(path) in (refusal(reader, path) or str(path))


@FUZZ
@given(edits=changes)
def test_fuzzed_torch_files(tiny_model, tmp_path, edits):
    path = tmp_path / "model.pt"
    path.write_bytes(changed(tiny_model.read_bytes(), edits))
    assert str(path) in (refusal(read_card, path) or str(path))


def manifest_of(card):
    return EngineManifest(
        tensorrt="11.4.0",
        gpu="G",
        compute_capability="9.0",
        shapes=((1, 1, 1), (1, 64, 64), (4, 128, 128)),
        engine_sha256="0" * 64,
        onnx_sha256="0" * 64,
        command="wsss-export",
        card=card,
    )


@FUZZ
@given(edits=changes)
def test_fuzzed_manifests(color_card, tmp_path, edits):
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    manifest_path(path).write_bytes(changed(manifest_of(color_card).model_dump_json().encode(), edits))
    assert str(path) in (refusal(read_card, path) or str(path))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(key=st.sampled_from(sorted(ModelCard.model_fields)), value=values)
def test_fuzzed_cards(color_card, key, value):
    content = {**color_card.to_plain(), key: value}
    message = refusal(ModelCard.from_plain, content, "the file")
    if message is not None:
        assert message.startswith("the file: its model card cannot be used")
    else:
        card = ModelCard.from_plain(content, "the file")
        assert ModelCard.from_plain(card.to_json(), "again") == card


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "\ud800", "null", ""])
def test_cards_that_break_parsers(text):
    with pytest.raises(ArtifactError):
        ModelCard.from_plain(text, "the file")


PROTOCOL = {
    "supervision": ["points"],
    "method": "dfr",
    "data": "d",
    "train_images": 1,
    "iterations": 1,
    "batch_size": 1,
}
PROTOCOL |= {"size": 64, "seed": 0, "weights": "none", "selection": "last"}


@pytest.mark.parametrize(
    "text", ["\x1b[2Jroad", "a\nb", "a\rb", "\x9b31m", "tab\there", "\u202edaor", "a\u2028b", "\x7f"]
)
@pytest.mark.parametrize("place", ["name", "classes", "encoder", "data", "notes", "metrics", "versions", "supervision"])
def test_texts_of_cards_do_nothing_to_a_terminal(color_card, place, text):
    content = {**color_card.to_plain(), "protocol": dict(PROTOCOL)}
    assert ModelCard.from_plain(content, "the file").protocol.data == "d"
    changes = {"name": {"name": text}, "classes": {"classes": ["a", "b", text]}, "versions": {"versions": {"x": text}}}
    changes["encoder"] = {"architecture": {"encoder": text}}
    in_protocol = {"data": {"data": text}, "notes": {"notes": {"n": text}}, "metrics": {"metrics": {text: 1.0}}}
    in_protocol["supervision"] = {"supervision": [text]}
    content |= changes.get(place, {"protocol": {**PROTOCOL, **in_protocol.get(place, {})}})
    message = refusal(ModelCard.from_plain, content, "the file")
    assert message is not None
    assert "control characters" in message
    assert message.isprintable()


@pytest.mark.parametrize("change", [{"name": ""}, {"classes": ["a", "", "c"]}, {"classes": ["a", " ", "c"]}])
def test_names_that_are_empty(color_card, change):
    with pytest.raises(ArtifactError, match="is empty, expected a name"):
        ModelCard.from_plain({**color_card.to_plain(), **change}, "the file")


def test_names_of_all_languages(color_card):
    classes = ["Straße", "می‌خواهم", "道路"]  # the second has a joiner, which is no control character
    assert ModelCard.from_plain({**color_card.to_plain(), "classes": classes}, "x").classes == tuple(classes)


def test_what_a_hostile_file_is_called_does_nothing_to_a_terminal(model, tmp_path, capsys):
    model.graph.node.append(onnx.helper.make_node("\x1b[2J\x9bRun", ["image"], ["y"]))
    path = saved(model, tmp_path)
    assert doctor(path, "--device", "cpu") == 1
    told = "".join(capsys.readouterr())
    assert r"\x1b[2J\x9bRun" in told
    assert not {"\x1b", "\x9b"} & set(told)


@pytest.mark.parametrize("change", [{"mean": [float("nan")] * 3}, {"mean": [1e300] * 3}, {"std": [1e-300] * 3}])
def test_normalisation_that_is_no_number(color_card, change):
    content = color_card.to_plain()
    content["preprocessing"] |= change
    with pytest.raises(ArtifactError, match=f"preprocessing.{next(iter(change))}"):
        ModelCard.from_plain(content, "the file")


def test_encoder_options_load_no_files():
    networks = pytest.importorskip("wsss_deploy.networks")
    with pytest.raises(WsssError, match="checkpoint_path: weights are not loaded by options"):
        networks.encoder_preprocessing("test_vit", {"checkpoint_path": "/etc/passwd"})


def doctor(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code


def test_doctor_checks_files(tiny_onnx, tiny_model, tmp_path, capsys):
    assert doctor(tiny_onnx, "--device", "cpu", "--json") == 0
    checks = {item["name"]: item for item in json.loads(capsys.readouterr().out)["file"]}
    assert [checks[name]["passed"] for name in ("card", "content", "parity")] == [True, True, True]
    assert doctor(tiny_model, "--device", "cpu") == 0
    assert "tensors" in capsys.readouterr().out
    other = tmp_path / "model.onnx"
    other.write_bytes(tiny_onnx.read_bytes())
    (tmp_path / "parity.json").write_text(
        (tiny_onnx.parent / "parity.json").read_text().replace('sha256": "', 'sha256": "0')
    )
    assert doctor(other, "--device", "cpu") == 1
    assert "speaks of another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        *({"final_agreement": value} for value in ("abc", None, True, float("nan"), float("inf"), -0.1, 1.1, [1])),
        *({"verdict": value} for value in (["passed"], True, None)),
        {"model_sha256": 3},
    ],
)
def test_doctor_and_a_damaged_report(tiny_onnx, tmp_path, change):
    model = tmp_path / "model.onnx"
    model.write_bytes(tiny_onnx.read_bytes())
    content = json.loads((tiny_onnx.parent / "parity.json").read_text())
    (tmp_path / "parity.json").write_text(json.dumps({**content, **change}))
    (parity,) = (item for item in check_file(str(model)) if item.name == "parity")
    assert not parity.passed
    assert "export again" in parity.detail


def test_doctor_checks_engines_without_a_gpu(color_card, tmp_path, capsys):
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    manifest_path(path).write_text(manifest_of(color_card).model_dump_json())
    assert doctor(path) == 1
    told = capsys.readouterr()
    assert "ok card: colour, 3 classes" in told.out
    assert "is not the engine that its manifest speaks of" in told.err


def test_every_score_of_a_checked_file_is_computed(color_onnx):
    image = np.zeros((8, 8, 3), np.uint8)
    assert Segmenter(color_onnx, device="cpu", threads=1).predict(image).mask.shape == (8, 8)
