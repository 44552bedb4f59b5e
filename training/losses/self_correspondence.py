"""Self correspondence distillation and scale consistency: what CAMs of two views say about segmentation logits.

Xu et al., "Self Correspondence Distillation for End-to-End Weakly-Supervised Semantic Segmentation", AAAI 2023,
arXiv 2302.13765. Defects of the released code and our decisions: docs/tags.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.errors import UsageError

ConsistencyMode = Literal["parity", "repaired"]
CorrespondenceMode = Literal["parity", "repaired"]


def draw_coordinates(count: int, samples: int, like: Tensor, valid: Tensor | None = None) -> Tensor:
    """Random sampling positions, uniform in [-1, 1].

    Args:
        count: Images N.
        samples: Points a side S.
        like: Gives device and type (float32 at least).
        valid: bool (N, H, W), true inside a rectangle of each image, in which positions then lie. None: everywhere.

    Returns:
        (N, S, S, 2), (x, y).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    found = torch.rand(count, samples, samples, 2, device=like.device, dtype=dtype)
    if valid is not None:
        # Centres of the outermost valid pixels, in x and y; an image without any is taken as a whole.
        spans = []
        for dim in (1, 2):
            inside = valid.any(dim=dim)
            inside = (inside | ~inside.any(dim=1, keepdim=True)).to(dtype)
            last = inside.shape[1] - 1
            low, high = inside.argmax(dim=1), last - inside.flip(1).argmax(dim=1)
            spans.append(torch.stack([low, high]) / max(1, last))
        low, high = torch.stack(spans, dim=2)[:, :, None, None].unbind(0)
        found = low + found * (high - low)
    return found * 2 - 1


def sample_points(maps: Tensor, coordinates: Tensor) -> Tensor:
    """Values of maps at continuous positions: bilinear, border padding, -1 and 1 are the outermost pixels' centres.

    Args:
        maps: (N, C, H, W).
        coordinates: (N, S, S, 2), (x, y); sample (i, j) takes the position at [j, i], as the release does.

    Returns:
        (N, C, S, S).
    """
    grid = coordinates.transpose(1, 2).to(maps)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=True)


def self_correspondence_loss(
    cams: Tensor,
    small_cams: Tensor,
    logits: Tensor,
    small_logits: Tensor,
    coordinates: Tensor,
    small_coordinates: Tensor,
    mode: CorrespondenceMode = "parity",
) -> Tensor:
    r"""Pull the similarities of segmentation logits towards those of CAMs.

    F is the cosine of CAM vectors at all pairs of points (one in each view), centred over the second view's points
    with the batch's mean put back; S is the cosine of the logits at the same pairs.

    .. math:: L = -\operatorname{mean}(\max(S, 0) \cdot F)

    CAM vectors are nowhere negative, so F seldom is: positions of different classes may stay as alike as they are, and
    logits that are the same everywhere are at the optimum. Without the batch's mean ("repaired") F sums to 0, and
    pairs that are less alike than others are pushed apart.

    Bounded: usually negative at its optimum, and |L| <= max |F| <= about 2. Pairs lie within one image. A zero CAM
    vector has similarity 0 to everything. Computed in float32 at least.

    Args:
        cams: CAMs of the first view (N, K, H1, W1); no gradient.
        small_cams: CAMs of the second view (N, K, H2, W2); no gradient.
        logits: Raw logits of the first view (N, C, h1, w1), any size: positions are relative.
        small_logits: Raw logits of the second view (N, C, h2, w2).
        coordinates: Positions in the first view (N, S, S, 2), see `draw_coordinates`.
        small_coordinates: Positions in the second view.
        mode: "parity" puts the batch's mean back, as released; "repaired" does not.

    Returns:
        Scalar, float32 or float64.

    Raises:
        UsageError: Channels or batch sizes that do not agree.
    """
    for name, first, second in (("cams", cams, small_cams), ("logits", logits, small_logits)):
        if first.ndim != 4 or second.ndim != 4 or first.shape[:2] != second.shape[:2]:
            raise UsageError(
                f"{name} of the two views are {tuple(first.shape)} and {tuple(second.shape)}; expected (N, channels, "
                "height, width) with equal N and channels"
            )
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        with torch.no_grad():
            target = _similarities(cams.to(dtype), small_cams.to(dtype), coordinates, small_coordinates)
            # The release: subtract each point's mean, then add what the mean of everything has lost by that.
            back = target.mean() if mode == "parity" else 0.0
            target = target - target.mean(dim=(3, 4), keepdim=True) + back
        found = _similarities(logits.to(dtype), small_logits.to(dtype), coordinates, small_coordinates)
        return -(found.clamp(min=0) * target).mean()


class SelfCorrespondenceLoss(nn.Module):
    """`self_correspondence_loss` at random points.

    Args:
        samples: Points a side; the cost is the fourth power of it (40: 10 MB an image and tensor in float32).
        mode: See the function.
    """

    def __init__(self, samples: int = 40, mode: CorrespondenceMode = "parity") -> None:
        super().__init__()
        self.samples, self.mode = samples, mode

    def forward(
        self, cams: Tensor, small_cams: Tensor, logits: Tensor, small_logits: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Scalar loss; arguments as in the functions. Draws from torch's generator, the first view first."""
        first, second = (draw_coordinates(len(logits), self.samples, logits, valid) for _ in range(2))
        return self_correspondence_loss(cams, small_cams, logits, small_logits, first, second, self.mode)

    def extra_repr(self) -> str:
        """The number of points for `print`."""
        return f"samples={self.samples}, mode={self.mode!r}"


def scale_consistency_loss(cams: Tensor, small_cams: Tensor, mode: ConsistencyMode = "repaired") -> Tensor:
    """Mean difference of the CAMs of an image and of its smaller view.

    Args:
        cams: (N, K, H, W), without a background channel.
        small_cams: (N, K, h, w).
        mode: "parity" is the released code: both sides constants, so that the term has no gradient at all, and
            channel 0 left out as if it were a background (it is the first class). "repaired" takes all classes and
            lets the gradient into both sides; give it CAMs that have one.

    Returns:
        Scalar; 0 in "parity" mode with a single class.
    """
    if mode == "parity":
        cams, small_cams = cams.detach()[:, 1:], small_cams.detach()[:, 1:]
        if not cams.shape[1]:
            return cams.new_zeros(())
    shrunk = F.interpolate(cams, size=small_cams.shape[-2:], mode="bilinear", align_corners=True)
    return (shrunk - small_cams).abs().mean()


def _similarities(first: Tensor, second: Tensor, coordinates: Tensor, second_coordinates: Tensor) -> Tensor:
    """Cosines (N, S, S, S, S) of the vectors at the points of two views."""
    left, right = (
        F.normalize(sample_points(maps, where), dim=1, eps=1e-10)
        for maps, where in ((first, coordinates), (second, second_coordinates))
    )
    return torch.einsum("nchw,ncij->nhwij", left, right)
