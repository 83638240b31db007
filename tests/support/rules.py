"""Rules of a partition_config for the test models."""

ROWS_RULE = {
    "patterns": [r".*\.(o|down)_proj\.weight$"],
    "partition_type": "row",
}
GATE_UP = {
    "patterns": [r".*\.gate_up_proj\.weight$"],
    "partition_type": "column",
    "shape": [2, -1],
}
QKV = {
    "patterns": [r".*\.qkv_proj\.weight$"],
    "partition_type": "column",
    "shape": [[64, 32, 32], -1],
}
MLP = [
    {"patterns": [r".*\.mlp\.(gate|up)_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*\.mlp\.down_proj\.weight$"], "partition_type": "row"},
]
FUSED = {"use_default_specs": False, "layer_specs": [ROWS_RULE, GATE_UP, QKV]}
ONLY_MLP = {"use_default_specs": False, "layer_specs": MLP}


def rules(*layer_specs):
    return {"use_default_specs": False, "layer_specs": list(layer_specs)}


COLUMNS = {"partition_type": "column"}
ATTENTION = {"patterns": [r".*self_attn\.[qkv]_proj\.weight$"], **COLUMNS}
