"""The plots that the notebooks show: one style, one colour a series."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt

from tp2d_lib import comm

# Okabe and Ito's palette, safe for colour-blind readers; the figures use it too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE = {
    "figure.figsize": (7, 3.2),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "legend.frameon": False,
}


def training(history: Sequence[dict]) -> plt.Figure:
    """Loss and throughput of a run, side by side, over its steps."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2)
        steps = [record["step"] for record in history]
        left.plot(steps, [record["loss"] for record in history])
        left.set(xlabel="step", ylabel="loss (mean over valid tokens)", title="Loss")
        speed = [record["tokens_per_second"] for record in history]
        right.plot(steps, speed, color=COLOURS[1])
        right.set(xlabel="step", ylabel="valid tokens / s", title="Throughput")
        right.set_ylim(bottom=0)
    plt.close(figure)  # shown by the notebook, once
    return figure


def losses(runs: dict[str, Sequence[dict]], killed_at: int, resumed_from: int):
    """Loss curves of two runs in one plot, with the accident marked."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        styles = ({"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.8})
        for (label, history), style in zip(runs.items(), styles, strict=True):
            steps = [record["step"] for record in history]
            axes.plot(
                steps, [record["loss"] for record in history], label=label, **style
            )
        axes.axvspan(resumed_from, killed_at, color="#e5e5e5", zorder=0)
        axes.axvline(killed_at, color="black", linestyle=":", label="worker killed")
        axes.axvline(resumed_from, color="black", linewidth=1, label="last checkpoint")
        axes.set(xlabel="step", ylabel="loss", title="Interrupted and uninterrupted")
        axes.legend()
    plt.close(figure)  # shown by the notebook, once
    return figure


def traffic(
    parameters: int, layers: int, hidden: int, tp_size: int, dp_size: int, batches
) -> plt.Figure:
    """Bytes a rank sends in one step over tp and over dp, against sequence length.

    Args:
        parameters, layers, hidden: sizes of the model.
        tp_size, dp_size: the mesh.
        batches: rows a dp rank reads in a step; one tensor-parallel line for each.
    """
    lengths = [256 * 2**i for i in range(8)]
    gb = 1e9
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        sharded = comm.fsdp_bytes(parameters, tp_size, dp_size) / gb
        axes.axhline(sharded, color="black", label=f"fully sharded, dp_size={dp_size}")
        for batch in batches:
            sent = [
                comm.tp_bytes(layers, hidden, batch * length, tp_size) / gb
                for length in lengths
            ]
            axes.plot(
                lengths, sent, marker="o", markersize=3, label=f"tp, batch {batch}"
            )
        crossing = comm.crossing_tokens(parameters, layers, hidden, tp_size, dp_size)
        for batch in batches:
            axes.plot(crossing / batch, sharded, "o", color="black", markersize=6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(lengths[0], lengths[-1])
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(
            xlabel="sequence length (tokens)",
            ylabel="GB sent by a rank in a step",
            title=f"Traffic of a step, tp_size={tp_size}, dp_size={dp_size}, bf16",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plt.close(figure)  # shown by the notebook, once
    return figure
