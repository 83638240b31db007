"""How weights are sharded: over tp, over tp and dp, and two fused in one matrix."""

from __future__ import annotations

from scripts.figures import mesh
from scripts.figures.svg import BAND, COMM, PLAIN, TP_COLORS, WHITE, Figure

# Lengths in column_row_parallel: equal lengths are equal dimensions.
TOKENS, HIDDEN, HALF = 84, 56, 66


def draw_lane(fig: Figure, tp_rank: int, middle: int) -> None:
    """What one tp_rank computes, from X to Z."""
    own, n = TP_COLORS[tp_rank], tp_rank + 1
    fig.text(32, middle - 62, f"tp_rank {tp_rank}", look="left bold")
    for x, w, h, name, rows, columns, colors in (
        (44, HIDDEN, TOKENS, "X", "batch·seq,", "hidden", PLAIN),
        (146, HALF, HIDDEN, f"A{n}", "hidden,", "ffn/2", own),
        (264, HALF, TOKENS, f"Y{n}", "batch·seq,", "ffn/2", own),
        (376, HIDDEN, HALF, f"B{n}", "ffn/2,", "hidden", own),
        (478, HIDDEN, TOKENS, f"Z{n}", "batch·seq,", "hidden", own),
        (628, HIDDEN, TOKENS, "Z", "batch·seq,", "hidden", PLAIN),
    ):
        fig.rect(x, middle - h / 2, w, h, colors)
        fig.text(x + w / 2, middle, name, look="bold large")
        fig.text(x + w / 2, middle + 64, rows, columns, look="small")
    for x, y, sign in ((123, middle, "@"), (353, middle, "@"), (236, middle - 18, "f")):
        fig.text(x, y, sign, look="large")
    for x1, x2 in ((218, 256), (438, 470), (540, 560), (600, 620)):
        fig.arrow(x1, middle, x2, middle)


def column_row_parallel() -> Figure:
    """Z = f(X @ A) @ B on one TP group, tp_size 2

    A is sharded by columns into A1 and A2, B by rows into B1 and B2. X is replicated:
    each tp_rank computes a partial result from it with its own shards. One all-reduce
    adds Z1 and Z2, so both ranks hold Z.
    """
    fig = Figure(720, 612, column_row_parallel.__doc__)
    fig.text(130, 76, "A is sharded by columns", "shape (hidden, ffn)", look="left")
    fig.text(400, 76, "B is sharded by rows", "shape (ffn, hidden)", look="left")
    for i, own in enumerate(TP_COLORS):
        fig.rect(130 + i * HALF, 110, HALF, HIDDEN, own)
        fig.text(130 + (i + 0.5) * HALF, 138, f"A{i + 1}", look="bold large")
        fig.rect(560, 56 + i * HALF, HIDDEN, HALF, own)
        fig.text(588, 56 + (i + 0.5) * HALF, f"B{i + 1}", look="bold large")
    fig.rect(20, 208, 680, 346, BAND)
    for tp_rank in (0, 1):
        draw_lane(fig, tp_rank, 296 + 164 * tp_rank)
    fig.rect(568, 246, 26, 264, COMM)
    fig.text(581, 228, "one all-reduce", look="bold")
    fig.text(581, 378, "+", look="bold large")
    note = "f works on each element, so a rank needs only its own columns of X @ A."
    back = "Backward needs one all-reduce as well, for the gradient of X."
    fig.text(20, 582, note, back, look="left small")
    return fig


def draw_shard(
    fig: Figure, x: int, y: int, tp_rank: int, held: tuple[int, ...], w: int, h: int
) -> None:
    """One tp shard, a half for each dp_rank; the halves in `held` are filled."""
    line, fill = TP_COLORS[tp_rank]
    for i in (0, 1):
        fig.rect(x + i * w, y, w, h, ("none", fill) if i in held else WHITE)
        if i in held:
            name = str(mesh.RANK[i, tp_rank])
            fig.text(x + (i + 0.5) * w, y + h / 2, name, look="bold")
    fig.rect(x, y, w, h, (line, "none"), "5 3")  # Its right side is the split over dp.
    fig.rect(x, y, 2 * w, h, (line, "none"))


