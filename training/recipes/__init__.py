"""Recipes that come with the package: published set-ups, found by name."""

from __future__ import annotations

from pathlib import Path

from wsss_deploy.errors import RecipeError

_FOLDER = Path(__file__).parent


def packaged_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def find_recipe(text: str) -> Path:
    """The recipe file that a user means: an existing file, else a packaged recipe of that name.

    Args:
        text: Path, or name with or without ".yaml".

    Raises:
        RecipeError: Neither; the packaged names are listed.
    """
    path = Path(text)
    if path.exists():
        return path
    name = text.removesuffix(".yaml")
    if name in packaged_recipes():
        return _FOLDER / f"{name}.yaml"
    known = ", ".join(packaged_recipes())
    raise RecipeError([f"{text}: cannot be read (no such file, no recipe of that name); packaged recipes: {known}"])
