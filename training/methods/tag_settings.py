"""The recipe's options of the methods that train from image tags alone; docs/tags.md says what each part does."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from training.losses.shared_feature import BANK_FACTOR, PROTOTYPE_WEIGHT, SCALE_WEIGHT

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Depth = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=4)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CamSettings(_Strict):
    """Class activation maps from 1x1 classifiers on encoder maps.

    Attributes:
        depths: Fractions of the encoder's depth that get a classifier; they are trained together.
        depth: The one whose maps are the CAM.
        pooling: Fraction of a map's cells whose mean is the image's score: 1 average, 0 maximum.
        scales: Factors of the image's size over which CAMs are summed, each with its mirror.
    """

    kind: Literal["classifier"] = "classifier"
    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = (1.0,)
    depth: Depth = 1.0
    pooling: Share = 0.1
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0, 0.75, 1.25)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.depth not in self.depths:
            raise ValueError(f"depth is {self.depth}, depths are {self.depths}; expected one of these")
        return self


class CalibrationSettings(_Strict):
    """Probabilities of positions, mixed with what the encoder says of the same image (`training.cam.calibration`).

    Attributes:
        attention: Part of the probabilities that comes along the attention of the encoder's last blocks, in place of
            AFA's learnt affinity; encoders without attention over all positions do without.
        steps: How often probabilities are averaged along the correlation of features (SFC's M_W); 0 turns it off.
        power: Of the correlation.
        fusion: Weight of probabilities by prototypes of the image's own classes (SFC's M_P); 0 turns them off.
        seeds: Least probability of positions that prototypes are made from.
    """

    attention: Share = 0.2
    steps: Annotated[int, Field(ge=0, le=16)] = 2
    power: Annotated[float, Field(gt=0, le=64)] = 4.0
    fusion: Weight = 0.7
    seeds: Share = 0.6


class TokenSettings(_Strict):
    """CAMs from linear classifiers on the features of an encoder that stays as it was pretrained (docs/tags.md).

    What a few images and tags teach an encoder costs it more than it gains; a linear classifier on its features learns
    in seconds, and one with a background class can learn from what classes have in common over the whole data set.

    Attributes:
        depth: Fraction of the encoder's depth whose features are taken.
        pooling: Fraction of an image's positions whose mean is its score; `CamSettings.pooling`.
        iterations: Optimiser steps of the first classifier, of images; 16 an image at most.
        batch_size: Images in a step.
        learning_rate: Peak rate of both classifiers' optimiser, a third of it for the second.
        foreground: A position with a score above it is a seed of its class.
        background: A position where all scores are below it is a seed of the background.
        rounds: Trainings of the second classifier, of positions: on seeds, then on what the last one is sure of; 0
            leaves it at the first, whose scores of positions then are odds against the background.
        sure: Least probability of that.
        scales: Factors of the image's size over which probabilities are averaged.
        calibration: Of these probabilities; null leaves them as they are.
        objectness: Whether seeds are also chosen by what looks like an object (`training.cam.objectness`): "auto" where
            the classes have few images (`few_images`), there are no labels of pixels and the encoder has a class
            token; "off" never. That expects photographs of things, not scenes all of which is labelled.
        few_images: Fewer images than this a class (their median) are few.
        images: Where labels of pixels are there as well (`PropagationSettings`): whether the classifier of images
            adds its seeds to them. That needs a background and classes that not every image holds.
    """

    kind: Literal["tokens"] = "tokens"
    depth: Depth = 10 / 12
    pooling: Share = 0.1
    iterations: Annotated[int, Field(ge=1)] = 3000
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    foreground: Share = 0.4
    background: Share = 0.15
    rounds: Annotated[int, Field(ge=0, le=10)] = 3
    sure: Annotated[float, Field(ge=0, lt=1)] = 0.7
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0,)
    calibration: CalibrationSettings | None = CalibrationSettings()
    objectness: Literal["auto", "off"] = "auto"
    few_images: Annotated[int, Field(ge=0)] = 75
    images: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.background > self.foreground:
            raise ValueError(
                f"background is {self.background}, foreground {self.foreground}; expected background <= foreground"
            )
        return self


class SharedFeatureSettings(_Strict):
    """CAMs calibrated by shared features (SFC, arXiv 2401.11719).

    Attributes:
        bank_draws: Samples from the image bank added to every batch; 0 turns the bank off.
        bank_factor: See `training.losses.shared_feature.BANK_FACTOR`.
        prototype_weight: Of L_P; 0 turns it off.
        scale_weight: Of L_W; 0 turns it off.
        coefficients: Whether classes are weighed by the distribution coefficients.
        background_weight: Of the background when seeds are chosen.
        pooling: `CamSettings.pooling`; released is 1, the average.
        fusion: Weight of prototype CAMs beside classifier CAMs; the code has 0.7, the paper 1.
        sides: Widths of the hierarchical feature's parts, fine to coarse.
        scales: Factors of the image's size over which CAMs are fused, each with its mirror.
    """

    kind: Literal["shared_feature"] = "shared_feature"
    bank_draws: Annotated[int, Field(ge=0, le=64)] = 4
    bank_factor: Weight = BANK_FACTOR
    prototype_weight: Weight = PROTOTYPE_WEIGHT
    scale_weight: Weight = SCALE_WEIGHT
    coefficients: bool = True
    background_weight: Share = 0.3
    pooling: Share = 0.1
    fusion: Weight = 0.7
    sides: tuple[int, int, int, int] = (128, 128, 256, 256)
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0, 0.5, 1.5, 2.0)


class LabelSettings(_Strict):
    """How CAMs become labels.

    Attributes:
        high: Background score above which, in spite of it, a class is sure. TSCD and AFA have 0.55 and 0.35, for
            maximum pooling; the mean of the top tenth makes lower and wider maps.
        low: Background score below which the background is sure; between the two is 255.
        sure: Least probability of a label, where the maps know the background (`TokenSettings`); `high` and `low` have
            no part there.
        refiner: Local refinement of both passes: "varm" (TSCD), "par" (AFA) or "off".
        guide: What the refiner sees: "rgb", as released, or "opponent", brightness and opponent colours.
        iterations: Of the refiner.
        temperature: Divides scores before the softmax over background and present classes.
    """

    high: Share = 0.3
    low: Share = 0.1
    sure: Share = 0.6
    refiner: Literal["varm", "par", "off"] = "varm"
    guide: Literal["rgb", "opponent"] = "opponent"
    iterations: Annotated[int, Field(ge=1, le=100)] = 10
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, high {self.high}; expected low <= high")
        return self


class WalkSettings(_Strict):
    """Labels of an image carried along features that are alike; see `training.cam.random_walk`.

    Attributes:
        power: The larger, the more alike two positions have to be for a label to go from one to the other.
        restart: Chance of each step to end with what the classifier says of the place.
    """

    power: Annotated[float, Field(gt=0, le=100)] = 10.0
    restart: Annotated[float, Field(gt=0, le=1)] = 0.05


class PropagationSettings(_Strict):
    """Labels of a few pixels carried to most others by a linear classifier on a frozen encoder's features.

    An image's labels are taken to name all of its classes but the background, which may be anywhere.

    Attributes:
        tokens: The classifier.
        walk: From an image's own labels a random walk goes on to what looks alike, and the classifier has a say at each
            of its steps; null takes the classifier's word alone, as do images without a label of the background where
            the set has one.
        labels: How probabilities become labels.
        least: Least mean recall of given labels of images, a fifth of all, that a classifier learnt on the others has
            not seen. Below it the encoder's features do not tell these classes apart (ImageNet's of heart MRI: 0.66),
            and nothing is carried on.
        alone: Once labels are carried on, train on them with cross-entropy alone; the method's other terms are for
            the case that they are not.
        long_side: Longer side in pixels at which images are read for it; None takes 1.5 times the crop.
    """

    tokens: TokenSettings = TokenSettings()
    walk: WalkSettings | None = None
    labels: LabelSettings = LabelSettings()
    least: Share = 0.75
    alone: bool = False
    long_side: Annotated[int, Field(ge=32, le=4096)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tokens.rounds:
            raise ValueError("tokens.rounds is 0; labels of pixels are learnt from in rounds, expected 1 or more")
        return self


def _kind(value: Any, default: str = "tokens") -> str:
    # A recipe that changes one option need not repeat the kind.
    found = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", "")
    return str(found)


def _single_stage_kind(value: Any) -> str:
    return _kind(value, "classifier")


SingleStageCams = Annotated[
    Annotated[CamSettings, Tag("classifier")] | Annotated[SharedFeatureSettings, Tag("shared_feature")],
    Discriminator(_single_stage_kind),
]
CamKind = Annotated[
    Annotated[TokenSettings, Tag("tokens")]
    | Annotated[CamSettings, Tag("classifier")]
    | Annotated[SharedFeatureSettings, Tag("shared_feature")],
    Discriminator(_kind),
]


class CorrectionSettings(_Strict):
    """Pseudo-labels corrected by the moving average of the segmenter (`optimisation.ema`) within the tags.

    Attributes:
        start: They are corrected after this fraction of the second stage.
        threshold: Least probability of a correction, among background and the image's own classes.
        final_threshold: To which the threshold falls until the end, along half a cosine (DuPL, arXiv 2403.11184, where
            labels are filtered less and less); null keeps it.
    """

    start: Annotated[float, Field(ge=0, lt=1)] = 0.4
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    final_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.final_threshold is not None and self.final_threshold > self.threshold:
            raise ValueError(
                f"final_threshold is {self.final_threshold}, threshold {self.threshold}; expected it to fall or null"
            )
        return self

    def threshold_at(self, progress: float) -> float:
        """The threshold once a part `progress` of the second stage, in [start, 1], is done."""
        if self.final_threshold is None:
            return self.threshold
        done = (progress - self.start) / (1 - self.start)
        return self.final_threshold + (self.threshold - self.final_threshold) * (1 + math.cos(math.pi * done)) / 2


class TagsSettings(_Strict):
    """Two stages in one run: a classifier gives pseudo-labels of the training images, a segmenter learns from them.

    Attributes:
        cams: How CAMs come about.
        labels: How CAMs become labels.
        cam_iterations: Optimiser steps of the first stage; `optimisation.iterations` are the second's. This and the
            next three are of encoders that learn; `cams` of kind "tokens" has its own.
        cam_learning_rate: The first stage's peak rate of the encoder. A pretrained ViT's last block spreads what it
            learns over all positions at a rate that is good for segmentation; docs/results.md.
        cam_head_factor: The first stage's classifiers have this many times the encoder's rate.
        cam_frozen: Part of the encoder's layers, from the image on, that the first stage leaves as they are: general
            features gain little from tags, and a third of them saves a fifth of the time.
        cam_long_side: Longer side in pixels at which images are read for their CAMs; None takes 1.5 times the crop.
        correction: Of pseudo-labels by the segmenter's own moving average; null is none.
        crf_weight: Of the Gated CRF loss beside the second stage's cross-entropy; 0 turns it off.
        crf_start: It acts after this fraction of the second stage.
        correspondence_weight: Of the self correspondence distillation (SCD) in the second stage, whose CAMs are the
            first stage's; 0 turns it off and saves the small view.
        correspondence: "parity" puts the mean back after centring, as released, which leaves next to nothing that
            pushes positions apart; "repaired" does not. See docs/tags.md.
        samples: Its points a side.
        small_view: Factor of the small view's size, rounded to the encoder's stride.
        class_weights: Of the second stage: "counts" weighs classes by how rare their pseudo-labels are.
    """

    name: Literal["tags"] = "tags"
    cams: CamKind = TokenSettings()
    labels: LabelSettings = LabelSettings()
    cam_iterations: Annotated[int, Field(ge=1)] = 400
    cam_learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    cam_head_factor: Annotated[float, Field(gt=0)] = 100.0
    cam_frozen: Share = 1 / 3
    cam_long_side: Annotated[int, Field(ge=32, le=4096)] | None = None
    correction: CorrectionSettings | None = None
    crf_weight: Weight = 0.0
    crf_start: Annotated[float, Field(ge=0, lt=1)] = 0.3
    correspondence_weight: Weight = 0.0
    correspondence: Literal["parity", "repaired"] = "repaired"
    samples: Annotated[int, Field(ge=2, le=128)] = 40
    small_view: Annotated[float, Field(gt=0, lt=1)] = 0.3
    class_weights: Literal["off", "counts"] = "off"


class SFCSettings(TagsSettings):
    """The two stages of `tags` with CAMs of shared feature calibration."""

    name: Literal["sfc"] = "sfc"  # type: ignore[assignment]
    cams: SharedFeatureSettings = SharedFeatureSettings()
    # Fused maps are higher: two kinds that agree.
    labels: LabelSettings = LabelSettings(high=0.45, low=0.25)


class TSCDSettings(_Strict):
    """Self correspondence distillation in a single stage (arXiv 2302.13765).

    Attributes:
        cams: How CAMs come about: from a classifier, as TSCD has it, or calibrated by shared features (SFC), whose
            image bank and losses then are part of every step.
        labels: How CAMs become labels.
        frozen: Part of the encoder's layers, from the image on, whose weights stay as they are; with any, all of its
            batch norms keep their statistics; `TagsSettings.cam_frozen`.
        start: All terms but the classification act after this fraction of the training.
        segmentation_weight: Of the balanced cross-entropy against refined CAM labels.
        affinity_weight: Of the affinity loss; 0 turns it off (encoders without attention need that).
        affinity_radius: Half the window's side in cells of the attention's grid.
        propagation_start: After this fraction of the training, the segmentation's labels come from CAMs that are spread
            along the learnt affinity and then refined, as AFA has it (0.3); null is never, as TSCD has it.
        correspondence_weight: Of the self correspondence distillation; 0 turns it off and saves the small view.
        correspondence: "parity" as released, or "repaired"; `TagsSettings.correspondence`.
        samples: Its points a side.
        small_view: Factor of the small view's size, rounded to the encoder's stride.
        consistency_weight: Of the scale consistency of CAMs; 0 turns it off.
        consistency: "parity" has no gradient, as released; "repaired" has one. See docs/tags.md.
        regulariser_weight: Of the Gated CRF loss on the segmentation, in place of the release's dense energy.
    """

    name: Literal["tscd"] = "tscd"
    cams: SingleStageCams = CamSettings(scales=(1.0, 0.5, 1.5))
    labels: LabelSettings = LabelSettings()
    frozen: Share = 1 / 3
    start: Annotated[float, Field(ge=0, lt=1)] = 0.1
    segmentation_weight: Weight = 0.1
    affinity_weight: Weight = 0.1
    affinity_radius: Annotated[int, Field(ge=1, le=64)] = 8
    propagation_start: Annotated[float, Field(ge=0, lt=1)] | None = None
    correspondence_weight: Weight = 0.1
    correspondence: Literal["parity", "repaired"] = "parity"
    samples: Annotated[int, Field(ge=2, le=128)] = 40
    small_view: Annotated[float, Field(gt=0, lt=1)] = 0.3
    consistency_weight: Weight = 0.1
    consistency: Literal["parity", "repaired"] = "repaired"
    regulariser_weight: Weight = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.propagation_start is not None and not self.affinity_weight:
            raise ValueError("propagation_start spreads along the affinity, which affinity_weight: 0 leaves out")
        if self.propagation_start is not None and self.propagation_start < self.start:
            raise ValueError(
                f"propagation_start is {self.propagation_start}, start {self.start}; there are no labels before start"
            )
        return self
