"""What the pairwise operator computes, as one frozen object that goes into the model card."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

RING = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
OFFICIAL_DILATIONS = (1, 2, 4, 8, 12, 24)
# Division of AFA's (0.3) and TSCD's (1/4) contrast, see `PairwiseParameters.bandwidth`.
_BANDWIDTH = {"par": 0.3, "varm": 0.25, "gaussian": 1.0}
_SECOND_WEIGHT = {"par": 0.01, "varm": 0.01, "gaussian": 0.0}

Kind = Literal["par", "varm", "gaussian"]
# Far from where squares and their inverses leave float32, in which the kernels compute: 1 / (1e-8 bandwidth)^2 is the
# largest of them.
Sigma = Annotated[float, Field(ge=1e-6, le=1e6)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
Distance = Annotated[int, Field(ge=1, le=1024)]


def gaussian_cut_off(size: int) -> float:
    """The exponent below which every form takes a Gaussian for 0, for numbers of `size` bytes: exp gives no normal one.

    `exponential` in csrc/arithmetic.h is the compiled forms' own.
    """
    return -708.0 if size > 4 else -87.0


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GaussianTerm(_Plain):
    """One joint Gaussian, weight * exp(-1/2 * sum of squared differences / sigma^2) (Gated CRF, 2019).

    Attributes:
        weight: Factor of this term in the sum of terms, 0 to 1e6.
        sigma_xy: Standard deviation of the position, pixels, 1e-6 to 1e6 as the others; None leaves the position out.
        sigma_rgb: Standard deviation of guide channels 0 to 2, or as many of them as there are, units of the guide;
            None leaves them out.
        sigma_features: Standard deviation of all guide channels from 3 on, of which there has to be one; None leaves
            them out.
    """

    weight: Factor = 1.0
    sigma_xy: Sigma | None = None
    sigma_rgb: Sigma | None = None
    sigma_features: Sigma | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma_xy is None and self.sigma_rgb is None and self.sigma_features is None:
            raise ValueError("a Gaussian term needs at least one of sigma_xy, sigma_rgb, sigma_features")
        return self


class MeanField(_Plain):
    """The step becomes softmax(unary + compatibility * sum_k w_k m(p + o_k)) instead of the plain sum.

    Attributes:
        compatibility: Strength of the neighbours' vote against the unary term, 0 to 1e6.
        epsilon: Lower bound of the scores before their logarithm is taken as the unary term by `refine`, 1e-30 or more.
    """

    compatibility: Factor = 1.0
    epsilon: Annotated[float, Field(ge=1e-30, lt=1)] = 1e-6


class PairwiseParameters(_Plain):
    """Kind, neighbours and constants of the operator.

    Attributes:
        kind: "par" (AFA, CVPR 2022), "varm" (TSCD, AAAI 2023) or "gaussian" (Gated CRF, 2019).
        dilations: The neighbours are the 8-ring at each of these distances, pixels.
        radius: In place of `dilations`, all neighbours of the square window of this radius.
        iterations: Steps of `refine`.
        bandwidth: par, varm: the contrast |n - I| / std is divided by it before it is squared; None takes the
            published 0.3 (par) or 0.25 (varm). 1e-6 to 1e6.
        second_weight: Share of the position term (par) or of the variation term (varm); None takes 0.01.
        terms: gaussian: the terms that are added.
        normalise: Divide the weights so that those of a pixel add up to 1. Without it the published sums
            hold: 1 + second_weight (par), 1 - second_weight (varm), whatever the terms give (gaussian).
        mean_field: The mean-field form of the step; None is the plain weighted sum.
    """

    kind: Kind = "par"
    dilations: tuple[Distance, ...] = OFFICIAL_DILATIONS
    radius: Annotated[int, Field(ge=1, le=32)] | None = None
    iterations: Annotated[int, Field(ge=0, le=1000)] = 10
    bandwidth: Sigma | None = None
    second_weight: Annotated[float, Field(ge=0, lt=1)] | None = None
    terms: tuple[GaussianTerm, ...] = ()
    normalise: bool = False
    mean_field: MeanField | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.radius is None and not self.dilations:
            raise ValueError("no neighbours: give dilations or a radius")
        if len(set(self.dilations)) != len(self.dilations):
            raise ValueError(f"dilations {self.dilations} repeat a distance")
        if (self.kind == "gaussian") != bool(self.terms):
            raise ValueError("kind 'gaussian' needs terms, the other kinds take none")
        if self.kind == "gaussian" and (self.bandwidth is not None or self.second_weight is not None):
            raise ValueError("kind 'gaussian' takes its constants from its terms, not bandwidth or second_weight")
        return self

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """(dy, dx) of the K neighbours: 8-rings one after another, or the window row by row."""
        if self.radius is not None:
            span = range(-self.radius, self.radius + 1)
            return tuple((dy, dx) for dy in span for dx in span if (dy, dx) != (0, 0))
        return tuple((d * dy, d * dx) for d in self.dilations for dy, dx in RING)

    @property
    def reach(self) -> int:
        """The largest distance of a neighbour along one axis, pixels."""
        return self.radius if self.radius is not None else max(self.dilations)

    @property
    def contrast(self) -> float:
        """The bandwidth in force."""
        return _BANDWIDTH[self.kind] if self.bandwidth is None else self.bandwidth

    @property
    def second(self) -> float:
        """The second weight in force."""
        return _SECOND_WEIGHT[self.kind] if self.second_weight is None else self.second_weight

    @property
    def scale(self) -> float:
        """What par and varm weights are multiplied by: 1, or the inverse of their published sum."""
        if not self.normalise or self.kind == "gaussian":
            return 1.0
        return 1.0 / (1.0 + self.second if self.kind == "par" else 1.0 - self.second)

    def position_weights(self) -> tuple[float, ...]:
        """par: the K constants beta_k = softmax_k -(r_k / (std r + 1e-8) / bandwidth)^2.

        r is the offset's length in pixels, its standard deviation the sample's (K - 1).
        """
        lengths = [math.hypot(dy, dx) for dy, dx in self.offsets]
        mean = math.fsum(lengths) / len(lengths)
        variance = math.fsum((r - mean) ** 2 for r in lengths) / (len(lengths) - 1)
        scores = [-((r / (math.sqrt(variance) + 1e-8) / self.contrast) ** 2) for r in lengths]
        powers = [math.exp(score - max(scores)) for score in scores]
        return tuple(power / math.fsum(powers) for power in powers)

    def to_json(self) -> str:
        """Canonical JSON text: what the torch operators and exported nodes carry."""
        return self.model_dump_json(exclude_defaults=True)
