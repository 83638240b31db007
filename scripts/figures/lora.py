"""How the small matrices of LoRA are sharded beside the weight they are added to."""

from __future__ import annotations

from scripts.figures.svg import PLAIN, TP_COLORS, Figure

WIDE, HALF, RANK = 56, 66, 28  # equal lengths are equal dimensions


def across(fig: Figure, x: int, y: int, height: int, name: str) -> None:
    """A matrix sharded by columns: half of them on each tp_rank."""
    for i, own in enumerate(TP_COLORS):
        fig.rect(x + i * HALF, y, HALF, height, own)
        fig.text(x + (i + 0.5) * HALF, y + height / 2, f"{name}{i + 1}", look="bold")


def down(fig: Figure, x: int, y: int, width: int, name: str) -> None:
    """A matrix sharded by rows."""
    for i, own in enumerate(TP_COLORS):
        fig.rect(x, y + i * HALF, width, HALF, own)
        fig.text(x + width / 2, y + (i + 0.5) * HALF, f"{name}{i + 1}", look="bold")


def whole(fig: Figure, x: int, y: int, width: int, height: int, name: str) -> None:
    """A matrix that both tp ranks have."""
    fig.rect(x, y, width, height, PLAIN)
    fig.text(x + width / 2, y + height / 2, name, look="bold")


def lora() -> Figure:
    """X @ W + X @ A @ B, tp_size 2: which part of W, A and B a tp_rank has

    Where W is sharded by columns, so is B, and A is whole on both tp ranks. Where W is
    sharded by rows, so is A, and B is whole. Only A and B are trained.
    """
    fig = Figure(720, 322, lora.__doc__)
    fig.text(20, 66, "by columns: query, key, value, gate, up", look="left bold")
    across(fig, 20, 134, WIDE, "W")
    fig.text(172, 162, "+", look="large")
    whole(fig, 190, 134, RANK, WIDE, "A")
    fig.text(233, 162, "@", look="large")
    across(fig, 248, 148, RANK, "B")
    fig.text(420, 66, "by rows: output, down", look="left bold")
    down(fig, 420, 96, WIDE, "W")
    fig.text(496, 162, "+", look="large")
    down(fig, 516, 96, RANK, "A")
    fig.text(561, 162, "@", look="large")
    whole(fig, 578, 148, WIDE, RANK, "B")
    for x, *lines in (
        (20, "A is whole: each tp_rank multiplies", "it by its own columns of B only."),
        (420, "B is whole: each tp_rank multiplies", "it by its part of X @ A only."),
    ):
        fig.text(x, 254, *lines, look="left small")
    note = "So the gradient of a whole one is a part on each tp_rank, and is summed."
    fig.text(20, 300, note, look="left")
    return fig
