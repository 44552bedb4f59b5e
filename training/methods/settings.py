"""The recipe's options of each method, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.methods.tag_settings import SFCSettings, TagsSettings, TSCDSettings

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ClassWeights = Literal["off", "counts"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SupervisedSettings(_Strict):
    """Cross-entropy against full masks; what every weak method is compared with.

    Attributes:
        class_weights: "counts" weighs classes by how rare their labels are, "off" equally.
    """

    name: Literal["supervised"] = "supervised"
    class_weights: ClassWeights = "off"


class PartialCESettings(_Strict):
    """Cross-entropy of the labelled pixels alone.

    Attributes:
        class_weights: "counts" weighs classes by how rare their labels are, "off" equally.
    """

    name: Literal["partial_ce"] = "partial_ce"
    class_weights: ClassWeights = "off"


class KernelSettings(_Strict):
    """One Gaussian of the Gated CRF loss.

    Attributes:
        weight: Its factor.
        xy: Width in pixels of the map on which the loss acts (`stride` image pixels each); None leaves position out.
        rgb: Width in ImageNet-normalised colour, whatever the encoder's own normalisation: 0.1 is about 5.8 of 255
            grey levels. None leaves colour out.
    """

    weight: Positive = 1.0
    xy: Positive | None = 6.0
    rgb: Positive | None = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.xy is None and self.rgb is None:
            raise ValueError("xy and rgb are both null; give at least one width")
        return self


class GatedCRFSettings(_Strict):
    """Cross-entropy of the labelled pixels plus the Gated CRF loss (arXiv 1906.04651).

    Attributes:
        weight: Factor of the Gated CRF loss; the cross-entropy has 1.
        start: The Gated CRF loss acts after this fraction of the iterations.
        radius: Half the window's side, in pixels of the map on which the loss acts.
        kernels: Gaussians that add up.
        stride: Image pixels per pixel of that map; probabilities are averaged to it, or raised from the logits'
            own stride where it is smaller.
        gate_validity: Leave out pairs with a neighbour in the padding of a crop.
        gate_labelled: Leave out pairs whose receiving pixel is labelled.
        class_weights: Of the cross-entropy: "counts" weighs classes by how rare their labels are, "off" equally.
    """

    name: Literal["gated_crf"] = "gated_crf"
    weight: Positive = 0.1
    start: Annotated[float, Field(ge=0, lt=1)] = 0.005
    radius: Annotated[int, Field(ge=1, le=64)] = 5
    kernels: Annotated[tuple[KernelSettings, ...], Field(min_length=1)] = (KernelSettings(),)
    stride: Annotated[int, Field(ge=1, le=64)] = 4
    gate_validity: bool = True
    gate_labelled: bool = False
    class_weights: ClassWeights = "off"


MethodSettings = Annotated[
    SupervisedSettings | PartialCESettings | GatedCRFSettings | TagsSettings | SFCSettings | TSCDSettings,
    Field(discriminator="name"),
]
