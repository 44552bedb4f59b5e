"""The pair energy's CUDA source for given parameters; `cuda_source.compile_program` makes PTX of it without a GPU.

Kernels: `wsss_pairwise_energy(left, right, source, destination, features, N, H, W, sums, values)` and
`wsss_pairwise_energy_features(left, right, source, destination, features, N, H, W, gradients)`; sizes are int32, one
thread a pixel. Features of all terms lie in one array, channels one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from wsss_deploy.pairwise.energy_parameters import EnergyParameters

ENERGY_KERNELS = ("wsss_pairwise_energy", "wsss_pairwise_energy_features")


def energy_source(
    parameters: EnergyParameters,
    classes: int,
    channels: Sequence[int],
    *,
    wanted: Sequence[bool] | None = None,
    potts: bool = True,
    real: Literal["float", "double"] = "float",
) -> str:
    """The whole program in one text, header included.

    Args:
        parameters: Window and kernel.
        classes: Channels of the factors left and right.
        channels: Per term, of its map; 0 is none.
        wanted: Per term, whether its map gets a gradient; None is nowhere.
        potts: A pair's energy is 1 - <left_i, right_j>, else <left_i, right_j>.
        real: Type of the arrays and sums.
    """
    firsts = [sum(channels[:index]) for index in range(len(channels))]
    suffix = "f" if real == "float" else ""
    terms = [
        f"{{{term.weight:.17e}{suffix}, {term.inverse_square:.17e}{suffix}, {first}, {count}, {int(want)}}}"
        for term, first, count, want in zip(
            parameters.terms, firsts, channels, wanted or [False] * len(channels), strict=True
        )
    ]
    values = {
        "REAL": real,
        "RADIUS": parameters.radius,
        "CLASSES": classes,
        "FEATURES": sum(channels),
        "TERMS": ", ".join(terms),
        "TERM_COUNT": len(terms),
        "POTTS": int(potts),
    }
    folder = files("wsss_deploy.pairwise") / "csrc"
    header = (folder / "arithmetic.h").read_text().replace("#pragma once", "")
    program = (folder / "energy.cu").read_text().replace('#include "arithmetic.h"', header)
    return "\n".join([*(f"#define WSSS_{name} {value}" for name, value in values.items()), program])
