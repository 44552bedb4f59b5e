"""The pairwise operator as ONNX model-local functions of standard operators, domain `wsss`.

`torch.onnx.export` emits bare nodes `wsss::PairwiseAffinity` and `wsss::PairwiseStep` (`translation_table`);
`attach_functions` then gives the model their bodies, so that any ONNX runtime can run the file. (The exporter's
own functions would be inlined by its opset conversion.) The nodes carry `plugin_namespace` and `aot`, by which
TensorRT's parser prefers a plugin of that name, and `parameters`, the operator's parameters as JSON.

No tensor of size (N, C, K, H, W) occurs: a neighbour is a slice of the edge-padded input, sums run over offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from wsss_deploy.errors import ExportError
from wsss_deploy.pairwise import GaussianTerm, PairwiseParameters
from wsss_deploy.pairwise.parameters import gaussian_cut_off

DOMAIN = "wsss"
VERSION = 1
AFFINITY = "PairwiseAffinity"
STEP = "PairwiseStep"
_EPSILON = 1e-8
_LOWEST = -1e30
_CUT_OFF = gaussian_cut_off(4)


def register_schemas() -> None:
    """Tell ONNX the two operators' signatures, which the exporter's checks ask for; safe to call again."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == DOMAIN}
    schema = onnx.defs.OpSchema
    for name, inputs in ((AFFINITY, ("guide",)), (STEP, ("masks", "weights", "unary"))):
        if name in known:
            continue
        onnx.defs.register_schema(
            schema(
                name,
                DOMAIN,
                VERSION,
                inputs=[schema.FormalParameter(item, "T", param_option=_option(item)) for item in inputs],
                outputs=[schema.FormalParameter("out", "T")],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(double)"], "")],
                attributes=[
                    schema.Attribute("parameters", onnx.defs.OpSchema.AttrType.STRING, required=False),
                    schema.Attribute("plugin_namespace", onnx.defs.OpSchema.AttrType.STRING, required=False),
                    schema.Attribute("aot", onnx.defs.OpSchema.AttrType.INT, required=False),
                ],
            )
        )


def _option(name: str) -> Any:
    kinds = onnx.defs.OpSchema.FormalParameterOption
    return kinds.Optional if name == "unary" else kinds.Single


