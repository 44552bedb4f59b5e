"""What a run shows and keeps: a progress bar, `log.csv` and TensorBoard events."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)

# Seconds after which a line is due although less than a tenth of the run is done.
_SILENCE = 30.0


class RunReport:
    """Collects the figures of a run; use as a context manager.

    Args:
        folder: Run folder; `log.csv` and `tensorboard/` are written there.
        total: Iterations of the whole run.
        start: First iteration of this process; rows of a resumed run from there on are dropped, they come again.
        show: Draw a progress bar (on a terminal) or print a line now and then (elsewhere).
        every: Iterations between rows of the log.
    """

    def __init__(self, folder: Path, total: int, start: int = 0, show: bool = True, every: int = 10) -> None:
        self._path = folder / "log.csv"
        self._total, self._start, self._every = total, start, every
        self._rows = _read_rows(self._path, before=start)
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
        self._sums: dict[str, float] = {}
        self._count, self._images = 0, 0
        self._clock = self._told = time.perf_counter()
        console = Console(file=sys.stderr)
        self._lines = show and not console.is_terminal
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not show or not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total, completed=start, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._save_rows()
        self._writer.close()

    def step(self, iteration: int, losses: Mapping[str, float], rate: float, images: int) -> None:
        """Add one iteration's figures.

        Args:
            iteration: 0-based.
            losses: Weighted loss terms.
            rate: Base learning rate.
            images: Images of the step.
        """
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._images += images
        done = iteration + 1
        if done % self._every and done != self._total:
            self._progress.update(self._task, completed=done)
            return
        now = time.perf_counter()
        means = {name: total / self._count for name, total in self._sums.items()}
        throughput = self._images / max(now - self._clock, 1e-9)
        figures = " ".join(f"{name} {value:.3f}" for name, value in means.items()) + f" | {throughput:.1f} images/s"
        self._progress.update(self._task, completed=done, figures=figures)
        tenth = done % max(self._every, self._total // 10) < self._every or done == self._total
        if self._lines and (tenth or now - self._told > _SILENCE):
            self._told = now
            # Seconds per step over this window give the time that is left; good to a few percent.
            left = (self._total - done) * (now - self._clock) / self._count
            _log.info("%d/%d  %s  ETA %d s", done, self._total, figures, left)
        self.record(
            done,
            {f"loss/{name}": value for name, value in means.items()}
            | {
                "learning_rate": rate,
                "images_per_second": throughput,
            },
        )
        self._sums, self._count, self._images = {}, 0, 0
        self._clock = time.perf_counter()

    def record(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Write figures of an iteration (a count of finished steps) to the log and to TensorBoard."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, iteration)
            self._rows.append({"iteration": iteration, "figure": name, "value": value})

    def pause(self) -> None:
        """Leave out the time until now from the throughput (an evaluation ran)."""
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """Bring log and events to disk; called with each checkpoint."""
        self._save_rows()
        self._writer.flush()

    def _save_rows(self) -> None:
        with self._path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["iteration", "figure", "value"])
            writer.writeheader()
            writer.writerows(self._rows)


def _read_rows(path: Path, before: int) -> list[dict[str, Any]]:
    if not before or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        return [row for row in csv.DictReader(handle) if int(row["iteration"]) <= before]
