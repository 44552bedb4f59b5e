"""The network as it is deployed: bytes of an image in, probabilities and class ids out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.card import Preprocessing, Refinement
from wsss_deploy.networks.network import SegmentationNetwork
from wsss_deploy.pairwise import reference, torch_ops
from wsss_deploy.pairwise.guides import make_guide
from wsss_deploy.refinement import keep_lone


class DeployedNetwork(nn.Module):
    """Normalisation, padding, network, softmax and argmax in one module; this is what export traces.

    Args:
        network: Gives logits.
        preprocessing: Normalisation and stride, from the card.
    """

    def __init__(self, network: SegmentationNetwork, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.stride = preprocessing.stride
        self.fixed_size = preprocessing.fixed_size
        mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
        # (value / 255 - mean) / std as one multiplication and one addition.
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1.0 / (255.0 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Segment images.

        Args:
            image: uint8 (N, H, W, 3), RGB; any H and W, up to `fixed_size` where the preprocessing has one.

        Returns:
            Probabilities float32 (N, C, H, W), and class ids uint8 (N, H, W).
        """
        height, width = image.shape[1], image.shape[2]
        padded = self._pad(image).permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
        logits = self.network(padded)
        logits = F.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        scores = logits[:, :, :height, :width].float().softmax(dim=1)
        return scores, scores.argmax(dim=1).to(torch.uint8)

    def _pad(self, image: Tensor) -> Tensor:
        # Edge values to the right and below, as indices: cheap on bytes, and any amount is allowed for any size.
        for dim in (1, 2):
            size = image.shape[dim]
            # Not -(-a // b): ONNX divides towards zero.
            padded = self.fixed_size or (size + self.stride - 1) // self.stride * self.stride
            index = torch.arange(padded, device=image.device).clamp(max=size - 1)
            image = image.index_select(dim, index)
        return image


class RefinedNetwork(nn.Module):
    """A deployed network and the refinement of its scores by the plain torch form; the operator's nodes stay visible.

    Args:
        deployed: Gives the scores.
        refinement: Operator and guide.
    """

    def __init__(self, deployed: DeployedNetwork, refinement: Refinement) -> None:
        super().__init__()
        self.deployed = deployed
        self.refinement = refinement

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Segment images; shapes as in `DeployedNetwork.forward`."""
        parameters = self.refinement.parameters
        told = parameters.to_json(), "torch", 1
        scores, _ = self.deployed(image)
        weights = torch_ops.pairwise_affinity(make_guide(image, self.refinement.guide), *told)
        unary = reference.unary_of(scores, parameters)
        refined = scores
        for _ in range(parameters.iterations):
            refined = torch_ops.pairwise_step(refined, weights, unary, *told)
        refined = keep_lone(refined, scores, parameters)
        return refined, refined.argmax(dim=1).to(torch.uint8)
