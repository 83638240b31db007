"""Draw the figures of the notebooks: python scripts/make_figures.py [--out DIR]

The same code always gives the same bytes, so a test can compare the files in images/
with `figures()`. In every figure a tp_rank is a colour and a dp_rank is a grey band.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from tp2d_lib.mesh import coordinates

MESH = coordinates(dp_size=2, tp_size=2)
RANK = {(c.dp_rank, c.tp_rank): c.rank for c in MESH}

Pair = tuple[int, int]
Colours = tuple[str, str]  # Of the line and of the inside.

INK = "#1a1a1a"
WHITE: Colours = ("none", "#ffffff")
BAND: Colours = ("none", "#ececec")
PLAIN: Colours = ("#767676", "#ffffff")
TALK: Colours = (INK, "#ffffff")
# One for each tp_rank: Okabe-Ito blue and vermilion, and a tint of each inside.
TP_COLOURS: tuple[Colours, ...] = (("#0072b2", "#cde4f2"), ("#d55e00", "#fbdcc8"))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
HEAD = (
    '<defs><marker id="head" orient="auto-start-reverse" markerUnits="userSpaceOnUse"'
    ' markerWidth="8" markerHeight="12" refX="5" refY="6">'
    f'<path d="M0 0L8 6L0 12Z" fill="{INK}"/></marker></defs>'
)


def tag(name: str, body: str = "", **attributes: float | str) -> str:
    """One SVG element; an underscore in an attribute's name stands for a dash."""
    pairs = ""
    for key, value in attributes.items():
        shown = value if isinstance(value, str) else f"{value:g}"
        pairs += f' {key.replace("_", "-")}="{shown}"'
    return f"<{name}{pairs}>{body}</{name}>"


class Figure:
    """A growing list of SVG elements.

    Its alt text is `names`, the docstring of the function that draws it: the first
    line is the title, which is also drawn, and the rest describes what there is to see.
    """

    def __init__(self, width: int, height: int, names: str) -> None:
        title, desc = (" ".join(part.split()) for part in names.split("\n\n"))
        self.width, self.height = width, height
        self.parts = [tag("title", escape(title)), tag("desc", escape(desc)), HEAD]
        self.rect(0, 0, width, height, WHITE)
        self.text(20, 26, title, look="left bold large")

    def rect(
        self, x: float, y: float, w: float, h: float, colours: Colours, dash: str = ""
    ) -> None:
        line, fill = colours
        style = {"stroke": line, "stroke_width": 2, "stroke_dasharray": dash or "none"}
        self.parts.append(tag("rect", x=x, y=y, width=w, height=h, fill=fill, **style))

    def text(self, x: float, y: float, *lines: str, look: str = "") -> None:
        """Lines centred on height y; `look` may say left, bold, small or large."""
        size = 13 if "small" in look else 16 if "large" in look else 14
        style = {
            "fill": INK,
            "font_size": size,
            "font_weight": 600 if "bold" in look else 400,
            "text_anchor": "start" if "left" in look else "middle",
        }
        for i, line in enumerate(lines):
            # A baseline 0.35 of the size lower centres the letters on y.
            baseline = y + ((i - (len(lines) - 1) / 2) * 1.35 + 0.35) * size
            self.parts.append(tag("text", escape(line), x=x, y=baseline, **style))

    def arrow(self, x1: float, y1: float, x2: float, y2: float, talk: str = "") -> None:
        """An arrow; two-headed along a group: thick for "tp", dashed for "dp"."""
        style = {
            "stroke": INK,
            "stroke_width": 4 if talk == "tp" else 2,
            "stroke_dasharray": "5 3" if talk == "dp" else "none",
            "marker_start": "url(#head)" if talk else "none",
        }
        path = f"M{x1:g} {y1:g}L{x2:g} {y2:g}"
        self.parts.append(tag("path", d=path, marker_end="url(#head)", **style))

    def svg(self) -> str:
        body = "\n".join(["", *self.parts, ""])
        size = {"width": self.width, "height": self.height, "font_family": FONT}
        box = f"0 0 {self.width} {self.height}"
        top = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "viewBox": box}
        return tag("svg", body, **top, **size) + "\n"