def translation_table() -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export(custom_translation_table=...)` needs to emit the two nodes."""
    import onnxscript
    import torch

    from wsss_deploy.pairwise import torch_ops  # noqa: F401 (defines the operators)

    register_schemas()
    opset = onnxscript.values.Opset(DOMAIN, VERSION)

    def affinity(guide: Any, parameters: str, form: str, threads: int) -> Any:
        return opset.PairwiseAffinity(guide, parameters=parameters, plugin_namespace=DOMAIN, aot=1)

    def step(masks: Any, weights: Any, unary: Any, parameters: str, form: str, threads: int) -> Any:
        if unary is not None:  # the plugin has no such form
            return opset.PairwiseStep(masks, weights, unary, parameters=parameters)
        return opset.PairwiseStep(masks, weights, parameters=parameters, plugin_namespace=DOMAIN, aot=1)

    ops = torch.ops.wsss
    return {ops.pairwise_affinity.default: affinity, ops.pairwise_step.default: step}


def attach_functions(model: onnx.ModelProto, parameters: PairwiseParameters) -> None:
    """Give the model the bodies of its pairwise nodes.

    Args:
        model: Exported with `translation_table`; changed in place.
        parameters: Those that all its pairwise nodes were exported with.

    Raises:
        ExportError: A node has other parameters: one model holds one refinement.
    """
    for node in model.graph.node:
        if node.domain == DOMAIN:
            found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            if found.get("parameters", b"").decode() != parameters.to_json():
                raise ExportError(
                    f"node {node.name} was exported with parameters {found.get('parameters')!r}, the "
                    f"functions are for {parameters.to_json()!r}; export one refinement a model"
                )
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    model.functions.extend([affinity_function(parameters, opset), step_function(parameters, opset)])
    if all(item.domain != DOMAIN for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))


class _Body:
    """Nodes of a function under construction; methods return the names of their results."""

    def __init__(self, parameters: PairwiseParameters) -> None:
        self.parameters = parameters
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        array = np.asarray(value, kind)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.add("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def total(self, names: list[str]) -> str:
        """A running sum, so that a runtime can free each term after it is added."""
        result = names[0]
        for name in names[1:]:
            result = self.add("Add", result, name)
        return result

    def pad(self, value: str, mode: str = "edge") -> str:
        reach = self.parameters.reach
        return self.add("Pad", value, self.integers(0, 0, reach, reach, 0, 0, reach, reach), mode=mode)

    def size_of(self, value: str) -> str:
        return self.add("Shape", value, start=2, end=4)

    def neighbour(self, padded: str, size: str, k: int) -> str:
        start = self.integers(*(self.parameters.reach + o for o in self.parameters.offsets[k]))
        return self.add("Slice", padded, start, self.add("Add", size, start), self.integers(2, 3))

    def function(self, name: str, inputs: list[str], opset: int) -> onnx.FunctionProto:
        imports = [helper.make_opsetid("", opset)]
        return helper.make_function(DOMAIN, name, inputs, ["out"], self.nodes, imports)


def step_function(parameters: PairwiseParameters, opset: int) -> onnx.FunctionProto:
    """The body of `PairwiseStep`: masks (N, C, H, W), weights (N, K, H, W) [, unary] to (N, C, H, W)."""
    body = _Body(parameters)
    padded, result = body.pad("masks"), ""
    for k in range(len(parameters.offsets)):
        weight = body.add("Slice", "weights", body.integers(k), body.integers(k + 1), body.integers(1))
        # The size is asked of the running sum: a runtime then cannot take all neighbours first and hold K of them.
        # (Where all sizes are fixed it may, as it then knows the answer.)
        size = body.size_of(result or "masks")
        product = body.add("Mul", body.neighbour(padded, size, k), weight)
        result = body.add("Add", result, product) if result else product
    if parameters.mean_field is None:
        body.add("Identity", result, out="out")
        return body.function(STEP, ["masks", "weights"], opset)
    scaled = body.add("Mul", result, body.constant(parameters.mean_field.compatibility))
    body.add("Softmax", body.add("Add", scaled, "unary"), out="out", axis=1)
    return body.function(STEP, ["masks", "weights", "unary"], opset)


def affinity_function(parameters: PairwiseParameters, opset: int) -> onnx.FunctionProto:
    """The body of `PairwiseAffinity`: guide (N, G, H, W) to (N, K, H, W)."""
    body = _Body(parameters)
    padded, size = body.pad("guide"), body.size_of("guide")
    if parameters.kind == "gaussian":
        _gaussian(body, padded, size)
        return body.function(AFFINITY, ["guide"], opset)
    count = len(parameters.offsets)
    # From the first neighbour on, so that the variance is exactly 0 where all are the same. Neighbours are taken anew
    # in each pass, of the size of what the pass before gave: a runtime then need not hold K of them.
    first = body.neighbour(padded, size, 0)
    total = body.total([body.add("Sub", body.neighbour(padded, size, k), first) for k in range(count)])
    mean = body.add("Div", total, body.constant(count))
    size, squares = body.size_of(mean), []
    for k in range(count):
        deviation = body.add("Sub", body.add("Sub", body.neighbour(padded, size, k), first), mean)
        squares.append(body.add("Mul", deviation, deviation))
    variance = body.add("Div", body.total(squares), body.constant(count - 1))
    deviation = body.add("Add", body.add("Sqrt", variance), body.constant(_EPSILON))
    divisor = body.add("Mul", deviation, body.constant(parameters.contrast))
    # A channel whose contrasts are all the same cancels in the softmax; see `reference.affinity`.
    flat = body.add("Equal", variance, body.constant(0))
    divisor = body.add("Where", flat, body.constant(np.inf), divisor)
    size, scores = body.size_of(divisor), []
    for k in range(count):
        difference = body.add("Sub", body.neighbour(padded, size, k), "guide")
        ratio = body.add("Div", difference, divisor)
        mean_square = body.add("ReduceMean", body.add("Mul", ratio, ratio), body.integers(1), keepdims=1)
        scores.append(body.add("Neg", mean_square))
    bounded = body.add("Max", body.add("Concat", *scores, axis=1), body.constant(_LOWEST))
    alpha = body.add("Softmax", bounded, axis=1)
    if parameters.kind == "par":
        beta = np.asarray(parameters.position_weights()) * parameters.second
        weights = body.add("Add", alpha, body.constant(beta[None, :, None, None]))
    else:
        variations = [_variation(body, body.neighbour(padded, size, k)) for k in range(count)]
        tau = body.add("Softmax", body.add("Concat", *variations, axis=1), axis=1)
        weights = body.add("Sub", alpha, body.add("Mul", tau, body.constant(parameters.second)))
    body.add("Mul", weights, body.constant(parameters.scale), out="out")
    return body.function(AFFINITY, ["guide"], opset)


def _variation(body: _Body, shifted: str) -> str:
    """Mean over channels of the squared forward differences, 0 on the last row and column; (N, 1, H, W)."""
    parts = []
    for axis in (2, 3):
        here = body.add("Slice", shifted, body.integers(0), body.integers(-1), body.integers(axis))
        next_ = body.add("Slice", shifted, body.integers(1), body.integers(2**31), body.integers(axis))
        difference = body.add("Sub", here, next_)
        square = body.add("Mul", difference, difference)
        pads = [0] * 8
        pads[4 + axis] = 1
        parts.append(body.add("Pad", square, body.integers(*pads)))
    return body.add("ReduceMean", body.add("Add", *parts), body.integers(1), keepdims=1)


def _gaussian(body: _Body, padded: str, size: str) -> None:
    parameters = body.parameters
    batch = body.add("Shape", "guide", start=0, end=1)
    shape = body.add("Concat", batch, body.integers(1), size, axis=0)
    ones = body.add("Expand", body.constant(np.ones((1, 1, 1, 1))), shape)
    inside = body.pad(ones, mode="constant")
    planes = []
    for k, (dy, dx) in enumerate(parameters.offsets):
        difference = body.add("Sub", body.neighbour(padded, size, k), "guide")
        square = body.add("Mul", difference, difference)
        total = body.total([_term(body, term, square, dy * dy + dx * dx) for term in parameters.terms])
        planes.append(body.add("Mul", total, body.neighbour(inside, size, k)))
    weights = body.add("Concat", *planes, axis=1)
    if parameters.normalise:
        total = body.add("ReduceSum", weights, body.integers(1), keepdims=1)
        one = body.constant(1)
        divisor = body.add("Where", body.add("Equal", total, body.constant(0)), one, total)
        body.add("Div", weights, divisor, out="out")
    else:
        body.add("Identity", weights, out="out")


def _term(body: _Body, term: GaussianTerm, square: str, distance: int) -> str:
    """The weighted Gaussian, weight * exp(-1/2 * exponent), (N, 1, H, W)."""
    fixed = 0.0 if term.sigma_xy is None else distance / term.sigma_xy**2
    parts = []
    for sigma, start, end in ((term.sigma_rgb, 0, 3), (term.sigma_features, 3, 2**31)):
        if sigma is not None:
            channels = body.add("Slice", square, body.integers(start), body.integers(end), body.integers(1))
            total = body.add("ReduceSum", channels, body.integers(1), keepdims=1)
            parts.append(body.add("Mul", total, body.constant(-0.5 / sigma**2)))
    weight = body.constant(term.weight)
    if not parts:
        return body.constant(term.weight * np.exp(-0.5 * fixed) if -0.5 * fixed >= _CUT_OFF else 0.0)
    exponent = body.add("Add", body.total(parts), body.constant(-0.5 * fixed))
    below = body.add("Less", exponent, body.constant(_CUT_OFF))
    power = body.add("Where", below, body.constant(0), body.add("Exp", exponent))
    return body.add("Mul", power, weight)
