"""What the headers of a model's files say, and which models they do not allow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import nn

from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.model.files import (
    damaged,
    local_directory,
    no_safetensors,
    weight_files,
)
from tp2d_lib.model.hub import errors_explained

FLOATS = {  # types that a weight may be stored in
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Stored(NamedTuple):
    """A tensor in a file: its sizes, and its type as safetensors spells it."""

    shape: list[int]
    dtype: str


def read(config: TrainConfig) -> dict[str, Stored]:
    """The tensors in the model's files, by name; of a Hub model, nothing is downloaded.

    Raises:
        ConfigError: the Hub does not hand them out, they are not safetensors, or not
            all of what they should be.
    """
    if os.path.isdir(config.model_name) or constants.HF_HUB_OFFLINE:
        return read_files(local_directory(config), config)
    repository = {"repo_id": config.model_name, "revision": config.model_revision}
    with errors_explained(config):
        try:
            files = get_safetensors_metadata(**repository).files_metadata.values()
        except NotASafetensorsRepoError as error:
            raise no_safetensors(config) from error
        except SafetensorsParsingError as error:
            raise damaged(config, "safetensors header", first_line(error)) from error
    return {
        name: Stored(info.shape, info.dtype)
        for file in files
        for name, info in file.tensors.items()
    }


def read_files(directory: Path, config: TrainConfig) -> dict[str, Stored]:
    """``read``, of a folder on this node."""
    found: dict[str, Stored] = {}
    for path in weight_files(directory, config):
        try:
            with safe_open(path, "pt") as file:  # as long as its header says
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = Stored(part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise damaged(config, path.name, first_line(error)) from error
    return found


def check(model: nn.Module, stored: dict[str, Stored], config: TrainConfig) -> None:
    """Refuse files from which the model cannot be read as ``from_pretrained`` reads it.

    Args:
        model: empty, and not sharded.
        stored: what ``read`` or ``read_files`` found.

    Raises:
        ConfigError: names the first tensor that is quantized, or has other sizes.
    """
    check_types(model, stored, config)
    check_shapes(model, stored, config)


def check_types(
    model: nn.Module, stored: dict[str, Stored], config: TrainConfig
) -> None:
    """Each weight is stored as a number, not as bits that need a scale.

    Where a weight is missing, the quantized one may have a name of its own beside it.
    """
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        beside = [n for n in stored if n.startswith(f"{module}.")]
        for found in [name] if name in stored else beside:
            if (kind := stored[found].dtype) not in FLOATS:
                raise ConfigError(
                    f"model_name={config.model_name!r} must hold weights in "
                    f"floating-point types of 16 bits or more, but {found!r} is "
                    f"quantized to {kind}; try the unquantized model"
                )


def check_shapes(
    model: nn.Module, stored: dict[str, Stored], config: TrainConfig
) -> None:
    """The sizes in ``config.json`` are those of the tensors in the files."""
    for name, tensor in model.state_dict().items():
        sizes = list(tensor.shape)
        if name in stored and (found := list(stored[name].shape)) != sizes:
            raise ConfigError(
                f"model_name={config.model_name!r} must hold tensors of the sizes in "
                f"its config.json, which makes {name} {sizes}, not {found}; try "
                "another copy of the model"
            )
