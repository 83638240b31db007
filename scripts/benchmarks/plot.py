"""One plot of several tables: how long a step takes, relative to one process."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

Ratios = dict[str, list[float]]  # by row, one for each round


def draw(tables: dict[str, Ratios], path: Path) -> None:
    """Bars side by side for each table, with lines from the lowest to the highest."""
    names = list(dict.fromkeys(name for rows in tables.values() for name in rows))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(names)))
    height = 0.8 / len(tables)
    for index, (title, rows) in enumerate(tables.items()):
        places = [p + index * height for p, n in enumerate(names) if n in rows]
        values = [rows[name] for name in names if name in rows]
        middle = [median(row) for row in values]
        spread = [
            [m - min(row) for m, row in zip(middle, values, strict=True)],
            [max(row) - m for m, row in zip(middle, values, strict=True)],
        ]
        axes.barh(places, middle, height, xerr=spread, label=title, capsize=2)
    axes.set_yticks([p + 0.4 - height / 2 for p in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xlabel("time of a step, relative to one process with all cores")
    axes.legend(title="parameters")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=150)
    plt.close(figure)


def draw_growth(tables: dict[str, tuple], path: Path) -> None:
    """A panel for each table: what was measured, and what theory says."""
    figure, panels = plt.subplots(1, len(tables), squeeze=False)
    figure.set_size_inches(4 * len(tables), 3.5)
    for axes, (title, (unit, values, theory)) in zip(
        panels[0], tables.items(), strict=True
    ):
        places, first = range(len(values)), median(next(iter(values.values())))
        lowest, highest = (list(map(f, values.values())) for f in (min, max))
        axes.fill_between(places, lowest, highest, alpha=0.3)
        axes.plot(places, [median(row) for row in values.values()], "o-", label=unit)
        axes.plot(places, [first * each for each in theory], "k--", label="in theory")
        axes.set_xticks(places, values, rotation=30, ha="right")
        axes.set_yscale("log")
        axes.set_title(title)
        axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)
    plt.close(figure)
