"""The pairwise nodes of a graph with refinement as ahead-of-time plugins of TensorRT (10.9 or later).

    import tensorrt as trt
    from export.tensorrt_plugin import register_plugins

    register_plugins()              # then parse the ONNX file and build the engine as usual

The parser maps the nodes `wsss::PairwiseAffinity` and `wsss::PairwiseStep` (attributes `plugin_namespace`, `aot`) to
these plugins. Each is one kernel of `wsss_deploy/pairwise/csrc/pairwise.cu`, compiled to PTX for the node's own
parameters; the PTX goes into the engine, which then needs neither this package nor Python. Batch, height and width stay
dynamic. Arrays are float32 or float16, as the network's types say, sums float32.

Mean-field steps have a third input, which the plugin does not take: such a file runs by its functions' bodies only.
**No engine has been built with it yet**; tests/export/test_tensorrt_plugin.py says what has been tested.
"""

from __future__ import annotations

import functools
from typing import Any

from export.onnx_functions import AFFINITY, DOMAIN, STEP
from wsss_deploy.errors import ExportError
from wsss_deploy.pairwise import PairwiseParameters
from wsss_deploy.pairwise.cuda_launch import BLOCK
from wsss_deploy.pairwise.cuda_source import ptx
from wsss_deploy.pairwise.forms import MOST_NEIGHBOURS

#: Attribute of both nodes: the operator's parameters as JSON.
ATTRIBUTE = "parameters"


@functools.cache
def register_plugins() -> None:
    """Register both plugins with TensorRT; safe to call again.

    Raises:
        ExportError: TensorRT or its ahead-of-time plugins are missing.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp

        trtp.aot_impl  # noqa: B018 (asks whether this release has it)
    except (ImportError, AttributeError) as error:
        raise ExportError(
            f"the TensorRT plugin needs TensorRT 10.9 or later ({error}); pip install 'wsss-deploy[tensorrt]'"
        ) from error
    _register(trt, trtp)


def _register(trt: Any, trtp: Any) -> None:
    desc, outputs_type = trtp.TensorDesc, tuple[trtp.TensorDesc]
    answer = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def affinity(guide: Any, parameters: Any) -> Any:
        batch, _, height, width = guide.shape_expr
        return trtp.from_shape_expr((batch, _neighbours(parameters), height, width), guide.dtype)

    def step(masks: Any, weights: Any, parameters: Any) -> Any:
        _neighbours(parameters)
        return masks.like()

    def launch(kernel: str, sized: Any, parameters: str) -> tuple[str, bytes, Any, Any]:
        batch, channels, height, width = sized.shape_expr
        grid = trtp.KernelLaunchParams()
        grid.grid_x = trtp.cdiv(batch * height * width, BLOCK)
        grid.block_x = BLOCK
        sizes = trtp.SymIntExprs(4)
        for index, size in enumerate((batch, channels, height, width)):
            sizes[index] = trtp.SymInt32(size)
        storage = "__half" if sized.dtype == trt.DataType.HALF else "float"
        return kernel, ptx(PairwiseParameters.model_validate_json(parameters), storage), grid, sizes

    def affinity_kernel(guide: Any, parameters: Any, outputs: Any, tactic: Any) -> Any:
        return launch("wsss_pairwise_affinity", guide, parameters)

    def step_kernel(masks: Any, weights: Any, parameters: Any, outputs: Any, tactic: Any) -> Any:
        return launch("wsss_pairwise_step", masks, parameters)

    def affinity_types(guide: Any, outputs: Any) -> Any:
        return types(2)

    def step_types(masks: Any, weights: Any, outputs: Any) -> Any:
        return types(3)

    def types(count: int) -> list[Any]:
        return [trtp.AutoTuneCombination(", ".join([kind] * count), "LINEAR") for kind in ("FP32", "FP16")]

    # TensorRT reads the annotations as objects, which are known only here.
    one, two = {"guide": desc}, {"masks": desc, "weights": desc}
    for inputs, declare, implement, tune in (
        (one, affinity, affinity_kernel, affinity_types),
        (two, step, step_kernel, step_types),
    ):
        name = f"{DOMAIN}::{AFFINITY if declare is affinity else STEP}"
        given = {**inputs, ATTRIBUTE: str}
        declare.__annotations__ = {**given, "return": outputs_type}
        implement.__annotations__ = {**given, "outputs": outputs_type, "tactic": int, "return": answer}
        tune.__annotations__ = {**inputs, "outputs": outputs_type, "return": list[trtp.AutoTuneCombination]}
        trtp.register(name)(declare)
        trtp.aot_impl(name)(implement)
        trtp.autotune(name)(tune)


def _neighbours(parameters: str) -> int:
    """How many neighbours a node has.

    Raises:
        ExportError: More than the kernels take: the assembler would refuse them in the middle of the build.
    """
    count = len(PairwiseParameters.model_validate_json(parameters).offsets)
    if count > MOST_NEIGHBOURS:
        raise ExportError(
            f"the refinement has {count} neighbours, the TensorRT plugin takes at most {MOST_NEIGHBOURS}; choose a "
            "smaller radius or fewer dilations, or build the engine without refinement in the graph"
        )
    return count
