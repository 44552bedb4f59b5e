"""The recipe's options of each method, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.losses.potts import Relaxation
from training.methods.tag_settings import PropagationSettings, SFCSettings, TagsSettings, TSCDSettings

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
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


class TeacherSettings(_Strict):
    """Pseudo-labels on unlabelled pixels from the moving average of the network (`optimisation.ema`).

    Attributes:
        weight: Factor of their cross-entropy.
        threshold: Least probability of a pseudo-label.
        start: They act after this fraction of the iterations.
        refine: Refine the average's probabilities along the image, at its own size, before they become labels.
    """

    weight: Positive = 1.0
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    start: Fraction = 0.2
    refine: bool = False


class SpreadSettings(_Strict):
    """Labels carried to unlabelled pixels along paths of like colour; see `training.losses.label_spreading`.

    Attributes:
        weight: Factor of their cross-entropy.
        rgb: Change of ImageNet-normalised colour along a path that costs 1.
        xy: Length of a path that costs 1, in pixels of the logits' map (four image pixels each).
        limit: Largest cost at which a label is carried.
        start: They act after this fraction of the iterations.
    """

    weight: Positive = 0.5
    rgb: Positive = 1.0
    xy: Positive = 8.0
    limit: Annotated[float, Field(gt=0, le=16)] = 1.0
    start: Fraction = 0.0


class AbsentSettings(_Strict):
    """A class without any label in an image is taken to be absent from it; see `training.losses.absent_classes_loss`.

    Right where annotators label every class that they see in an image at least once, as with a point an object. The
    background needs no label: it may be anywhere.

    Attributes:
        weight: Factor of the loss.
    """

    weight: Positive = 1.0


class SparseSettings(_Strict):
    """What every method for sparse labels takes.

    Attributes:
        class_weights: Of the cross-entropy: "counts" weighs classes by how rare their labels are, "off" equally.
        absent: Classes without a label in an image are absent from it, also for the teacher; null draws no such
            conclusion.
        teacher: Pseudo-labels from the network's moving average; null is none.
        spread: Labels carried along paths of like colour; null is none.
        propagate: Labels carried to most pixels before the training, which then takes them for given; null is none.
    """

    class_weights: ClassWeights = "off"
    absent: AbsentSettings | None = None
    teacher: TeacherSettings | None = None
    spread: SpreadSettings | None = None
    propagate: PropagationSettings | None = None


class PartialCESettings(SparseSettings):
    """Cross-entropy of the labelled pixels alone; further attributes: `SparseSettings`."""

    name: Literal["partial_ce"] = "partial_ce"


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


class GatedCRFSettings(SparseSettings):
    """Cross-entropy of the labelled pixels plus the Gated CRF loss (arXiv 1906.04651).

    Further attributes: `SparseSettings`.

    Attributes:
        weight: Factor of the Gated CRF loss; the cross-entropy has 1.
        start: The Gated CRF loss acts after this fraction of the iterations.
        radius: Half the window's side, in pixels of the map on which the loss acts.
        kernels: Gaussians that add up.
        stride: Image pixels per pixel of that map; probabilities are averaged to it, or raised from the logits'
            own stride where it is smaller.
        gate_validity: Leave out pairs with a neighbour in the padding of a crop.
        gate_labelled: Leave out pairs whose receiving pixel is labelled.
        one_way: Pull pixels towards their neighbours and not these towards them; see `training.losses.gated_crf_loss`.
        count_padding_pairs: Count pairs with neighbours outside the crop as the released code does without validity
            gate: changes the value alone, not what is learnt.
        compatibility: How little two classes go together, a row for each receiving class, 0 on the diagonal; null is
            the same for any two (Potts).
    """

    name: Literal["gated_crf"] = "gated_crf"
    weight: Positive = 0.1
    start: Fraction = 0.005
    radius: Annotated[int, Field(ge=1, le=64)] = 5
    kernels: Annotated[tuple[KernelSettings, ...], Field(min_length=1)] = (KernelSettings(),)
    stride: Annotated[int, Field(ge=1, le=64)] = 4
    gate_validity: bool = True
    gate_labelled: bool = False
    one_way: bool = False
    count_padding_pairs: bool = False
    compatibility: tuple[tuple[NonNegative, ...], ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.count_padding_pairs and (self.gate_validity or self.compatibility is not None):
            raise ValueError("count_padding_pairs counts nothing with gate_validity or compatibility; set those off")
        rows = self.compatibility or ()
        if any(len(row) != len(rows) for row in rows) or any(row[index] for index, row in enumerate(rows)):
            raise ValueError(
                "compatibility: expected a square list of lists, a row a class, with zeros on its diagonal"
            )
        if not all(sum(row) for row in rows):
            raise ValueError("compatibility: a row of zeros switches the loss off for its class; give it some above 0")
        return self


class DFRSettings(SparseSettings):
    """DFR, the Dynamic Feature Regularized loss (arXiv 2108.01296): a reconstruction, see docs/sparse_labels.md.

    Attributes:
        weight: Factor of the regularised loss; the cross-entropy has 1.
        start: It acts after this fraction of the iterations.
        deep_start: The deep part of its kernel, and predicted targets of the head, act after this fraction.
        radius: Half the window's side, in pixels of the map on which the losses act.
        stride: Image pixels per pixel of that map.
        kernel: "sum" adds the kernels of colour and of deep features, so that features can link what colour does
            not; "product" multiplies them, so that features can only cut links.
        shallow_weight: Factor of the colour kernel; 0 leaves it out. The product has no factors of its own but
            `weight`: there it is 1.
        deep_weight: Factor of the deep kernel; 0 leaves it out (the product then is the colour kernel, else this is 1).
        xy: Spatial width of both, in pixels of the map.
        rgb: Colour width, as in `KernelSettings`.
        feature: Width of the deep features, which have unit length.
        kernel_gradient: Let the regularised loss move the deep features through its kernel; not with `dense`.
            Unsafe: it pushes disagreeing pairs apart.
        dense: In place of the window (`radius`), all pairs of a map whose longer side is at most this; 0 is off. The
            sum over many more pairs asks for a smaller weight. One image's pairs take three matrices of the map's
            pixels squared, 0.2 GB at 64 and 16 times that at 128.
        gate: Which pixels receive: "valid" all, "confidence" each with 1 - max P.
        features: Where the head gets its input: "stages" fuses all encoder maps, "last" takes the coarsest,
            "decoder" the map that the decoder (upernet) fuses.
        head_weight: Factor of the head's loss; 0 leaves the head out, and the kernel takes its input as it is.
        head_width: Channels of the head.
        head_radius: Half the side of the window of supervised pairs.
        pairs: What supervises them: labels and confident predictions, or either.
        threshold: Least probability of a predicted target.
        distance: "l1" of the features, or "cosine".
        detach: Keep the head's loss, and the kernel's gradient, from moving the network.
        smooth_weight: Factor of the precursor's smoothness of the head's features; it used 3.
        auxiliary_weight: Factor of the cross-entropy of an auxiliary head on the second-coarsest encoder map; 0.4 in
            use with Swin and UperNet.
    """

    name: Literal["dfr"] = "dfr"
    weight: NonNegative = 0.1
    start: Fraction = 0.005
    deep_start: Fraction = 0.1
    radius: Annotated[int, Field(ge=1, le=64)] = 5
    stride: Annotated[int, Field(ge=1, le=64)] = 4
    kernel: Literal["sum", "product"] = "sum"
    shallow_weight: NonNegative = 1.0
    deep_weight: NonNegative = 1.0
    xy: Positive = 6.0
    rgb: Positive = 0.1
    feature: Positive = 0.5
    kernel_gradient: bool = False
    dense: Annotated[int, Field(ge=0, le=128)] = 0
    gate: Literal["valid", "confidence"] = "valid"
    features: Literal["stages", "last", "decoder"] = "stages"
    head_weight: NonNegative = 0.4
    head_width: Annotated[int, Field(ge=1, le=1024)] = 64
    head_radius: Annotated[int, Field(ge=1, le=16)] = 4
    pairs: Literal["both", "labels", "predictions"] = "both"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    distance: Literal["l1", "cosine"] = "l1"
    detach: bool = False
    smooth_weight: NonNegative = 0.0
    auxiliary_weight: NonNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.weight or self.head_weight or self.auxiliary_weight):
            raise ValueError("weight and head_weight are both 0, which leaves nothing of DFR; take method partial_ce")
        self._refuse_idle(
            "head_weight: 0 leaves the head out", not self.head_weight, "smooth_weight", "pairs", "distance"
        )
        # With it the kernel's gradient ends at the head's input.
        self._refuse_idle(
            "head_weight: 0 leaves the head out", not (self.head_weight or self.kernel_gradient), "detach"
        )
        self._refuse_idle(
            "weight: 0 leaves the regularised loss out",
            not self.weight,
            "dense",
            "gate",
            "kernel",
            "kernel_gradient",
        )
        self._refuse_idle("deep_weight: 0 leaves deep features out", not self.deep_weight, "kernel_gradient")
        if self.weight and self.kernel == "sum" and not (self.shallow_weight or self.deep_weight):
            raise ValueError("shallow_weight and deep_weight are both 0; set weight: 0 to leave the loss out")
        if self.kernel == "product" and (self.shallow_weight != 1 or self.deep_weight not in (0, 1)):
            raise ValueError(
                f"kernel: product has one factor, `weight`; found shallow_weight {self.shallow_weight:g} and "
                f"deep_weight {self.deep_weight:g}, expected 1 and 1 (or 0, without deep features)"
            )
        if self.dense and self.kernel_gradient:
            raise ValueError("dense takes its kernel for a constant; set kernel_gradient: false or dense: 0")
        return self

    def _refuse_idle(self, reason: str, idle: bool, *options: str) -> None:
        """Refuse options that would do nothing; their defaults are no request."""
        changed = [name for name in options if getattr(self, name) != type(self).model_fields[name].default]
        if idle and changed:
            raise ValueError(f"{' and '.join(changed)}: without effect, {reason}")


class SoftLabelSettings(SparseSettings):
    """Soft self-labelling (Zhang and Boykov, CVPR 2025, arXiv 2507.01721); see docs/sparse_labels.md.

    Attributes:
        weight: eta, factor of the collision cross-entropy with the soft pseudo-labels; the labelled pixels have 1.
        start: It acts after this fraction of the iterations.
        potts: lambda, factor of the Potts relaxation between pseudo-labels of neighbours.
        relaxation: Which relaxation.
        rgb: Width of the neighbours' weight in ImageNet-normalised colour.
        steps: Gradient steps of the sub-problem, in each iteration.
        rate: Their rate.
    """

    name: Literal["soft_labels"] = "soft_labels"
    weight: Positive = 0.3
    start: Fraction = 0.3
    potts: NonNegative = 6.0
    relaxation: Relaxation = "collision_divergence"
    rgb: Positive = 0.16
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    rate: Positive = 0.1


MethodSettings = Annotated[
    SupervisedSettings
    | PartialCESettings
    | GatedCRFSettings
    | DFRSettings
    | SoftLabelSettings
    | TagsSettings
    | SFCSettings
    | TSCDSettings,
    Field(discriminator="name"),
]
