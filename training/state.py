"""The training state on disk: written atomically, read back exactly, told apart from a model.

`checkpoint.pt` holds what is needed to go on as if nothing had happened: network, method, optimiser, moving average,
iteration, random states and the best result so far. `model.pt` holds what is needed to segment. The first is read by
`--resume`, the second by `--weights` of a later run (fine-tuning) and by every runtime.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from training.recipe import Recipe, dump_recipe
from wsss_deploy.artifact import TRAINING_STATE_FORMAT
from wsss_deploy.errors import TrainingError
from wsss_deploy.files import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKPOINT = "checkpoint.pt"


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from."""
    # The stubs allow for a dictionary, too, which numpy gives of generators other than its own.
    _, key, position, *_ = cast("tuple[str, NDArray[np.uint32], int, int, float]", np.random.get_state(legacy=True))
    state: dict[str, Any] = {
        "python": list(random.getstate()[1]),
        "numpy": [key.tolist(), int(position)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    random.setstate((3, tuple(state["python"]), None))
    np.random.set_state(("MT19937", np.array(state["numpy"][0], dtype=np.uint32), state["numpy"][1], 0, 0.0))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def recipe_digest(recipe: Recipe) -> str:
    """Digest of all that decides what a run computes; where and how often it saves does not."""
    plain = recipe.model_copy(update={"checkpoint_every": 60.0, "workers": 0})
    return hashlib.sha256(dump_recipe(plain).encode()).hexdigest()


def save_checkpoint(path: Path, recipe: Recipe, state: dict[str, Any]) -> None:
    """Write the training state atomically."""
    content = {
        "format": TRAINING_STATE_FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "digest": recipe_digest(recipe),
        **state,
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Read a training state that was written for this recipe.

    Raises:
        TrainingError: There is none, it is damaged, or it belongs to another recipe (the differing keys are named).
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no checkpoint to resume from; leave --resume out to start, or check --out")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise almost anything on files of other kinds
        raise TrainingError(
            f"{path}: damaged or no checkpoint of this package; start again without --resume"
        ) from error
    if not isinstance(content, dict) or content.get("format") != TRAINING_STATE_FORMAT:
        raise TrainingError(f"{path}: not a training state; --resume reads {CHECKPOINT}, fine-tuning takes --weights")
    if content["digest"] != recipe_digest(recipe):
        changed = _differences(content["recipe"], recipe.model_dump(mode="json"))
        if changed and all(_lacks(content["recipe"], key) for key in changed):
            raise TrainingError(
                f"{path}: was written by a version of this package without {', '.join(changed)}; start a new run with "
                "another --out"
            )
        raise TrainingError(
            f"{path}: was written by another recipe (differs in {', '.join(changed) or 'format'}); resume with the "
            "run's own recipe.yaml, or start a new run with another --out"
        )
    if recipe.method.name == "tscd":
        content["module"] = {_moved(name): value for name, value in content["module"].items()}
    return content


def _moved(name: str) -> str:
    """Where a tensor of `tscd` lies since its classifier may be of several kinds."""
    old = "method.head."
    return f"method.classifier.head.{name.removeprefix(old)}" if name.startswith(old) else name


def _lacks(values: Any, key: str) -> bool:
    """Whether nested mappings have no entry of a dotted name."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return True
        values = values[part]
    return False


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            name = f"{prefix}.{key}".strip(".")
            # What is not there differs from null, too.
            found += _differences(old[key], new[key], name) if key in old and key in new else [name]
        return found
    return [] if old == new else [prefix]
