"""The recipe's label settings as the rule that makes labels."""

from __future__ import annotations

from training.cam.labels import LabelRule
from training.methods.tag_settings import LabelSettings
from wsss_deploy.pairwise import PairwiseParameters


def label_rule(settings: LabelSettings) -> LabelRule:
    """Thresholds and refiner; images are refined at half their size, as published."""
    refiner = None
    if settings.refiner != "off":
        refiner = PairwiseParameters(kind=settings.refiner, iterations=settings.iterations)
    return LabelRule(
        high=settings.high,
        low=settings.low,
        sure=settings.sure,
        refiner=refiner,
        temperature=settings.temperature,
        guide=settings.guide,
    )
