"""What three collectives do to the numbers of two ranks."""

from __future__ import annotations

from scripts.figures.svg import BAND, COMM, TP_COLORS, Figure

OWN, ADDED = ("1", "2", "3", "4"), ("10", "20", "30", "40")
SUM = ("11", "22", "33", "44")
CELL = 40
# Name, placements, and the numbers of ranks 0 and 1 before and after.
ROWS = (
    (
        "all-gather",
        "Shard to Replicate",
        (OWN[:2], OWN[2:]),
        (OWN, OWN),
    ),
    (
        "reduce-scatter",
        "Partial to Shard",
        (OWN, ADDED),
        (SUM[:2], SUM[2:]),
    ),
    (
        "all-reduce",
        "Partial to Replicate",
        (OWN, ADDED),
        (SUM, SUM),
    ),
)


def draw_numbers(fig: Figure, x: int, y: int, rank: int, held: tuple[str, ...]) -> None:
    for i, value in enumerate(held):
        fig.rect(x + i * CELL, y, CELL, 34, TP_COLORS[rank])
        fig.text(x + (i + 0.5) * CELL, y + 17, value)


def collectives() -> Figure:
    """Three collectives, with numbers

    Two ranks before and after. All-gather: ranks with 1 2 and 3 4 both end with 1 2 3
    4. Reduce-scatter: 1 2 3 4 and 10 20 30 40 are added, rank 0 keeps 11 22 and rank 1
    keeps 33 44. All-reduce: both keep the whole sum, 11 22 33 44.
    """
    fig = Figure(720, 396, collectives.__doc__)
    fig.text(310, 60, "before", look="small")
    fig.text(610, 60, "after", look="small")
    for index, (name, placements, before, after) in enumerate(ROWS):
        y = 76 + 106 * index
        fig.rect(20, y, 680, 96, BAND)
        fig.text(34, y + 34, name, look="left bold")
        fig.text(34, y + 58, placements, look="left small")
        for rank in (0, 1):
            line = y + 10 + 42 * rank
            fig.text(200, line + 17, f"rank {rank}", look="small")
            draw_numbers(fig, 230, line, rank, before[rank])
            draw_numbers(fig, 530, line, rank, after[rank])
            left = 234 + len(before[rank]) * CELL
            fig.arrow(left, line + 17, 446, line + 17)
            fig.arrow(478, line + 17, 520, line + 17)
        fig.rect(450, y + 6, 24, 84, COMM)
    return fig