def draw_mesh(
    fig: Figure, corner: Pair, cell: Pair, gap: Pair, talks: str, label: str = "{}"
) -> None:
    """The 2x2 mesh, with arrows along the groups, "tp" or "dp", named in `talks`."""
    (x, y), (w, h), (gap_x, gap_y) = corner, cell, gap
    pad = gap_y / 3
    for c in MESH:
        left, top = x + c.tp_rank * (w + gap_x), y + c.dp_rank * (h + gap_y)
        cx, cy = left + w / 2, top + h / 2
        if c.tp_rank == 0:
            band = 2 * (w + pad) + gap_x
            fig.rect(left - pad, top - pad, band, h + 2 * pad, BAND)
        fig.rect(left, top, w, h, TP_COLOURS[c.tp_rank])
        fig.text(cx, cy, label.format(c.rank), look="bold")
        if "tp" in talks and c.tp_rank == 0:
            fig.arrow(left + w + 5, cy, left + w + gap_x - 5, cy, "tp")
    for cx in (x + w / 2, x + w * 1.5 + gap_x):
        if "dp" in talks:
            fig.arrow(cx, y + h + 5, cx, y + h + gap_y - 5, "dp")


def device_mesh() -> Figure:
    """The device mesh: dp_size 2, tp_size 2

    Four ranks in a table. Each row is one dp_rank and reads different data. Each column
    is one tp_rank and holds a different part of every layer. A row is a TP group, kept
    inside a node; a column is a DP group, which can cross nodes.
    """
    fig = Figure(580, 436, device_mesh.__doc__)
    draw_mesh(fig, (196, 114), (124, 60), (80, 60), "tp dp", "rank {}")
    for i in (0, 1):
        fig.text(258 + 204 * i, 58, f"tp_rank {i}", look="bold")
        fig.text(258 + 204 * i, 77, f"part {i} of every layer", look="small")
        fig.text(20, 134 + 120 * i, f"dp_rank {i}", look="left bold")
        fig.text(20, 153 + 120 * i, "reads its own data", look="left small")
    rows = " and ".join(f"{{{RANK[i, 0]}, {RANK[i, 1]}}}" for i in (0, 1))
    columns = " and ".join(f"{{{RANK[0, i]}, {RANK[1, i]}}}" for i in (0, 1))
    often = "Talks in every layer: keep it inside a node."
    seldom = "Gathers each layer's weights, reduces its gradients: can cross nodes."
    for y, group, members, talk in (
        (350, "tp", f"TP group: a row. Here {rows}.", often),
        (402, "dp", f"DP group: a column. Here {columns}.", seldom),
    ):
        fig.arrow(23, y, 77, y, group)
        fig.text(98, y - 9, members, look="left bold")
        fig.text(98, y + 10, talk, look="left small")
    return fig


# Lengths in column_row_parallel: equal lengths are equal dimensions.
TOKENS, HIDDEN, HALF = 84, 56, 66


def draw_lane(fig: Figure, tp_rank: int, middle: int) -> None:
    """What one tp_rank computes, from X to Z."""
    own, n = TP_COLOURS[tp_rank], tp_rank + 1
    fig.text(32, middle - 62, f"tp_rank {tp_rank}", look="left bold")
    for x, w, h, name, rows, columns, colours in (
        (44, HIDDEN, TOKENS, "X", "batch·seq,", "hidden", PLAIN),
        (146, HALF, HIDDEN, f"A{n}", "hidden,", "ffn/2", own),
        (264, HALF, TOKENS, f"Y{n}", "batch·seq,", "ffn/2", own),
        (376, HIDDEN, HALF, f"B{n}", "ffn/2,", "hidden", own),
        (478, HIDDEN, TOKENS, f"Z{n}", "batch·seq,", "hidden", own),
        (628, HIDDEN, TOKENS, "Z", "batch·seq,", "hidden", PLAIN),
    ):
        fig.rect(x, middle - h / 2, w, h, colours)
        fig.text(x + w / 2, middle, name, look="bold large")
        fig.text(x + w / 2, middle + 64, rows, columns, look="small")
    for x, y, sign in ((123, middle, "@"), (353, middle, "@"), (236, middle - 18, "f")):
        fig.text(x, y, sign, look="large")
    for x1, x2 in ((218, 256), (438, 470), (540, 560), (600, 620)):
        fig.arrow(x1, middle, x2, middle)


def column_row_parallel() -> Figure:
    """Z = f(X @ A) @ B on one TP group, tp_size 2

    A is cut by columns into A1 and A2, B by rows into B1 and B2. Each tp_rank has the
    whole X and computes a partial result with its own shards. One all-reduce adds Z1
    and Z2, so both ranks hold Z.
    """
    fig = Figure(720, 612, column_row_parallel.__doc__)
    fig.text(130, 76, "A is cut by columns", "shape (hidden, ffn)", look="left")
    fig.text(400, 76, "B is cut by rows", "shape (ffn, hidden)", look="left")
    for i, own in enumerate(TP_COLOURS):
        fig.rect(130 + i * HALF, 110, HALF, HIDDEN, own)
        fig.text(130 + (i + 0.5) * HALF, 138, f"A{i + 1}", look="bold large")
        fig.rect(560, 56 + i * HALF, HIDDEN, HALF, own)
        fig.text(588, 56 + (i + 0.5) * HALF, f"B{i + 1}", look="bold large")
    fig.rect(20, 208, 680, 346, BAND)
    for tp_rank in (0, 1):
        draw_lane(fig, tp_rank, 296 + 164 * tp_rank)
    fig.rect(568, 246, 26, 264, TALK)
    fig.text(581, 228, "one all-reduce", look="bold")
    fig.text(581, 378, "+", look="bold large")
    note = "f works on each element, so a rank needs only its own columns of X @ A."
    back = "Backward needs one all-reduce as well, for the gradient of X."
    fig.text(20, 582, note, back, look="left small")
    return fig


