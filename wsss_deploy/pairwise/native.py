"""The compiled CPU form: shapes, plans and threads for `wsss_deploy.pairwise._cpu`.

Arrays are C-contiguous float32 or float64 in CPU memory, from numpy or torch; none is copied. Any number of
threads gives the same bits. NaN and infinity behave as in the reference.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from wsss_deploy.pairwise.energy_parameters import EnergyParameters
from wsss_deploy.pairwise.parameters import PairwiseParameters

_KINDS = ("par", "varm", "gaussian")


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension, or None, and in both cases one line that says why."""
    try:
        module = importlib.import_module("wsss_deploy.pairwise._cpu")
    except ImportError as error:
        return None, f"compiled kernels are not in this installation ({error})"
    return module, f"compiled kernels, instruction set {module.instruction_set()}"


def affinity(parameters: PairwiseParameters, guide: Any, weights: Any, threads: int, isa: str = "auto") -> None:
    """Write the weights (N, K, H, W) of a guide (N, G, H, W)."""
    _module().affinity(_plan(parameters), guide, weights, threads, isa)


def step(
    parameters: PairwiseParameters,
    masks: Any,
    weights: Any,
    unary: Any | None,
    out: Any,
    threads: int,
    isa: str = "auto",
) -> None:
    """Write one step's result (N, C, H, W); see `reference.step`."""
    _module().step(_plan(parameters), masks, weights, unary, _compatibility(parameters), out, threads, isa)


def refine(
    parameters: PairwiseParameters,
    masks: Any,
    guide: Any,
    unary: Any | None,
    out: Any,
    threads: int,
    isa: str = "auto",
    compact: bool = False,
) -> None:
    """Write `reference.refine` of masks that have the guide's size already (N, C, H, W).

    `compact` stores weights and the masks between steps in 16 bits, where the processor, the parameters and the masks
    allow it (`api.refine`). Memory beyond the arrays: N-independent, about 4 H W (K + 2 C + G) bytes in float32, in
    16 bits half of it.
    """
    _module().refine(
        _plan(parameters),
        masks,
        guide,
        unary,
        _compatibility(parameters),
        parameters.iterations,
        out,
        threads,
        isa,
        compact,
    )


def energy(
    left: Any,
    right: Any,
    gates: Sequence[Any] | None,
    sums: Any,
    potts: bool,
    parameters: EnergyParameters,
    features: Sequence[Any],
    gradients: Sequence[Any],
    feature_of_term: Sequence[int],
    wanted: Sequence[bool],
    threads: int,
    isa: str = "auto",
) -> float:
    """Write neighbour sums (N, D, H, W) and the wanted features' gradients; see `energy_reference`.

    Args:
        left: (N, D, H, W); with `potts` the probabilities.
        right: As `left`.
        gates: s and d, (N, 1, H, W); None is a gate of 1 for every pair.
        sums: Output; with `potts` -sum_j w_ij p_j, else sum_j w_ij right_j.
        potts: A pair's energy is 1 - <left_i, right_j>, else <left_i, right_j>.
        parameters: Window and kernel.
        features: Maps (N, G, H, W).
        gradients: Output for each map; not written where not wanted.
        feature_of_term: Per term its map's number, -1 is none.
        wanted: Per term, whether the gradient of its map is.
        threads: At most this many.
        isa: "auto", or an instruction set by name.

    Returns:
        The energy. Memory beyond the arrays: two rings of rows a thread, 2 MB or less for the usual windows.
    """
    targets = {index for index, want in zip(feature_of_term, wanted, strict=True) if want}
    value: float = _module().energy(
        parameters.radius,
        [
            (term.weight, term.inverse_square, index, want)
            for term, index, want in zip(parameters.terms, feature_of_term, wanted, strict=True)
        ],
        potts,
        left,
        right,
        *(gates or (None, None)),
        list(features),
        sums,
        [gradient if number in targets else None for number, gradient in enumerate(gradients)],
        threads,
        isa,
    )
    return value


def _module() -> Any:
    module, reason = load()
    if module is None:
        raise ImportError(reason)
    return module


def _compatibility(parameters: PairwiseParameters) -> float:
    return 0.0 if parameters.mean_field is None else parameters.mean_field.compatibility


@functools.lru_cache(maxsize=64)
def _plan(parameters: PairwiseParameters) -> Any:
    position = parameters.position_weights() if parameters.kind == "par" else ()
    return _module().make_plan(
        kind=_KINDS.index(parameters.kind),
        offsets=list(parameters.offsets),
        position=[parameters.second * beta for beta in position],
        terms=[
            (term.weight, *(_inverse_square(s) for s in (term.sigma_xy, term.sigma_rgb, term.sigma_features)))
            for term in parameters.terms
        ],
        bandwidth=parameters.contrast,
        second=parameters.second,
        scale=parameters.scale,
        normalise=parameters.normalise,
    )


def _inverse_square(sigma: float | None) -> float:
    return 0.0 if sigma is None else 1.0 / sigma**2
