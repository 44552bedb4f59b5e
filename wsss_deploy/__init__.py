"""wsss-deploy: run segmenters that were trained from weak labels.

    from wsss_deploy import Segmenter

    segmenter = Segmenter("model.onnx")
    result = segmenter.predict("photo.jpg")
    result.mask, result.confidence, result.timing
    result.save("out")

Importing the package loads no runtime; torch or onnxruntime come in with the first model that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsss_deploy.card import ModelCard as ModelCard
    from wsss_deploy.errors import ArtifactError as ArtifactError
    from wsss_deploy.errors import BackendError as BackendError
    from wsss_deploy.errors import ImageError as ImageError
    from wsss_deploy.errors import WsssError as WsssError
    from wsss_deploy.images import load_image as load_image
    from wsss_deploy.segmentation import Segmentation as Segmentation
    from wsss_deploy.segmenter import Segmenter as Segmenter

    __version__: str

_HOME = {
    "ArtifactError": "errors",
    "BackendError": "errors",
    "ImageError": "errors",
    "ModelCard": "card",
    "Segmentation": "segmentation",
    "Segmenter": "segmenter",
    "WsssError": "errors",
    "load_image": "images",
}

__all__ = [
    "ArtifactError",
    "BackendError",
    "ImageError",
    "ModelCard",
    "Segmentation",
    "Segmenter",
    "WsssError",
    "__version__",
    "load_image",
]


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use (PEP 562), so that importing the package stays light."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("wsss-deploy")
        except PackageNotFoundError:  # run from a source tree that is not installed
            value = "0+unknown"
    elif name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
