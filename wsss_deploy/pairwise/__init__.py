"""The one pairwise operator: edge-aware refinement of masks along an image.

    from wsss_deploy.pairwise import PairwiseParameters, refine

    parameters = PairwiseParameters(kind="par", iterations=10, normalise=True)
    sharper = refine(scores, image, parameters)      # numpy or torch, (N, C, h, w) and (N, 3, H, W)

`affinity` gives every pixel weights for its K neighbours, `step` replaces every value by the weighted sum
over them, `refine` is one affinity and then T steps. `energy` is what neighbours' class distributions cost that differ
in spite of a large weight: the Gated CRF loss. Importing this package does not import torch.
"""

from __future__ import annotations

from wsss_deploy.pairwise.api import affinity, refine, step
from wsss_deploy.pairwise.energy_api import energy, energy_form
from wsss_deploy.pairwise.energy_parameters import EnergyParameters, EnergyTerm
from wsss_deploy.pairwise.forms import FORMS, Form, choose, forms
from wsss_deploy.pairwise.parameters import GaussianTerm, MeanField, PairwiseParameters

__all__ = [
    "FORMS",
    "EnergyParameters",
    "EnergyTerm",
    "Form",
    "GaussianTerm",
    "MeanField",
    "PairwiseParameters",
    "affinity",
    "choose",
    "energy",
    "energy_form",
    "forms",
    "refine",
    "step",
]
