"""What the pair energy is computed with; serialisable, so that a graph with the operator is complete."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EnergyTerm(_Settings):
    """One Gaussian of the kernel: weight * exp(-offset^2 / (2 xy_sigma^2)) * exp(-|f_i - f_j|^2 / 2).

    The features f travel as tensors beside the parameters, divided by their sigmas; a term may have none.

    Attributes:
        weight: Factor, above 0 and at most 1e18.
        xy_sigma: Width in pixels, 1e-6 to 1e6; None leaves position out.
    """

    weight: float = Field(gt=0, le=1e18)
    xy_sigma: float | None = Field(default=None, ge=1e-6, le=1e6)

    def spatial(self, dy: int, dx: int) -> float:
        """Weight times the factor that depends on the offset alone."""
        return self.weight * math.exp(-(dy * dy + dx * dx) * self.inverse_square / 2)

    @property
    def inverse_square(self) -> float:
        """1 / xy_sigma^2, 0 without position."""
        return 0.0 if self.xy_sigma is None else self.xy_sigma**-2


class EnergyParameters(_Settings):
    """Window, kernel and direction of the pair energy.

    Attributes:
        radius: Half the side of the square window, whose centre is left out; it may exceed the image.
        terms: Gaussians that add up to the kernel.
        one_way: Leave out the gradient to the neighbour's factor.
    """

    radius: int = Field(ge=1)
    terms: tuple[EnergyTerm, ...] = Field(min_length=1)
    one_way: bool = False

    def to_json(self) -> str:
        """Canonical JSON text, what the torch operator carries."""
        return self.model_dump_json(exclude_defaults=True)
