"""The full model on every rank, which AutoTP then shards in place."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tp2d_lib.config import TrainConfig
from tp2d_lib.model import weights
from tp2d_lib.model.files import model_directory
from tp2d_lib.model.guards import check_finite


def load_full_model(config: TrainConfig) -> PreTrainedModel:
    """The full model in float32.

    Raises:
        ValueError: a parameter of the model has no tensor in the files.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    directory = model_directory(config)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    weights.check_complete(info["missing_keys"], directory)  # else they are random
    check_finite(dict(model.named_parameters()), directory)
    return model.train()
