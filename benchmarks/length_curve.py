"""How little annotation is enough: mIoU against the length of scribbles, as a table and a PNG.

Runs (or reads) the settings of `benchmarks/real_data.py` with parts of the scribbles' length; 0 is a point a region, 1
the whole scribble, and the line above is the supervised twin. Needs matplotlib, which the extra `dev` brings.

    python -m benchmarks.length_curve --shared SHARED --out runs --seeds 0 1 2 --png curve.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.real_data import SETTINGS, run, run_options, summarise, table

LENGTHS = {
    0.0: "voc-scribbles-length-0",
    0.3: "voc-scribbles-length-0.3",
    0.5: "voc-scribbles-length-0.5",
    1.0: "voc-scribbles-gated",
}
TWIN = "voc-masks"


def draw(rows: dict[str, dict], path: Path) -> None:
    """The curve with every seed's value, the mean joined, and the twin's mean and range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for length, name in LENGTHS.items():
        axes.plot([length] * len(rows[name]["values"]), [100 * v for v in rows[name]["values"]], "o", color="#9bb8d3")
    means = [100 * rows[name]["mean"] for name in LENGTHS.values()]
    axes.plot(list(LENGTHS), means, "o-", color="#1f4e79", label="scribbles, Gated CRF loss")
    twin = rows[TWIN]
    axes.axhline(100 * twin["mean"], color="#b03a2e", label="full masks")
    if len(twin["values"]) > 1:
        axes.axhspan(100 * min(twin["values"]), 100 * max(twin["values"]), color="#b03a2e", alpha=0.12, linewidth=0)
    for length, mean in zip(LENGTHS, means, strict=True):
        axes.annotate(f"{mean:.1f}", (length, mean), textcoords="offset points", xytext=(-8, 6), ha="right")
    axes.set_xlabel("length of every scribble (0: a point, 1: along the whole region)")
    axes.set_ylabel("mIoU on val, %")
    axes.set_xticks(list(LENGTHS))
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = run_options(__doc__)
    parser.add_argument("--png", type=Path, help="PNG to write")
    options = parser.parse_args()
    names = [TWIN, *LENGTHS.values()]
    chosen = [setting for name in names for setting in SETTINGS if setting.name == name]
    records = {setting.name: [run(setting, seed, options) for seed in options.seeds] for setting in chosen}
    rows = [summarise(setting, records[setting.name]) for setting in chosen]
    print(table(rows, options, records))
    if options.png:
        draw({row["setting"]: row for row in rows}, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
