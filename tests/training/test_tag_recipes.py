"""The packaged recipes of image tags: complete, and trainable on a few images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.recipe import build_recipe, merge, read_recipe
from training.recipes import find_recipe, packaged_recipes
from training.run import run
from wsss_deploy.networks import encoder_preprocessing

NAMES = ("tscd_voc", "tscd_coco", "sfc_voc")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos") / "photos"
    for folder in ("images", "masks", "splits"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"p{index}" for index in range(4)]
    for index, name in enumerate(names):
        mask = np.zeros((64, 80), np.uint8)
        mask[10:50, 10:50] = 1 + index % 2
        image = rng.integers(0, 60, (64, 80, 3)) + 150 * (mask > 0)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "tags.json").write_text(json.dumps({name: [1 + i % 2] for i, name in enumerate(names)}))
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    for split in ("train_aug", "train2014"):
        (root / "splits" / f"{split}.txt").write_text("\n".join(names) + "\n")
    for split in ("val", "val2014"):
        (root / "splits" / f"{split}.txt").write_text(names[0] + "\n")
    return open_dataset(root)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_figures(name):
    assert name in packaged_recipes()
    recipe = build_recipe(read_recipe(find_recipe(name)))
    assert recipe.supervision == "tags"
    assert encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options).stride in (16, 32)
    if recipe.method.name == "tscd":
        run = recipe.optimisation
        assert (run.learning_rate, run.schedule) == (6e-5, "switch")
        assert run.warmup * run.iterations == pytest.approx(1500)
        assert recipe.method.start * run.iterations in (2000, 5000)
    else:
        assert recipe.method.cam_iterations == 3966


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_on_a_few_images(name, photos, tmp_path):
    """As published, but for a small encoder without weights and two steps."""
    encoder = "resnet10t" if name == "sfc_voc" else "test_vit"
    small = {
        "model": {"encoder": encoder, "weights": "none", "drop_path": 0.0, "decoder_width": 16},
        "augmentation": {"size": 64},
        "optimisation": {"iterations": 2, "batch_size": 2},
        "evaluation": {"every": 2},
        "device": "cpu",
    }
    values = merge(read_recipe(find_recipe(name)), small)
    start = {"cam_iterations": 2, "cam_long_side": 64} if name == "sfc_voc" else {"start": 0.0, "samples": 4}
    values["method"] = values["method"] | start
    result = run(build_recipe(values), photos, tmp_path / "run", show=False)
    assert result.trained.result.images == 1
    assert all(value.isfinite().all() for value in result.trained.state.values())
