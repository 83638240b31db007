"""The 2x2 device mesh, by itself and as a part of other figures."""

from __future__ import annotations

from scripts.figures.svg import BAND, TP_COLORS, Figure, Pair
from tp2d_lib.mesh import coordinates

MESH = coordinates(dp_size=2, tp_size=2)
RANK = {(c.dp_rank, c.tp_rank): c.rank for c in MESH}


def draw_mesh(
    fig: Figure, corner: Pair, cell: Pair, gap: Pair, groups: str, label: str = "{}"
) -> None:
    """The 2x2 mesh, with arrows along the groups, "tp" or "dp", named in `groups`."""
    (x, y), (w, h), (gap_x, gap_y) = corner, cell, gap
    pad = gap_y / 3
    for c in MESH:
        left, top = x + c.tp_rank * (w + gap_x), y + c.dp_rank * (h + gap_y)
        cx, cy = left + w / 2, top + h / 2
        if c.tp_rank == 0:
            band = 2 * (w + pad) + gap_x
            fig.rect(left - pad, top - pad, band, h + 2 * pad, BAND)
        fig.rect(left, top, w, h, TP_COLORS[c.tp_rank])
        fig.text(cx, cy, label.format(c.rank), look="bold")
        if "tp" in groups and c.tp_rank == 0:
            fig.arrow(left + w + 5, cy, left + w + gap_x - 5, cy, "tp")
    for cx in (x + w / 2, x + w * 1.5 + gap_x):
        if "dp" in groups:
            fig.arrow(cx, y + h + 5, cx, y + h + gap_y - 5, "dp")


def device_mesh() -> Figure:
    """The device mesh: dp_size 2, tp_size 2

    Four ranks in a table. Each row is one dp_rank and reads different data. Each column
    is one tp_rank and holds a different shard of every layer. A row is a TP group, kept
    inside a node; a column is a DP group, which can cross nodes.
    """
    fig = Figure(580, 436, device_mesh.__doc__)
    draw_mesh(fig, (196, 114), (124, 60), (80, 60), "tp dp", "rank {}")
    for i in (0, 1):
        fig.text(258 + 204 * i, 58, f"tp_rank {i}", look="bold")
        fig.text(258 + 204 * i, 77, f"shard {i} of every layer", look="small")
        fig.text(20, 134 + 120 * i, f"dp_rank {i}", look="left bold")
        fig.text(20, 153 + 120 * i, "reads its own data", look="left small")
    rows = " and ".join(f"{{{RANK[i, 0]}, {RANK[i, 1]}}}" for i in (0, 1))
    columns = " and ".join(f"{{{RANK[0, i]}, {RANK[1, i]}}}" for i in (0, 1))
    often = "Communicates in every layer: keep it inside a node."
    seldom = "All-gathers weights, reduce-scatters gradients: can cross nodes."
    for y, group, members, note in (
        (350, "tp", f"TP group: a row. Here {rows}.", often),
        (402, "dp", f"DP group: a column. Here {columns}.", seldom),
    ):
        fig.arrow(23, y, 77, y, group)
        fig.text(98, y - 9, members, look="left bold")
        fig.text(98, y + 10, note, look="left small")
    return fig