def draw_slice(
    fig: Figure, x: int, y: int, tp_rank: int, held: tuple[int, ...], w: int, h: int
) -> None:
    """One tp slice, cut into a half for each dp_rank; the halves in `held` are full."""
    line, fill = TP_COLOURS[tp_rank]
    for i in (0, 1):
        fig.rect(x + i * w, y, w, h, ("none", fill) if i in held else WHITE)
        if i in held:
            name = str(RANK[i, tp_rank])
            fig.text(x + (i + 0.5) * w, y + h / 2, name, look="bold")
    fig.rect(x, y, w, h, (line, "none"), "5 3")  # Its right side is the cut over dp.
    fig.rect(x, y, 2 * w, h, (line, "none"))


def draw_storage(fig: Figure, dp_rank: int, tp_rank: int) -> None:
    """One rank's part of A1 or A2, from storage to the reduced gradient."""
    y, name = 342 + 138 * tp_rank + 58 * dp_rank, f"A{tp_rank + 1}"
    fig.rect(20, y, 680, 52, BAND)
    fig.text(56, y + 17, f"rank {RANK[dp_rank, tp_rank]}", look="bold")
    fig.text(56, y + 36, f"dp_rank {dp_rank}", look="small")
    for x in (96, 592):
        draw_slice(fig, x, y + 6, tp_rank, (dp_rank,), 44, 40)
    for x, label in ((254, name), (424, f"grad {name}")):
        fig.rect(x, y + 6, 88, 40, TP_COLOURS[tp_rank])
        fig.text(x + 44, y + 26, label, look="bold")
    for x1, x2 in ((189, 202), (234, 247), (349, 415), (517, 530), (562, 583)):
        fig.arrow(x1, y + 26, x2, y + 26)
    if dp_rank == 1:
        fig.rect(207, y - 62, 24, 118, TALK)
        fig.rect(536, y - 62, 24, 118, TALK)


def two_dimensional() -> Figure:
    """Cut over tp, then again over dp

    tp cuts A by columns and B by rows. FSDP cuts each slice again along its output
    dimension, so each of the four ranks stores a quarter. The DP group all-gathers the
    slice before use and reduce-scatters its gradient after.
    """
    fig = Figure(720, 664, two_dimensional.__doc__)
    fig.text(172, 64, "A, shape (hidden, ffn)", look="bold")
    fig.text(580, 64, "B, shape (ffn, hidden)", look="bold")
    for i in (0, 1):
        draw_slice(fig, 20 + 152 * i, 106, i, (0, 1), 76, 96)
        draw_slice(fig, 504, 106 + 48 * i, i, (0, 1), 76, 48)
        fig.text(96 + 152 * i, 88, f"A{i + 1}: tp_rank {i}", look="small")
        fig.text(440, 130 + 48 * i, f"B{i + 1}: tp_rank {i}", look="small")
        for x in (58, 210, 542):
            fig.text(x + 76 * i, 218, f"dp_rank {i}", look="small")
    key = "A number is the rank that stores the piece. Dashed line: the cut over dp."
    dim = "nn.Linear stores (out, in): the columns drawn here are dim 0 of its weight."
    fig.text(20, 256, key, dim, look="left small")
    for x, *lines in (
        (140, "stores", "half a slice"),
        (219, "all-gather", "over dp"),
        (298, "uses", "the slice"),
        (382, "forward,", "backward"),
        (468, "gradient", "on own data"),
        (548, "reduce-", "scatter"),
        (640, "keeps the sum", "of its own half"),
    ):
        fig.text(x, 308, *lines, look="small")
    for c in MESH:
        draw_storage(fig, c.dp_rank, c.tp_rank)
    group = "Each block is one DP group: it talks over dp only. B1 and B2 do the same."
    again = "FSDP frees the slice after forward and gathers it again for backward."
    fig.text(20, 632, group, again, look="left small")
    return fig