def draw_storage(fig: Figure, dp_rank: int, tp_rank: int) -> None:
    """One rank's part of A1 or A2, from storage to the reduced gradient."""
    y, name = 342 + 138 * tp_rank + 58 * dp_rank, f"A{tp_rank + 1}"
    fig.rect(20, y, 680, 52, BAND)
    fig.text(56, y + 17, f"rank {mesh.RANK[dp_rank, tp_rank]}", look="bold")
    fig.text(56, y + 36, f"dp_rank {dp_rank}", look="small")
    for x in (96, 592):
        draw_shard(fig, x, y + 6, tp_rank, (dp_rank,), 44, 40)
    for x, label in ((254, name), (424, f"grad {name}")):
        fig.rect(x, y + 6, 88, 40, TP_COLORS[tp_rank])
        fig.text(x + 44, y + 26, label, look="bold")
    for x1, x2 in ((189, 202), (234, 247), (349, 415), (517, 530), (562, 583)):
        fig.arrow(x1, y + 26, x2, y + 26)
    if dp_rank == 1:
        fig.rect(207, y - 62, 24, 118, COMM)
        fig.rect(536, y - 62, 24, 118, COMM)


def two_dimensional() -> Figure:
    """Sharded over tp, then again over dp

    tp shards A by columns and B by rows. FSDP shards each of these again along its
    output dimension, so each of the four ranks stores a quarter. The DP group
    all-gathers the tp shard before use and reduce-scatters its gradient after.
    """
    fig = Figure(720, 664, two_dimensional.__doc__)
    fig.text(172, 64, "A, shape (hidden, ffn)", look="bold")
    fig.text(580, 64, "B, shape (ffn, hidden)", look="bold")
    for i in (0, 1):
        draw_shard(fig, 20 + 152 * i, 106, i, (0, 1), 76, 96)
        draw_shard(fig, 504, 106 + 48 * i, i, (0, 1), 76, 48)
        fig.text(96 + 152 * i, 88, f"A{i + 1}: tp_rank {i}", look="small")
        fig.text(440, 130 + 48 * i, f"B{i + 1}: tp_rank {i}", look="small")
        for x in (58, 210, 542):
            fig.text(x + 76 * i, 218, f"dp_rank {i}", look="small")
    key = "A number is the rank that stores the shard. Dashed line: the split over dp."
    dim = "nn.Linear stores (out, in): the columns drawn here are dim 0 of its weight."
    fig.text(20, 256, key, dim, look="left small")
    for x, *lines in (
        (140, "stores", "its shard"),
        (219, "all-gather", "over dp"),
        (298, "uses", "the tp shard"),
        (382, "forward,", "backward"),
        (468, "gradient", "on own data"),
        (548, "reduce-", "scatter"),
        (640, "keeps the sum", "for its shard"),
    ):
        fig.text(x, 308, *lines, look="small")
    for c in mesh.MESH:
        draw_storage(fig, c.dp_rank, c.tp_rank)
    group = "A gray box is one DP group: it communicates over dp only. B does the same."
    again = "FSDP frees the tp shard after forward and gathers it again for backward."
    fig.text(20, 632, group, again, look="left small")
    return fig


PARTS = ("gate, first half", "gate, second half", "up, first half", "up, second half")


def draw_fused(fig: Figure, y: int, owners: tuple[int, ...], *lines: str) -> None:
    """A fused weight whose four parts go to `owners`, and what each of them gets."""
    width, height = 150, 44
    fig.text(20, y, lines[0], look="left bold")
    fig.text(20, y + 20, *lines[1:], look="left small")
    fig.text(20, y + 68, "full", "weight", look="left")
    for i, (part, owner) in enumerate(zip(PARTS, owners, strict=True)):
        fig.rect(100 + i * width, y + 46, width, height, TP_COLORS[owner])
        fig.text(100 + (i + 0.5) * width, y + 68, part, look="small")
    for tp_rank in (0, 1):
        left = 100 + 2 * width * tp_rank
        own = [
            part for part, owner in zip(PARTS, owners, strict=True) if owner == tp_rank
        ]
        fig.text(left + width, y + 116, f"tp_rank {tp_rank} holds", look="small")
        for i, part in enumerate(own):
            fig.rect(left + i * width, y + 130, width, height, TP_COLORS[tp_rank])
            fig.text(left + (i + 0.5) * width, y + 152, part, look="small")


def fused_weights() -> Figure:
    """Two weights in one matrix, tp_size 2

    gate_up_proj holds gate and up, one after the other. Split in the middle, tp_rank 0
    gets all of gate and tp_rank 1 all of up: a forward that takes the first half for
    gate is wrong on both. Split part by part, each rank gets half of gate and of up.
    """
    fig = Figure(720, 470, fused_weights.__doc__)
    draw_fused(
        fig,
        64,
        (0, 0, 1, 1),
        "Without a shape: split in the middle",
        "Each rank multiplies gate by gate, or up by up. No error, wrong numbers.",
    )
    draw_fused(
        fig,
        266,
        (0, 1, 0, 1),
        "With shape [2, -1]: each part is split by itself",
        "Each rank multiplies its half of gate by its half of up.",
    )
    return fig
