"""CAMs spread along predicted affinity, and refined inside the image's part of a crop (AFA, arXiv 2203.02664)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.cam.labels import LabelRule
from training.losses.attention_affinity import propagate
from wsss_deploy.pairwise import refine


def propagated_cams(cams: Tensor, tags: Tensor, affinity: Tensor, radius: int, background: float) -> Tensor:
    """One step along the affinity, of the softmax over background and present classes.

    Args:
        cams: On the affinity's grid (N, K, h, w), in [0, 1].
        tags: (N, K), 1 where present.
        affinity: (N, h * w, h * w) in (0, 1).
        radius: Half the window's side in cells.
        background: The background's score.

    Returns:
        (N, K + 1, h, w), background first; absent classes are 0.
    """
    stacked = torch.cat([torch.full_like(cams[:, :1], background), cams], dim=1)
    absent = F.pad(tags != 1, (1, 0))[:, :, None, None]
    return propagate(stacked.masked_fill(absent, -torch.inf).softmax(dim=1), affinity, radius)


def refined_in_box(image: Tensor, scores: Tensor, tags: Tensor, boxes: Tensor, rule: LabelRule) -> Tensor:
    """Scores raised to the image's size and refined inside each image's box, so that padding sends nothing.

    Args:
        image: In [0, 1] (N, 3, H, W).
        scores: (N, K + 1, h, w), background first.
        tags: (N, K), 1 where present; absent classes come out 0.
        boxes: int (N, 4): top, bottom, left, right of the image in its crop.
        rule: Its refiner and stride.

    Returns:
        (N, K + 1, H, W), 0 outside the boxes.
    """
    size = image.shape[-2:]
    raised = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    out = torch.zeros_like(raised)
    for number, (top, bottom, left, right) in enumerate(boxes.tolist()):
        if bottom <= top or right <= left:
            continue
        keys = torch.cat([torch.ones_like(tags[number, :1]), tags[number]]).eq(1).nonzero().flatten()
        part = raised[number : number + 1, keys, top:bottom, left:right]
        if rule.refiner is not None:
            small = (max(1, (bottom - top) // rule.stride), max(1, (right - left) // rule.stride))
            guide = F.interpolate(
                image[number : number + 1, :, top:bottom, left:right].to(part.dtype),
                size=small,
                mode="bilinear",
                align_corners=False,
            )
            part = refine(part.contiguous(), guide.contiguous(), rule.refiner)
            part = F.interpolate(part, size=(bottom - top, right - left), mode="bilinear", align_corners=False)
        out[number, keys, top:bottom, left:right] = part[0]
    return out