# For each step of training: the groups that talk, its name and what happens.
STEPS = """\
none: Read
The dataset order follows from (seed, epoch). Each dp_rank takes
its own rows of the global batch; its tp_ranks read the same rows.

dp: Forward: all-gather of weights over dp
Before each block, a rank gathers the whole tp slice of its weights.

tp: Forward: activations over tp, in each block
All-gather before the column cut, reduce-scatter after the row cut.
Together they are one all-reduce. Outside the cut layers, each
tp_rank holds its own shard of the sequence.

tp and dp: Loss on vocabulary shards
No rank holds all logits: sums over the vocabulary run over tp.
loss = sum over tokens / valid tokens of the global batch

tp and dp: Backward
The same exchanges in reverse: weights are gathered over dp again,
gradients of activations travel over tp.

dp: Reduce-scatter of gradients over dp
When backward leaves a block, each rank keeps the sum for its shard.

tp and dp: Clip to the global norm
Squares are summed over all shards, a replicated tensor counted once.
Every rank scales its gradients by the same factor.

none: Optimizer
Each rank updates its own shard. No rank talks."""


def one_step() -> Figure:
    """One optimizer step on the 2x2 mesh

    Each dp row reads its own rows of the global batch. Weights are all-gathered over dp
    and activations exchanged over tp; the loss is the sum / valid tokens of the global
    batch. Gradients are reduce-scattered over dp and clipped to the global norm, then
    each rank updates its own shard.
    """
    fig = Figure(720, 942, one_step.__doc__)
    for i, step in enumerate(STEPS.split("\n\n")):
        head, *lines = step.split("\n")
        talks, name = head.split(": ", 1)
        y = 64 + 110 * i
        draw_mesh(fig, (92, y), (32, 20), (36, 30), talks)
        fig.text(220, y + 34 - 9 * len(lines), f"{i + 1}. {name}", look="left bold")
        fig.text(220, y + 44, *lines, look="left small")
        if i:
            fig.arrow(142, y - 29, 142, y - 14)
    for i in (0, 1):
        fig.text(42, 74 + 50 * i, f"rows {'ab'[i]}", look="small")
        fig.arrow(67, 74 + 50 * i, 77, 74 + 50 * i)
    return fig


PARTS = ("gate, first half", "gate, second half", "up, first half", "up, second half")


def draw_fused(fig: Figure, y: int, owners: tuple[int, ...], *lines: str) -> None:
    """A fused weight whose four parts go to `owners`, and what each of them gets."""
    width, height = 150, 44
    fig.text(20, y, lines[0], look="left bold")
    fig.text(20, y + 20, *lines[1:], look="left small")
    fig.text(20, y + 68, "whole", look="left")
    for i, (part, owner) in enumerate(zip(PARTS, owners, strict=True)):
        fig.rect(100 + i * width, y + 46, width, height, TP_COLOURS[owner])
        fig.text(100 + (i + 0.5) * width, y + 68, part, look="small")
    for tp_rank in (0, 1):
        left = 100 + 2 * width * tp_rank
        own = [
            part for part, owner in zip(PARTS, owners, strict=True) if owner == tp_rank
        ]
        fig.text(left + width, y + 116, f"tp_rank {tp_rank} holds", look="small")
        for i, part in enumerate(own):
            fig.rect(left + i * width, y + 130, width, height, TP_COLOURS[tp_rank])
            fig.text(left + (i + 0.5) * width, y + 152, part, look="small")


def fused_weights() -> Figure:
    """Two weights in one matrix, tp_size 2

    gate_up_proj holds gate and up, one after the other. Cut in the middle, tp_rank 0
    gets all of gate and tp_rank 1 all of up: a forward that takes the first half for
    gate is wrong on both. Cut part by part, each rank gets half of gate and half of up.
    """
    fig = Figure(720, 470, fused_weights.__doc__)
    draw_fused(
        fig,
        64,
        (0, 0, 1, 1),
        "Without a shape: cut in the middle",
        "Each rank multiplies gate by gate, or up by up. No error, wrong numbers.",
    )
    draw_fused(
        fig,
        266,
        (0, 1, 0, 1),
        "With shape [2, -1]: each part is cut by itself",
        "Each rank multiplies its half of gate by its half of up.",
    )
    return fig


def figures() -> dict[str, str]:
    """The text of every figure, by file name."""
    draw = (
        device_mesh,
        column_row_parallel,
        two_dimensional,
        one_step,
        fused_weights,
    )
    return {f"{function.__name__}.svg": function().svg() for function in draw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = Path(__file__).resolve().parents[1] / "images"
    parser.add_argument("--out", type=Path, default=images, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures().items():
        (folder / name).write_text(svg, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
