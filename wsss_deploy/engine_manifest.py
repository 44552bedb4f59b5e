"""`model.engine.json`: what a TensorRT engine was built for and from, checked before the engine is loaded.

An engine runs only under the TensorRT that built it and on the kind of GPU that it was built on. TensorRT itself says
so late and in its own words; the manifest lets us say it at once, in a sentence with the command that builds it anew.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.pairwise.cuda_source import source

SUFFIX = ".json"
_LARGEST = 16 * 2**20

Side = Annotated[int, Field(ge=1, le=65536)]
#: Batch, height, width.
Shape = tuple[Side, Side, Side]
#: Smallest, best, largest.
Shapes = tuple[Shape, Shape, Shape]
#: Plugins of an engine that refines.
PLUGINS = ("PairwiseAffinity", "PairwiseStep")

_log = logging.getLogger(__name__)


class EngineManifest(BaseModel):
    """What is known of an engine.

    Attributes:
        format_version: Of this file.
        tensorrt: Version that built it.
        gpu: Name of the GPU that it was built on.
        compute_capability: Of that GPU, for example "9.0".
        shapes: Smallest, best and largest batch, height and width.
        plugins: Plugins inside the engine, and SHA-256 of the program that they were compiled from.
        engine_sha256: Of the engine.
        onnx_sha256: Of the graph that it was built from.
        command: What builds it anew.
        card: The model's card.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    tensorrt: str
    gpu: str
    compute_capability: str
    shapes: Shapes
    plugins: dict[str, str] = Field(default_factory=dict)
    engine_sha256: str
    onnx_sha256: str
    command: str
    card: ModelCard

    @model_validator(mode="after")
    def _ordered(self) -> EngineManifest:
        smallest, best, largest = self.shapes
        if not all(low <= middle <= high for low, middle, high in zip(smallest, best, largest, strict=True)):
            raise ValueError(f"shapes are not ordered: {self.shapes}")
        return self

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a batch, height and width lie within the profile."""
        low, _, high = self.shapes
        return all(small <= side <= large for small, side, large in zip(low, shape, high, strict=True))

    def range_text(self) -> str:
        """The allowed range in words."""
        low, _, high = self.shapes
        return (
            f"{low[0]} to {high[0]} images of {low[1]} to {high[1]} pixels in height and {low[2]} to {high[2]} in width"
        )

    def check_machine(self, engine: Path, tensorrt: str, gpu: str, compute_capability: str) -> None:
        """Check that an engine can run here.

        Args:
            engine: Its path, for the error.
            tensorrt: Version that is installed.
            gpu: Name of the GPU.
            compute_capability: Of the GPU.

        Raises:
            BackendError: It cannot.
        """
        if tensorrt != self.tensorrt:
            raise BackendError(
                f"{engine}: was built by TensorRT {self.tensorrt}, installed is {tensorrt}; build it anew: "
                f"{self.command}"
            )
        if compute_capability != self.compute_capability:
            raise BackendError(
                f"{engine}: was built on {self.gpu} (compute capability {self.compute_capability}), here is {gpu} "
                f"({compute_capability}); build it anew here: {self.command}"
            )
        if gpu != self.gpu:
            _log.warning("%s: was built on %s, here is %s of the same compute capability", engine, self.gpu, gpu)


def plugin_digests(refinement: Refinement | None) -> dict[str, str]:
    """Plugins that an engine of a graph has inside, with SHA-256 of this release's program for them.

    Args:
        refinement: The card's; only one in the graph, without mean field, is done by plugins.
    """
    if refinement is None or not refinement.in_graph or refinement.parameters.mean_field is not None:
        return {}
    # Of what is compiled: neither comments nor blanks make another program.
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source(refinement.parameters), flags=re.DOTALL)
    return dict.fromkeys(PLUGINS, hashlib.sha256(" ".join(text.split()).encode()).hexdigest())


def manifest_path(engine: Path) -> Path:
    """The manifest beside an engine."""
    return engine.with_name(engine.name + SUFFIX)


def read_manifest(engine: Path) -> EngineManifest:
    """Read the manifest of an engine; the engine itself is not touched.

    Args:
        engine: The engine.

    Raises:
        ArtifactError: There is none, or it is damaged.
    """
    path = manifest_path(engine)
    try:
        if not path.is_file():
            raise ArtifactError(
                f"{engine}: has no {path.name} beside it (card, TensorRT version, GPU); copy it there, too, or build "
                "the engine with wsss-export --format engine"
            )
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(f"{path}: is no manifest ({path.stat().st_size >> 20} MiB); build the engine again")
        return EngineManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "manifest"
        raise ArtifactError(f"{path}: is damaged ({where}: {item['msg']}); build the engine again") from error


def read_engine(engine: Path, manifest: EngineManifest) -> bytes:
    """The engine's bytes, which have to be those that the manifest speaks of, with the plugins that its card asks for.

    Args:
        engine: The engine.
        manifest: Its manifest.

    Raises:
        ArtifactError: They are not.
    """
    if manifest.plugins != plugin_digests(manifest.card.refinement):
        raise ArtifactError(
            f"{engine}: refines by other kernels than this release has for its card (plugins: "
            f"{', '.join(manifest.plugins) or 'none'}); build it anew: {manifest.command}"
        )
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{engine}: cannot be read ({error.strerror or error}); check its permissions") from error
    if hashlib.sha256(content).hexdigest() != manifest.engine_sha256:
        raise ArtifactError(
            f"{engine}: is not the engine that its manifest speaks of (cut short, changed or of another build, as "
            f"after an export that was killed); copy both again, or build it anew: {manifest.command}"
        )
    return content
