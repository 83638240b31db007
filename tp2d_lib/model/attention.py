"""Causal attention without a mask, and without the search for what one would need."""

from __future__ import annotations

from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tp2d_lib.config import TrainConfig
from tp2d_lib.model.guards import sliding_window

CAUSAL = "tp2d_causal"  # sdpa, for which transformers knows no masks
KINDS = {"full_attention", "sliding_attention"}


def needs_no_mask(model: nn.Module, config: TrainConfig) -> bool:
    """Whether attention is causal and no more: a mask would say nothing else."""
    hf = model.config
    window = sliding_window(hf) or config.seq_length
    causal = KINDS.issuperset(getattr(hf, "layer_types", None) or KINDS)
    known = hf._attn_implementation in ("sdpa", CAUSAL)
    return known and causal and config.seq_length <= window


def attend_causally(model: nn.Module, config: TrainConfig) -> None:
    """Attend without a mask where it would be causal only.

    transformers 5.23 also builds none then, but looks first for several sequences in a
    row, and in every forward the host waits for the device to answer.
    """
    if needs_no_mask(model, config):
        attend_without_mask(model)


def attend_without_mask(model: nn.Module) -> None:
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    model.set_attn_implementation(CAUSAL)
