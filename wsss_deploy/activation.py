"""Class activation maps of a `cams.pt`, which a training from tags writes beside its model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Name of the file beside `model.pt`.
CAMS = "cams.pt"
#: What the decoder `cam` adds to a map before its logarithm becomes the logit (`wsss_deploy.networks.decoder`).
FLOOR = 1e-4


def activation_maps(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The maps that stand behind the softmax scores of a network with decoder `cam` or `cam-plain`.

    The logit of class k is log(a_k + `FLOOR`) and that of class 0 is 0, so a_k = s_k / s_0 - `FLOOR`.

    Args:
        scores: (C, H, W), not refined, for example `Segmentation.network_scores`.

    Returns:
        (C, H, W), not negative; 0 for class 0, the background.
    """
    maps: npt.NDArray[np.float32] = (scores / np.maximum(scores[:1], 1e-12) - FLOOR).clip(0)
    maps[0] = 0
    return maps
