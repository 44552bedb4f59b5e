"""Curves as SVG in the page's own colours; no script, no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 220, 70, 12, 16, 32
_COLORS = ("#0d9488", "#d97706", "#7c3aed", "#dc2626", "#2563eb", "#65a30d")
_MOST_POINTS = 400

Curve = Sequence[tuple[int, float]]


def curves(figures: Mapping[str, Curve], total: int, title: str) -> str:
    """Draw figures over iterations, from 0 to the end of the run, values from 0 up.

    Args:
        figures: (iteration, value) by name.
        total: Iterations of the whole run.
        title: What the chart shows.

    Returns:
        SVG with a legend; a note where there is nothing to draw yet.
    """
    shown = {name: points for name, points in figures.items() if points}
    if not shown:
        return f'<p class="note">{escape(title)}: no figures yet; the first come some seconds after the start.</p>'
    highest = max(value for points in shown.values() for _, value in points)
    highest = highest if highest > 0 else 1.0
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    lines = []
    for index, points in enumerate(shown.values()):
        step = -(-len(points) // _MOST_POINTS)
        kept = [*points[:-1:step], points[-1]]
        places = [
            f"{_LEFT + plot_width * min(1, iteration / total):.1f},"
            f"{_TOP + plot_height * (1 - max(value, 0) / highest):.1f}"
            for iteration, value in kept
        ]
        color = _COLORS[index % len(_COLORS)]
        lines.append(
            f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-linejoin="round" stroke-linecap="round"/>'
        )
        x, y = places[-1].split(",")
        lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_TOP + plot_height * part}" y2="{_TOP + plot_height * part}" '
        f'stroke="currentColor" stroke-opacity="0.18"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + plot_height * part + 4}" text-anchor="end">{highest * (1 - part):.3g}</text>'
        for part in (0, 0.5, 1)
    )
    ticks = "".join(
        f'<text x="{_LEFT + plot_width * part}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{round(total * part)}</text>'
        for part, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    )
    names = "".join(
        f'<li class="name"><span class="swatch" style="background:{_COLORS[index % len(_COLORS)]}"></span>'
        f"{escape(name)} {points[-1][1]:.3g}</li>"
        for index, (name, points) in enumerate(shown.items())
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}, over iterations">'
        f'{grid}{ticks}{"".join(lines)}</svg><ul class="chips">{names}</ul></figure>'
    )
