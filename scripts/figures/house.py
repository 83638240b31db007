"""The layers of the package, as import-linter checks them."""

from __future__ import annotations

from scripts.figures.svg import BAND, PLAIN, Figure

# A paragraph for each layer, top to bottom; a dash separates what must stay apart.
LAYERS = """\
cli.py: the two commands
lessons/: what only notebooks need

cost/: what a rank will hold and send

fsdp/: DTensor inside FSDP2
-
autotp/: DeepSpeed AutoTP + ZeRO

flags.py: flags to TrainConfig
run/: start, place, loop, watch, restart, measure

checkpoint/: write, verify, restore
presets.py: demo or real run
data/: documents to batches
model/: the decoder

config.py: values only
mesh.py: (dp, tp) ranks

validation.py: rules
integrity.py: digests
store.py: disk or bucket"""

LEFT, TOP, WIDTH, HEIGHT = 54, 76, 686, 64  # of the first band
STEP, APART, PAD = 76, 56, 8


def draw_band(fig: Figure, x: float, y: float, width: float, boxes: list[str]) -> None:
    """A gray band with boxes of equal width, each with a name and a few words."""
    fig.rect(x, y, width, HEIGHT, BAND)
    w = (width - PAD) / len(boxes)
    for i, box in enumerate(boxes):
        name, words = box.split(": ", 1)
        left = x + PAD + i * w
        fig.rect(left, y + PAD, w - PAD, HEIGHT - 2 * PAD, PLAIN)
        fig.text(left + (w - PAD) / 2, y + 23, name, look="bold")
        fig.text(left + (w - PAD) / 2, y + 42, words, look="small")


def house() -> Figure:
    """The package in seven layers: imports run downward only

    Seven layers, top to bottom: cli and lessons; cost; fsdp and autotp, with a gap
    between them because they never import each other; flags and run; checkpoint,
    presets, data and model; config and mesh; validation, integrity and store. An arrow
    labeled imports points down the left side.
    """
    fig = Figure(760, 666, house.__doc__)
    layers = LAYERS.split("\n\n")
    for i, layer in enumerate(layers):
        sides = layer.split("\n-\n")
        width = (WIDTH + APART) / len(sides) - APART
        for j, side in enumerate(sides):
            left = LEFT + j * (width + APART)
            draw_band(fig, left, TOP + STEP * i, width, side.split("\n"))
    bottom = TOP + STEP * (len(layers) - 1) + HEIGHT
    fig.text(20, TOP - 14, "imports", look="left small")
    fig.arrow(34, TOP, 34, bottom - 8)
    engines = "fsdp/ and autotp/ never import each other: either can be read alone."
    beside = "Within a layer, a module may import from those on its right."
    fig.text(LEFT, bottom + 34, engines, beside, look="left small")
    return fig
