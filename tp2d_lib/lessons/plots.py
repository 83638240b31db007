"""The plots that the notebooks show: one style, one color per series."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt

from tp2d_lib.cost import comm

# Okabe and Ito's palette, safe for color-blind readers; the figures use it too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE = {
    "figure.figsize": (7, 3.2),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "legend.frameon": False,
}
ON_EACH_OTHER = ({"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.8})


def whole_steps(*axes: plt.Axes) -> None:
    for each in axes:
        each.xaxis.get_major_locator().set_params(integer=True)


def training(history: Sequence[dict], guess: float | None = None) -> plt.Figure:
    """Loss and throughput of a run, side by side, over its steps.

    Args:
        guess: the loss of a model that only guesses.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2)
        steps = [record["step"] for record in history]
        left.plot(steps, [record["loss"] for record in history], label="training")
        held_out = [(r["step"], r["eval_loss"]) for r in history if "eval_loss" in r]
        if held_out:
            left.plot(*zip(*held_out, strict=True), "o", label="held out")
        if guess:
            left.axhline(guess, color="black", linestyle=":", label="guessing")
            left.legend()
        whole_steps(left, right)
        left.set(xlabel="step", ylabel="loss (mean over valid tokens)", title="Loss")
        speed = [record["tokens_per_second"] for record in history]
        right.plot(steps, speed, color=COLORS[1])
        right.set(xlabel="step", title="Valid tokens per second")
        right.yaxis.set_major_formatter("{x:,.0f}")
        right.set_ylim(bottom=0)
    plt.close(figure)  # shown by the notebook, once
    return figure


def losses(runs: dict[str, Sequence[dict]], killed_at: int, resumed_from: int):
    """Loss curves of two runs in one plot, with the failure marked."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        for (label, history), style in zip(runs.items(), ON_EACH_OTHER, strict=True):
            steps = [record["step"] for record in history]
            axes.plot(
                steps, [record["loss"] for record in history], label=label, **style
            )
        twice = {"color": "#e5e5e5", "zorder": 0, "label": "computed twice"}
        axes.axvspan(resumed_from, killed_at, **twice)
        axes.axvline(killed_at, color="black", linestyle=":", label="worker killed")
        axes.axvline(resumed_from, color="black", linewidth=1, label="last checkpoint")
        whole_steps(axes)
        axes.set(xlabel="step", ylabel="loss (mean over valid tokens)")
        axes.legend()
    plt.close(figure)  # shown by the notebook, once
    return figure


def curves(runs: dict[str, Sequence[float]]) -> plt.Figure:
    """Losses of two runs, the first drawn wider, so that both can be seen."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        for (label, losses), style in zip(runs.items(), ON_EACH_OTHER, strict=True):
            axes.plot(range(1, len(losses) + 1), losses, label=label, **style)
        whole_steps(axes)
        axes.set(xlabel="step", ylabel="loss (mean over valid tokens)", title="Loss")
        axes.legend()
    plt.close(figure)  # shown by the notebook, once
    return figure


def memory(held: dict[tuple[str, int], dict[str, int]]) -> plt.Figure:
    """Stacked bars of the bytes that a rank holds, for each (mesh, ZeRO stage)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        places = [i + i // 4 for i in range(len(held))]  # a gap between meshes
        bottom = [0.0] * len(held)
        for kind in next(iter(held.values())):
            sizes = [row[kind] / 1e6 for row in held.values()]
            axes.bar(places, sizes, bottom=bottom, label=kind)
            bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
        names = [f"ZeRO {stage}" for _, stage in held]
        axes.set_xticks(places, names, fontsize=8)
        for index, mesh in enumerate(dict.fromkeys(mesh for mesh, _ in held)):
            axes.text(5 * index + 1.5, max(bottom) * 1.04, mesh, ha="center")
        axes.set_ylim(top=max(bottom) * 1.15)
        axes.set(ylabel="MB per rank")
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plt.close(figure)  # shown by the notebook, once
    return figure


def traffic(
    layers: int,
    hidden: int,
    tp_size: int,
    batches: Sequence[int],
    sharded: float,
    label: str,
    columns: int = 2,
) -> plt.Figure:
    """Bytes a rank sends per step against sequence length: over tp, and over dp.

    Args:
        layers, hidden: sizes of the model.
        batches: rows a dp rank reads in a step; one tensor-parallel line for each.
        sharded: bytes sent by sharded data parallelism, whatever the length.
        label: what that line is called.
        columns: all-reduces of a layer in backward, as in ``comm.tp_bytes``.
    """
    per_token = comm.tp_bytes(layers, hidden, 1, tp_size, columns=columns)
    lengths = [128 * 2**i for i in range(9)]
    gb = 1e9
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        lines = {label: [sharded / gb] * len(lengths)}
        for batch in batches:
            sent = [per_token * batch * length / gb for length in lengths]
            lines[f"tp, batch {batch}"] = sent
        for (name, sent), color in zip(lines.items(), ("black", *COLORS), strict=False):
            axes.plot(lengths, sent, color=color)
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(name, (lengths[-1], sent[-1]), color=color, **place)
        for batch in batches:
            crossing = sharded / per_token / batch
            axes.plot(crossing, sharded / gb, "o", color="black", markersize=6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(lengths[0], lengths[-1])
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=9)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set(
            xlabel="sequence length (tokens)",
            ylabel="GB sent by a rank per step",
            title=f"Traffic per step, tp_size={tp_size}, bfloat16",
        )
    plt.close(figure)  # shown by the notebook, once
    return figure
