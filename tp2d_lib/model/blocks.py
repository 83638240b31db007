"""Which blocks of a decoder can be sharded over tp: by its plan, or by usual names."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Set

from torch import nn

from tp2d_lib.model.lora import LoRALinear

COLUMNS = {
    *("q_proj", "k_proj", "v_proj"),
    *("gate_proj", "up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
}
ROWS = {
    *("o_proj", "out_proj", "Wo"),
    *("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h"),
}
STYLES = {  # what FSDP2's plan can do with a module of a block
    "colwise",
    "colwise_gather_output",
    "rowwise",
    "rowwise_split_input",
    "replicated_with_grad_allreduce",
    "norm_of_all",
}
ATTENTION = {"q_proj", "k_proj", "v_proj"}
ANY_HEADS = "-1, self.head_dim"  # attention that works on the heads that it is given


def pattern_of(name: str) -> str:
    """A module's name as a plan has it: ``*`` stands for any layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def shardable(model: nn.Module, known: Set[str]) -> dict[str, str]:
    """Module name -> style, in blocks that can be sharded completely.

    A block is what holds a layer's first linear layers and its last, such as attention
    or an MLP. Blocks with a parameter that has no style, or none that is ``known``, are
    left out, and so are the embedding and the head.
    """
    published = model.tp_plan or {}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    styles = {
        name: published[pattern_of(name)]
        for name, module in model.named_modules()
        if pattern_of(name) in published and module not in ends
    }
    blocks = {name.rpartition(".")[0]: {} for name in styles if "." in name}
    for name, block in model.named_modules():
        if name not in blocks and (found := styles_by_name(block)):
            blocks[name] = {f"{name}.{part}": style for part, style in found.items()}
    named = model.named_parameters(remove_duplicate=False)
    kept, users = {}, Counter(parameter for _, parameter in named)
    for name, found in blocks.items():
        block = model.get_submodule(name)
        shared = any(users[parameter] > 1 for parameter in block.parameters())
        sparse = getattr(block, "activation_sparsity", 0)  # Gemma 3n: of all features
        if not shared and not sparse:
            kept |= complete(name, block, styles | found, known)
    return kept


def styles_by_name(block: nn.Module) -> dict[str, str]:
    """The styles of a block that publishes none, but names its layers as usual."""
    kinds = (nn.Linear, LoRALinear)
    linear = {n: m for n, m in block.named_children() if type(m) in kinds}
    columns, rows = linear.keys() & COLUMNS, linear.keys() & ROWS
    if not columns or len(rows) != 1 or len(linear) != len(columns) + 1:
        return {}
    into = linear[min(rows)].in_features
    if columns == ATTENTION:
        forward = inspect.getsource(inspect.unwrap(type(block).forward))
        counts = ANY_HEADS not in forward or "self.num_heads" in forward
        fits = linear["q_proj"].out_features == into and not counts
    else:
        fits = all(linear[name].out_features == into for name in columns)
        fits = fits and not columns & ATTENTION
    styles = dict.fromkeys(columns, "colwise") | dict.fromkeys(rows, "rowwise")
    return styles if fits else {}


def complete(
    name: str, block: nn.Module, styles: dict[str, str], known: Set[str]
) -> dict[str, str]:
    """The styles of a block's modules; none if one of its parameters has none."""
    inside = {n: s for n, s in styles.items() if n.startswith(f"{name}.")}
    gathers = any("gather" in style for style in inside.values())
    for part, module in block.named_modules():
        if f"{name}.{part}" in inside or not is_norm(module):
            continue
        sizes = {parameter.numel() for parameter in module.parameters()}
        if gathers:
            inside[f"{name}.{part}"] = "norm_of_all"
        elif sizes == {getattr(block, "head_dim", None)}:
            inside[f"{name}.{part}"] = "replicated_with_grad_allreduce"
    owners = {f"{name}.{key}".rpartition(".")[0] for key, _ in block.named_parameters()}
    kinds = set(inside.values())
    ends_in_rows = any(kind.startswith("rowwise") for kind in kinds)
    return inside if owners <= inside.keys() and kinds <= known and ends_in_rows else {}
