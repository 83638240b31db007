"""One optimizer step, and which groups communicate when."""

from __future__ import annotations

from scripts.figures.mesh import draw_mesh
from scripts.figures.svg import Figure

# For each step of training: the groups that communicate, its name and what happens.
STEPS = """\
none: Read
The dataset order follows from (seed, epoch). Each dp_rank takes
its own rows of the global batch; its tp_ranks read the same rows.

dp: Forward: all-gather of weights over dp
Before each layer, a rank gathers the full tp shard of its weights.

tp: Forward: activations over tp, twice a layer
All-gather before column-parallel layers, reduce-scatter after
row-parallel layers; together they are one all-reduce. Outside
these layers, each tp_rank holds its own shard of the sequence.

tp and dp: Loss on vocabulary shards
No rank holds all logits: sums over the vocabulary run over tp.
loss = sum over tokens / valid tokens of the global batch

tp and dp: Backward
The same collectives in reverse: weights are gathered over dp again,
gradients of activations travel over tp.

dp: Reduce-scatter of gradients over dp
When backward leaves a layer, each rank keeps the sum for its shard.

tp and dp: Clip to the global norm
Squares are summed over all shards, a replicated tensor counted once.
Every rank scales its gradients by the same factor.

none: Optimizer
Each rank updates its own shard. No rank communicates."""


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
        groups, name = head.split(": ", 1)
        y = 64 + 110 * i
        draw_mesh(fig, (92, y), (32, 20), (36, 30), groups)
        fig.text(220, y + 34 - 9 * len(lines), f"{i + 1}. {name}", look="left bold")
        fig.text(220, y + 44, *lines, look="left small")
        if i:
            fig.arrow(142, y - 29, 142, y - 14)
    for i in (0, 1):
        fig.text(42, 74 + 50 * i, f"rows {'ab'[i]}", look="small")
        fig.arrow(67, 74 + 50 * i, 77, 74 + 50 * i)
    return fig
