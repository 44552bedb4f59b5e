"""Looking at every file of a data set: counts per split, kind and class, and all problems in one list."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import KINDS, PIXEL_KINDS, CheckedSource, Problem, counted, has_background
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError

NO_SPLIT = "(no split)"


@dataclass
class ImageFacts:
    """What one image has.

    Attributes:
        digest: Of the file's bytes.
        kinds: Kinds of labels that the image should have, readable or not.
        pixels: Per kind (256,) pixel counts by id.
        tags: Tags, if any.
        compared: Per weak kind, how many of its pixels lie on a known mask pixel, and how many agree with it.
        problems: Of its files.
    """

    digest: str = ""
    kinds: frozenset[str] = frozenset()
    pixels: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    tags: tuple[int, ...] | None = None
    compared: dict[str, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Tally:
    """Sums over the images of a split.

    Attributes:
        images: Number of images.
        kinds: Images by kind of label.
        class_images: Per kind (K + 1,) images in which a class occurs; the last entry is 255.
        class_pixels: Per kind, except tags, (K + 1,) pixels.
        compared: Per weak kind: pixels on a known mask pixel, and how many of them agree.
    """

    images: int
    kinds: dict[str, int]
    class_images: dict[str, list[int]]
    class_pixels: dict[str, list[int]]
    compared: dict[str, tuple[int, int]]


@dataclass
class Report:
    """The whole data set; `splits` has an entry `NO_SPLIT` when some images are in none."""

    name: str
    classes: tuple[str, ...]
    images: int
    splits: dict[str, Tally]
    problems: list[Problem]

    @property
    def errors(self) -> int:
        """Number of problems that are errors."""
        return sum(problem.severity == "error" for problem in self.problems)

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self) | {"errors": self.errors, "remarks": len(self.problems) - self.errors}


def inspect(source: CheckedSource, root: Path, on_image: Callable[[], None] | None = None) -> Report:
    """Read every image and label.

    Args:
        source: The data set.
        root: Its folder; problems name files relative to it.
        on_image: Called after each image.
    """
    listed = dict.fromkeys(name for names in source.splits.values() for name in names)
    names = tuple(dict.fromkeys([*listed, *source.image_names]))
    facts: dict[str, ImageFacts] = {}
    # Decoding releases the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(names, pool.map(lambda name: _look(source, name, root), names), strict=True):
            facts[name] = found
            if on_image is not None:
                on_image()
    groups = dict(source.splits)
    rest = tuple(name for name in names if name not in listed)
    if rest:
        groups[NO_SPLIT] = rest
    splits = {split: _tally([facts[name] for name in group], len(source.classes)) for split, group in groups.items()}
    problems = list(source.problems)
    problems += [problem for found in facts.values() for problem in found.problems]
    problems += _unlabelled(facts, rest) + _overlaps(source.splits) + _duplicates(facts, source.splits)
    problems += _missing_classes(splits, source.classes) + _disagreement(splits)
    if not has_background(source.classes) and any(found.tags is not None for found in facts.values()):
        text = "tags alone cannot train a set whose class 0 is not called background; other labels of it can"
        problems.append(Problem("tags", text, "remark"))
    problems.sort(key=lambda problem: problem.severity)
    return Report(source.name, source.classes, len(names), splits, problems)


def _look(source: CheckedSource, name: str, root: Path) -> ImageFacts:
    facts = ImageFacts(kinds=source.kinds(name))
    try:
        facts.digest = hashlib.blake2b(source.image_path(name).read_bytes(), digest_size=16).hexdigest()
        source.load_image(name)
    except (DataError, OSError) as error:
        facts.problems.append(_as_problem(error, source.image_path(name), root))
        return facts
    labels: dict[str, NDArray[np.uint8]] = {}
    for kind in PIXEL_KINDS:
        if kind in facts.kinds:
            try:
                labels[kind] = source.load_labels(name, kind)
            except DataError as error:
                facts.problems.append(_as_problem(error, Path(kind) / name, root))
    facts.pixels = {kind: np.bincount(layer.ravel(), minlength=256) for kind, layer in labels.items()}
    for kind, counts in facts.pixels.items():
        if not counts[:IGNORE_INDEX].any():
            facts.problems.append(Problem(name, f"its {kind} hold no label, only {IGNORE_INDEX}", "remark"))
    try:
        facts.tags = source.tags(name)
    except DataError as error:
        facts.problems.append(_as_problem(error, Path("tags"), root))
    if facts.tags is not None:
        facts.problems += _tag_problems(name, facts, source.classes)
    if "masks" in labels:
        known = labels["masks"] != IGNORE_INDEX
        for kind in ("scribbles", "points"):
            if kind in labels:
                both = known & (labels[kind] != IGNORE_INDEX)
                agree = both & (labels[kind] == labels["masks"])
                facts.compared[kind] = (int(both.sum()), int(agree.sum()))
    return facts


def _as_problem(error: Exception, file: Path, root: Path) -> Problem:
    """A problem from an error whose message begins with a file's path, as those of the readers do."""
    first, _, rest = str(error).partition(": ")
    path = Path(first)
    if path.is_relative_to(root):
        return Problem(path.relative_to(root).as_posix(), rest)
    where = file.relative_to(root) if file.is_relative_to(root) else file
    return Problem(where.as_posix(), str(error))


