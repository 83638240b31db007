"""A Hugging Face decoder, and the checks that both engines share."""

from tp2d_lib.model.architecture import (
    build_empty_model,
    compile_blocks,
    decoder_layers,
    decoder_of,
    device_type,
    load_model_config,
    pick_dtype,
)
from tp2d_lib.model.guards import PlanError
from tp2d_lib.model.recompute import checkpoint_activations

__all__ = [
    "PlanError",
    "build_empty_model",
    "checkpoint_activations",
    "compile_blocks",
    "decoder_layers",
    "decoder_of",
    "device_type",
    "load_model_config",
    "pick_dtype",
]
