"""`model.pt` to one ONNX graph: bytes of an image in, probabilities and class ids out, any batch, height and width."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import timm
import torch
from torch.export import Dim

from export.antialias import write_out_antialiased
from export.byte_edges import cast_bytes_at_the_edges
from export.fixed_size import with_fixed_size
from export.half import to_half
from export.onnx_functions import attach_functions, translation_table
from export.parity import REPORT_FAILED, THRESHOLDS, check_parity
from export.quantise import FEWEST, LADDER, quantise, split_images
from export.scratch import replace_together, scratch_folder, write_synced
from wsss_deploy import __version__
from wsss_deploy.artifact import CARD_KEY, load_model, report_name
from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.errors import ExportError, ParityError
from wsss_deploy.files import atomic_write
from wsss_deploy.networks import DeployedNetwork, RefinedNetwork, restore_network
from wsss_deploy.onnx_check import OPERATORS, STANDARD
from wsss_deploy.refinement import DEFAULT

OPSETS = range(18, 24)
#: Name of the file by precision.
MODELS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
# A protobuf message, which an ONNX file is, holds less than 2 GiB; some of that is for the graph itself.
_MOST_BYTES = 2**31 - 2**26
_REMEDY = {
    "fp32": "try another --opset",
    "fp16": "use --precision fp32",
    "int8": "calibrate on more images like those to be segmented, or use --precision fp16 or fp32",
}
_LOUD = ("torch", "onnx", "onnxscript", "onnx_ir")

_log = logging.getLogger(__name__)


def export_onnx(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    opset: int = 20,
    images: Sequence[Path] = (),
    refine: bool = False,
    size: int | None = None,
    precision: str = "fp32",
    data: tuple[Path, str] | None = None,
) -> Path:
    """Export a `model.pt` and prove that the result agrees with torch.

    The file is written into a hidden folder inside `out` and takes its name only after it has passed; `parity.json`
    (`parity.fp16.json`, `parity.int8.json`) beside it names its digest. When anything fails, an older file there stays
    as it was, together with its own report; the report of the failure is `parity_failed.json`. Of int8, the fastest
    form that passes is taken.

    Args:
        model: The `model.pt`.
        out: Folder for the files; made if absent.
        opset: ONNX opset, one of `OPSETS`.
        images: Real images for the parity check; it always runs on procedural ones, too. int8 is calibrated on some
            of them and judged on others, where there are enough.
        refine: Put the card's refinement (or else the package's) into the graph, for runtimes other than ours. Without
            it `Segmenter` refines as the card says, with the compiled operator, many times faster.
        size: The graph pads images to this many pixels a side and takes no larger ones; None leaves the size open where
            the encoder allows it; where it does not, it is the card's window, or else its working size (at most
            `FIXED_SIZE`).
        precision: "fp32", "fp16" (`export.half`) or "int8" (`export.quantise`, calibrated on `images`).
        data: Folder with masks and its split, on which the mIoU must not fall.

    Returns:
        The path of the file, see `MODELS`.

    Raises:
        ArtifactError: The model file cannot be used.
        ExportError: torch cannot export the network, or the folder cannot be written.
        ParityError: The exported graph gives other results than torch.
    """
    source, folder = Path(model), Path(out)
    card, state_dict = load_model(source)
    _log.info("Exporting %s (%s) at opset %d", source.name, card.architecture.encoder, opset)
    name = MODELS[precision]
    calibration, judged = split_images(images) if precision == "int8" else ((), images)
    if precision == "int8" and len(images) < FEWEST:
        _log.warning(
            "int8 is judged on the images that it is calibrated on; give %d or more to keep some apart", FEWEST
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Before the slow part, so that a folder that cannot be written is told at once.
        with scratch_folder(folder, ".export-") as scratch:
            candidate = scratch / name
            proto = build_graph(card, state_dict, opset, source.name, refine=refine, size=size)
            for form in _forms(proto, precision, calibration):
                onnx.save(form, candidate)
                _log.info("Checking it against torch")
                report = check_parity(source, candidate, judged, THRESHOLDS[precision], data)
                if report.passed:
                    break
            if not report.passed:
                with atomic_write(folder / REPORT_FAILED) as file:
                    file.write(report.to_json().encode())
                raise ParityError(
                    f"{source}: the exported graph gives other results than torch: {_some(report.problems)}; nothing "
                    f"was exported, the figures are in {folder / REPORT_FAILED}; {_REMEDY[precision]}"
                )
            # The report names the digest of its model, so that a kill in between cannot deceive.
            written = scratch / report_name(name)
            write_synced(written, report.to_json().encode())
            replace_together((written, folder / written.name), (candidate, folder / name))
            (folder / REPORT_FAILED).unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(
            f"{folder}: cannot be written ({error.strerror or error}); choose a writable --out with free space"
        ) from error
    return folder / name


def _forms(proto: onnx.ModelProto, precision: str, images: Sequence[Path]) -> Iterator[onnx.ModelProto]:
    """The graph in a precision; of int8, one form after the other, the fastest first."""
    if precision == "fp32":
        yield proto
        return
    card = ModelCard.from_plain({p.key: p.value for p in proto.metadata_props}[CARD_KEY], "the graph")
    card = card.model_copy(update={"precision": precision})
    for rung in range(1 if precision == "fp16" else len(LADDER)):
        form = to_half(proto) if precision == "fp16" else quantise(proto, card, images, rung)
        onnx.helper.set_model_props(form, {CARD_KEY: card.to_json()})
        yield form


def build_graph(
    card: ModelCard,
    state_dict: Mapping[str, torch.Tensor],
    opset: int,
    source: str,
    *,
    refine: bool = False,
    size: int | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a card and its tensors, checked by ONNX's own checker and free of traces of this machine.

    Args:
        card: The model's card; a copy with digests and versions travels in the metadata.
        state_dict: The network's tensors.
        opset: ONNX opset.
        source: Name of the file, for errors.
        refine: As in `export_onnx`.
        size: As in `export_onnx`.

    Raises:
        ArtifactError: The tensors do not fit the card.
        ExportError: torch cannot export the network, the result is too large for one file, or it has an operator that
            the runtime refuses in files.
    """
    weight = sum(tensor.nbytes for tensor in state_dict.values())
    if weight > _MOST_BYTES:
        raise ExportError(
            f"{source}: its tensors take {weight / 2**30:.1f} GiB, an ONNX file holds less than 2; use a smaller "
            "encoder"
        )
    card = with_fixed_size(card, size, source)
    network = restore_network(card, state_dict, source)
    refinement = None
    if refine:
        refinement = (card.refinement or DEFAULT).model_copy(update={"in_graph": True, "enabled": True})
    proto = _trace(DeployedNetwork(network, card.preprocessing).eval(), refinement, card, opset, source)
    _clean(proto, len(card.classes))
    card = card.model_copy(
        update={
            "refinement": refinement or card.refinement,
            "digests": {**card.digests, "state_dict": state_digest(state_dict)},
            "versions": {
                **card.versions,
                "export": __version__,
                "export_torch": torch.__version__,
                "export_timm": timm.__version__,
                "onnx": onnx.__version__,
                "onnx_ir": str(proto.ir_version),
                "onnx_opset": str(opset),
            },
        }
    )
    onnx.helper.set_model_props(proto, {CARD_KEY: card.to_json()})
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{source}: the exported graph is not valid ONNX ({_first_line(error)}); report this"
        ) from error
    _check_operators(proto, card.architecture.encoder, source)
    return proto


