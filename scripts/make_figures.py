"""Draw the figures in images/: python scripts/make_figures.py [--out DIR]

The same code always gives the same bytes, so a test can compare the files in images/
with `figures()`. Where ranks are drawn, a tp_rank is a color, a dp_rank a gray band.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.figures import collectives, house, lora, mesh, sharding, step

IMAGES = Path(__file__).resolve().parents[1] / "images"


def figures() -> dict[str, str]:
    """The text of every figure, by file name."""
    draw = (
        mesh.device_mesh,
        sharding.column_row_parallel,
        collectives.collectives,
        sharding.two_dimensional,
        step.one_step,
        sharding.fused_weights,
        lora.lora,
        house.house,
    )
    return {f"{function.__name__}.svg": function().svg() for function in draw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures().items():
        (folder / name).write_text(svg, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
