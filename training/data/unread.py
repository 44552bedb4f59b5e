"""Files among the images that are not read: of another format, without an ending, or in a subfolder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from training.data.dataset import counted
from training.data.reading import IMAGE_SUFFIXES

# Files that lie beside an image under its name: phones, annotation tools and converters leave them.
_COMPANIONS = frozenset(
    {".aae", ".csv", ".json", ".md", ".mov", ".mp4", ".npy", ".npz", ".txt", ".xml", ".xmp", ".yaml", ".yml"}
)


class UnreadFiles:
    """What lies in a folder of images but is none of its images. Hidden files and folders do not count.

    Args:
        folder: The folder of images; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._other: list[Path] = []
        self._nested: list[Path] = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                self._nested += [file for file in sorted(path.rglob("*")) if file.is_file() and self._is_visible(file)]
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                self._other.append(path)
        self._by_name: dict[str, Path] = {}
        for file in (*self._other, *self._nested):
            if file.suffix.lower() in _COMPANIONS:
                continue
            for name in (file.stem, file.name, file.relative_to(folder).as_posix()):
                self._by_name.setdefault(name, file)

    def find(self, name: str) -> Path | None:
        """The unread file that an image name means, with or without folder and ending; no annotations or videos.

        Args:
            name: As a list or a JSON file gives it.
        """
        return self._by_name.get(name) or self._by_name.get(Path(name).name)

    def is_nested(self, name: str) -> bool:
        """Whether `name` is the path, relative to the folder of images, of a file in a subfolder."""
        return "/" in name and name in self._by_name

    def remarks(self) -> list[str]:
        """A line for the files of formats that are not read, and one for those in subfolders."""
        lines = []
        if self._other:
            endings = Counter(path.suffix.lower() or "no ending" for path in self._other)
            ranked = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
            listed = ", ".join(f"{ending} {count}" for ending, count in ranked)
            lines.append(f"{_are_not_read(self._other)} ({listed}): {_CONVERT} if they are images")
        if self._nested:
            first = self._nested[0].relative_to(self._folder).as_posix()
            lines.append(f"{_are_not_read(self._nested)}, since in subfolders (first: {first}): {self._move}")
        return lines

    def describe(self, entries: dict[str, Path]) -> list[str]:
        """What to say of names that mean unread files, one line a remedy.

        Args:
            entries: Such a file (of `find`) by the name that means it.
        """
        lines = []
        for remedy, nested in ((_CONVERT, False), (self._move, True)):
            some = [(name, file) for name, file in entries.items() if (file.parent != self._folder) == nested]
            if some:
                name, file = some[0]
                path = file.relative_to(self._folder.parent).as_posix()
                files = "a file that is" if len(some) == 1 else "files that are"
                lines.append(f"{counted(len(some), 'name')} of {files} not read (first: '{name}' is {path}); {remedy}")
        return lines

    @property
    def _move(self) -> str:
        return f"move them into {self._folder.name}/ itself"

    def _is_visible(self, file: Path) -> bool:
        return not any(part.startswith(".") for part in file.relative_to(self._folder).parts)


_CONVERT = "convert them to JPEG or PNG"


def _are_not_read(files: Sequence[Path]) -> str:
    return f"{counted(len(files), 'file')} {'is' if len(files) == 1 else 'are'} not read"