def state_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names.

    Args:
        state_dict: Tensors by name.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _trace(
    deployed: DeployedNetwork, refinement: Refinement | None, card: ModelCard, opset: int, source: str
) -> onnx.ModelProto:
    module = deployed if refinement is None else RefinedNetwork(deployed, refinement)
    # Sides that are no multiples of the stride and differ from one another, so that the trace sees nothing special.
    stride = card.preprocessing.stride
    largest = card.preprocessing.fixed_size or 4 * stride
    height, width = min(2 * stride + 5, largest - 1), min(3 * stride + 1, largest)
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    anything = {axis: Dim.DYNAMIC for axis in (0, 1, 2)}
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes={"image": anything},
                input_names=["image"],
                output_names=["scores", "mask"],
                custom_translation_table=None if refinement is None else translation_table(),
                verbose=False,
            )
    except Exception as error:  # the exporter lets errors of many libraries through
        raise ExportError(
            f"{source}: torch cannot export encoder '{card.architecture.encoder}' at opset {opset} "
            f"({type(error).__name__}: {_first_line(error)}); try another --opset, or --debug for the details"
        ) from error
    assert program is not None  # it is None only for the exporter before dynamo
    proto: onnx.ModelProto = program.model_proto
    write_out_antialiased(proto)
    cast_bytes_at_the_edges(proto)
    if refinement is not None:
        attach_functions(proto, refinement.parameters)
    return proto


def _clean(proto: onnx.ModelProto, num_classes: int) -> None:
    """Give the dimensions their names and drop what the exporter notes about the code and the machine it ran on."""
    graph = proto.graph
    types, shape = onnx.TensorProto, ("batch", "height", "width")
    inputs = [onnx.helper.make_tensor_value_info("image", types.UINT8, [*shape, 3])]
    outputs = [
        onnx.helper.make_tensor_value_info("scores", types.FLOAT, ["batch", num_classes, "height", "width"]),
        onnx.helper.make_tensor_value_info("mask", types.UINT8, shape),
    ]
    for ports, clean in ((graph.input, inputs), (graph.output, outputs)):
        del ports[:]
        ports.extend(clean)
    del graph.value_info[:]
    for holder in (proto, graph, *graph.node, *graph.initializer, *proto.functions):
        holder.doc_string = ""
        del holder.metadata_props[:]
    graph.name = "wsss_deploy"
    proto.producer_name, proto.producer_version = "wsss-deploy", __version__


def _check_operators(proto: onnx.ModelProto, encoder: str, source: str) -> None:
    """Say now, and of the encoder, what opening the file would say of an operator."""
    ours = {(function.domain, function.name) for function in proto.functions}
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        standard = node.domain in STANDARD
        if (standard and node.op_type not in OPERATORS) or not (standard or (node.domain, node.op_type) in ours):
            name = node.op_type if standard else f"{node.domain}::{node.op_type}"
            raise ExportError(
                f"{source}: encoder '{encoder}' needs the operator '{name}', which Segmenter refuses in ONNX files "
                "(wsss_deploy/onnx_check.py); use another encoder, try another --opset, or report this"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and warnings, unless debug messages were asked for."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        yield
        return
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _some(problems: Sequence[str]) -> str:
    return "; ".join(problems[:2]) + (f"; and {len(problems) - 2} more" if len(problems) > 2 else "")
