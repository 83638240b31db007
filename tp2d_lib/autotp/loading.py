"""The full model on every rank, which AutoTP then shards in place."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PreTrainedModel

from tp2d_lib.config import TrainConfig
from tp2d_lib.model import build_empty_model, device_type, headers, pick_dtype, weights
from tp2d_lib.model.files import model_directory
from tp2d_lib.model.guards import check_finite


def load_full_model(config: TrainConfig) -> PreTrainedModel:
    """The full model in the compute type, which DeepSpeed makes its masters from.

    Where the files hold that type, they are mapped: no copy until weights are sharded.

    Raises:
        ConfigError: the files are not those of this model, or are quantized.
        ValueError: a parameter of the model has no tensor in the files.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    directory = model_directory(config)
    empty = build_empty_model(config)
    headers.check(empty, headers.read_files(directory, config), config)
    dtype, _ = pick_dtype(config, device_type(config))
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        trust_remote_code=False,
        attn_implementation=config.attn_implementation,
        output_loading_info=True,
    )
    weights.check_complete(info["missing_keys"], directory)  # else they are random
    check_finite(dict(model.named_parameters()), directory)
    for name, parameter in empty.named_parameters():
        # from_pretrained forgets it; a router's bias would decay.
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model.train()