def _tag_problems(name: str, facts: ImageFacts, classes: Sequence[str]) -> list[Problem]:
    problems = []
    tagged = set(facts.tags or ()) | ({0} if has_background(classes) else set())
    for kind, counts in facts.pixels.items():
        present = set(np.flatnonzero(counts[:IGNORE_INDEX]).tolist())
        absent = [classes[index] for index in sorted(present - tagged)]
        if absent:
            text = f"has {kind} of {', '.join(absent)}, but its tags say absent; correct the tags or the labels"
            # One of the two is wrong, but either can still be trained from.
            problems.append(Problem(f"{kind}/{name}", text, "remark"))
        missing = [classes[index] for index in sorted(set(facts.tags or ()) - present)]
        if missing and kind == "masks":
            text = f"the tags name {', '.join(missing)}, but the mask has none of it"
            problems.append(Problem(f"{kind}/{name}", text, "remark"))
    return problems


def _tally(group: Sequence[ImageFacts], classes: int) -> Tally:
    images = {kind: np.zeros(classes + 1, np.int64) for kind in KINDS}
    pixels = {kind: np.zeros(classes + 1, np.int64) for kind in PIXEL_KINDS}
    compared: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    kinds: Counter[str] = Counter()
    for facts in group:
        kinds.update(facts.kinds)
        for kind, counts in facts.pixels.items():
            row = np.append(counts[:classes], counts[IGNORE_INDEX])
            images[kind] += row > 0
            pixels[kind] += row
        for index in facts.tags or ():
            images["tags"][index] += 1
        for kind, (both, agree) in facts.compared.items():
            compared[kind][0] += both
            compared[kind][1] += agree
    here = [kind for kind in KINDS if kinds[kind]]
    return Tally(
        images=len(group),
        kinds={kind: kinds[kind] for kind in KINDS},
        class_images={kind: images[kind].tolist() for kind in here},
        class_pixels={kind: pixels[kind].tolist() for kind in here if kind in PIXEL_KINDS},
        compared={kind: (both, agree) for kind, (both, agree) in compared.items()},
    )


def _unlabelled(facts: Mapping[str, ImageFacts], rest: Sequence[str]) -> list[Problem]:
    problems = []
    bare = [name for name, found in facts.items() if not found.kinds]
    if bare:
        problems.append(Problem("images", f"{counted(len(bare), 'image')} without any label{_some(bare)}", "remark"))
    if rest:
        problems.append(Problem("splits", f"{counted(len(rest), 'image')} in no split{_some(rest)}", "remark"))
    return problems


def _overlaps(splits: Mapping[str, Sequence[str]]) -> list[Problem]:
    problems = []
    names = list(splits)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            common = sorted(set(splits[first]) & set(splits[second]))
            if common:
                # "trainval" is meant to hold both; anything else that mixes training and test spoils the figures.
                mixed = _role(first) and _role(second) and _role(first) != _role(second)
                text = f"splits {first} and {second} share {counted(len(common), 'image')}{_some(common)}"
                problems.append(
                    Problem("splits", f"{text}; take them off one of the two")
                    if mixed
                    else Problem("splits", text, "remark")
                )
    return problems


def _role(split: str) -> str:
    """What a split is for: "train", "val", "test", or "" where its name does not say or says several."""
    roles = [role for role in ("train", "val", "test") if role in split.lower()]
    return roles[0] if len(roles) == 1 else ""


def _duplicates(facts: Mapping[str, ImageFacts], splits: Mapping[str, Sequence[str]]) -> list[Problem]:
    copies: dict[str, list[str]] = defaultdict(list)
    for name, found in facts.items():
        if found.digest:
            copies[found.digest].append(name)
    roles: dict[str, set[str]] = defaultdict(set)
    for split, names in splits.items():
        for name in names:
            roles[name].add(_role(split))
    problems = []
    for names in copies.values():
        if len(names) > 1:
            mixed = len({role for name in names for role in roles[name] if role}) > 1
            text = f"the files of {', '.join(names)} are identical"
            problems.append(
                Problem("images", f"{text} and lie in different splits; keep one")
                if mixed
                else Problem("images", text, "remark")
            )
    return problems


def _missing_classes(splits: Mapping[str, Tally], classes: Sequence[str]) -> list[Problem]:
    problems = []
    for split, tally in splits.items():
        if split == NO_SPLIT or not tally.class_images:
            continue
        seen: NDArray[np.int64] = np.sum([counts[: len(classes)] for counts in tally.class_images.values()], axis=0)
        # Tags leave the background out, so only pixel labels can lack it.
        first = 1 if has_background(classes) and set(tally.class_images) == {"tags"} else 0
        if missing := [name for name, count in zip(classes[first:], seen[first:], strict=True) if not count]:
            problems.append(Problem("splits", f"{split} has no label of {', '.join(missing)}", "remark"))
    return problems


def _disagreement(splits: Mapping[str, Tally]) -> list[Problem]:
    problems = []
    for split, tally in splits.items():
        for kind, (both, agree) in tally.compared.items():
            if agree < both:
                text = f"{both - agree} of {both} pixels in {split} differ from the mask ({(both - agree) / both:.2%})"
                problems.append(Problem(kind, text, "remark"))
    return problems


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
